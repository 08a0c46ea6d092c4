"""Copies of a run's state on the hosts' own disks, or in their memory (/dev/shm), between two of its checkpoints.

    save: each process, what its own devices hold ─▶ FOLDER/RUN/MESH/PROCESS/STEP
    restore: the newest step that all processes have, if it is newer than the newest checkpoint

Processes that restart on the same hosts, in the same number and on the same mesh, resume from there and lose less.  On
other machines, or if one process has lost its copy, the run resumes from its checkpoint.  RUN identifies the run, so
that it never reads another run's copies.

Orbax's emergency manager needs slices that replicate one another, and its multi-tier manager a GKE daemon on each host.
Its plain manager writes to local disks too, and is the one used here.
"""

import dataclasses
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from llamavid_jax.errors import CheckpointError
from llamavid_jax.files import find, write_files
from llamavid_jax.parallel.mesh import describe
from llamavid_jax.parallel.processes import on_any
from llamavid_jax.training.checkpoint import ARRAYS, LISTED, RUN, Restored, RunCheckpoints

NUMBER = "number"  # the file beside a run's checkpoints that holds RUN


class LocalCopies(RunCheckpoints):
    """The two newest copies, in `folder` on each host, of the run whose checkpoints are in `checkpoints`."""

    _own = True

    def __init__(self, folder: str | Path, checkpoints: Path, mesh: Mesh, report: Callable[[str], None]):
        place = f"{jax.process_count()}-processes-{describe(mesh.shape) or 'one-device'}"
        own = Path(folder).absolute() / _number(checkpoints) / place / str(jax.process_index())
        problem = ""
        try:
            own.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            problem = f"training.local_copies: {own} cannot be made ({error.strerror}); give a folder of every host"
        if on_any(problem):
            raise CheckpointError(problem or "another process cannot make its folder of training.local_copies")
        _keep_common(own)
        super().__init__(own, 2, report)

    def _open(self) -> ocp.CheckpointManager:
        """Every process is the primary one of its own folder, and also writes what others hold."""
        alone = ocp.options.MultiprocessingOptions(primary_host=None, barrier_sync_key_prefix="local")
        handler = ocp.type_handlers.ArrayHandler(primary_host=None, replica_id=None, use_replica_parallel=False)
        registry = ocp.type_handlers.create_type_handler_registry((jax.Array, handler))
        handlers = {
            ARRAYS: ocp.PyTreeCheckpointHandler(type_handler_registry=registry, multiprocessing_options=alone),
            RUN: ocp.JsonCheckpointHandler(multiprocessing_options=alone),
        }
        # Created in the background, the folders of one process would count for all that still wait for theirs.
        at_once = ocp.options.AsyncOptions(create_directories_asynchronously=False)
        options = dataclasses.replace(self._options, multiprocessing_options=alone, async_options=at_once)
        return ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)

    def restore(self, abstract: Any, at_least: int = 0) -> Restored | None:
        """None if no copy can be read, which is reported."""
        try:
            return super().restore(abstract, at_least)
        except CheckpointError:
            self._report(f"{self.directory}: no copy can be read; the run goes on from its checkpoints")
            return None


def _number(checkpoints: Path) -> str:
    """RUN, made anew for a run without one.  Removing the checkpoints makes it another run."""
    number, file = secrets.token_bytes(8), checkpoints / NUMBER
    if jax.process_index() == 0:
        try:
            number = bytes.fromhex(find(file).read_text())[:8].ljust(8, b"\0")
        except (OSError, ValueError):
            write_files(checkpoints, {NUMBER: number.hex().encode()})
    return multihost_utils.broadcast_one_to_all(np.frombuffer(number, np.uint8)).tobytes().hex()


def _keep_common(own: Path) -> None:
    """Removes copies that some process lacks: it was killed before it had written its part."""
    steps = sorted((int(path.name) for path in own.glob("*") if path.name.isdecimal()), reverse=True)[:LISTED]
    padded = np.full(LISTED, -1, np.int32)
    padded[: len(steps)] = steps
    every = multihost_utils.process_allgather(padded).reshape(-1, LISTED)
    for step in steps:
        if not (every == step).any(axis=1).all():
            shutil.rmtree(own / str(step), ignore_errors=True)
