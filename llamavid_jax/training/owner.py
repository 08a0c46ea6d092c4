"""One run at a time has an output folder: by a lock on a disk, by its claim in a bucket."""

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

LOCK, OWNER = ".lock", ".owner"  # who has it in a bucket, where nothing can be locked


@contextlib.contextmanager
def only_run(output: Path) -> Iterator[Callable[[], str]]:
    """Raises CheckpointError, on every process, where another run has `output`; process 0 holds a lock on it.

    In a bucket a lock would outlive its holder: there the newest run has it, and what is yielded says who that is.
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
