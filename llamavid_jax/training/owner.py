"""Only one run at a time uses an output folder: a lock ensures it on a disk, an owner file in a bucket."""

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from llamavid_jax import buckets, uploads
from llamavid_jax.errors import CheckpointError, InputError
from llamavid_jax.files import locked, write_files
from llamavid_jax.parallel.processes import on_any

LOCK, OWNER = ".lock", ".owner"  # the owner file names the run that uses a bucket's folder


@contextlib.contextmanager
def only_run(output: Path) -> Iterator[Callable[[], str]]:
    """Claims `output`; yields a function that returns who has taken it over since, "" for nobody.

    Process 0 holds a file lock; CheckpointError is raised on every process if another run holds it.  In a bucket a lock
    would outlive its holder, so the newest run becomes the owner.
    """
    problem = ""
    with contextlib.ExitStack() as exits:
        if jax.process_index() == 0:
            try:
                exits.enter_context(locked(output / LOCK, f"output, {output},"))
                if buckets.url(output):
                    write_files(output, {OWNER: f"{os.getpid()} on {socket.gethostname()}\n".encode()})
            except InputError as error:
                problem = str(error)
        if on_any(problem):
            raise CheckpointError(problem or f"output, {output}, is in use by another run; process 0 says by which")
        yield uploads.Claim(output / OWNER).holder if buckets.url(output) else str
