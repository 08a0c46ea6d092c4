"""The checkpoints of a run: trained arrays, optimiser state and data position, so that a run resumes where it stopped.

    {pytree of arrays, position, config} ─ save, in the background ─▶ directory/STEP/{arrays, run} ─ restore ─▶ same

Every host writes and reads its own shards through Orbax, which writes to a temporary folder and renames it: a
checkpoint whose folder is named by its step is complete.  Buckets cannot rename; there a checkpoint is complete once
Orbax has added `commit_success.txt`.  The arrays are stored flat, by the paths of `flat_paths`, so that they can be
restored into optimiser states of any type and onto any mesh.

Deviation from plain Orbax, which does not notice a flipped bit: `run` holds type, shape and fingerprint of every array,
and a checkpoint whose arrays differ is damaged.  Orbax's other files are not read, so damage there is harmless.
"""

import contextlib
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from llamavid_jax import buckets, uploads
from llamavid_jax.checkpoints.arrays import Arrays
from llamavid_jax.errors import CheckpointError, InputError, OutageError, first_line
from llamavid_jax.files import find
from llamavid_jax.models.structure import flat_paths
from llamavid_jax.parallel.processes import on_any
from llamavid_jax.training.fingerprints import fingerprints
from llamavid_jax.training.quiet import quiet

ARRAYS, RUN = "arrays", "run"  # the two items of a checkpoint
POLL = 0.05  # seconds between two checks of a save that is waited for
LISTED = 64  # how many checkpoints a restart considers, the newest ones


class Restored(NamedTuple):
    step: int
    arrays: Any  # with the structure and shardings of the abstract ones
    position: dict[str, Any]
    config: dict[str, Any]


class RunCheckpoints:
    """The `keep` newest checkpoints in `directory`; all processes of a run call its methods in the same order."""

    _own = False  # whether each process has a directory of its own

    def __init__(
        self,
        directory: str | Path,
        keep: int,
        report: Callable[[str], None] = print,
        taken: Callable[[], str] = str,
    ):
        """`report` gets a line for every damaged checkpoint; `taken` returns who else has the run now, "" for nobody.

        Raises CheckpointError.
        """
        if keep < 2:
            raise CheckpointError(f"keep is {keep}; use 2 or more, so that one is left when the newest is damaged")
        self.directory, self._report, self._taken = Path(directory).absolute(), report, taken
        self._saving: int | None = None  # the step that is being saved
        self._failure: CheckpointError | OutageError | None = None
        self._heard: list[BaseException] = []  # errors in background threads of this process
        self._options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            cleanup_tmp_directories=True,  # what a killed save left
            lightweight_initialize=True,  # reads no file of a checkpoint that may be damaged
        )
        self._quiet = contextlib.ExitStack()
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._quiet.enter_context(quiet(self._hear))
            self._manager = self._open()
        except Exception as error:  # buckets raise many kinds
            self._quiet.close()
            if isinstance(error, InputError | OutageError):
                raise
            reason = getattr(error, "strerror", None) or first_line(error)
            raise CheckpointError(
                f"{self.directory} cannot be made ({reason}); give a folder that can be written to"
            ) from error

    def _open(self) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(buckets.url(self.directory) or self.directory, options=self._options)

    def __enter__(self) -> "RunCheckpoints":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def save(self, step: int, arrays: Any, position: dict[str, Any], config: dict[str, Any]) -> None:
        """Copies the arrays and returns; they are written in the background, after an earlier save is complete.

        `arrays` is a pytree of jax arrays on one mesh, global ones in a run of several processes; pass RNG keys as
        their data.  `position` and `config` must be valid JSON; those of process 0 are stored.  A step that exists is
        not written again.  Raises CheckpointError if this save cannot start or the one before failed.
        """
        self.wait()
        if step in self._manager.all_steps():
            return
        if on_any(holder := self._taken()):
            raise CheckpointError(
                f"{self.directory.parent} was taken over by another run ({holder}), which goes on from the newest "
                "checkpoint; end that one, or give another output"
            )
        flat = flat_paths(arrays)
        kinds = {path: _kind(array) for path, array in flat.items()}
        run = {"step": step, "position": position, "config": config, "kinds": kinds, "fingerprints": fingerprints(flat)}
        items = ocp.args.Composite(
            **{ARRAYS: ocp.args.PyTreeSave(flat), RUN: ocp.args.JsonSave({"run": run, "sha256": _sha256(run)})}
        )
        self._saving = step
        self._heard.clear()
        with self._write_errors():
            self._manager.save(step, args=items, force=True)

    def steps(self) -> list[int]:
        """The steps whose checkpoints are complete."""
        return list(self._manager.all_steps())

    def wait(self) -> None:
        """Waits for the save under way.  Raises CheckpointError, on all processes, if it or an earlier one failed.

        It polls first: if one process cannot write its part, Orbax makes the others wait for it for 20 minutes.
        """
        if self._failure:
            raise self._failure
        if self._saving is not None:
            while self.busy():
                time.sleep(POLL)
            try:
                self._manager.wait_until_finished()
            except Exception as error:  # raised after all parts were written
                self._heard.append(error)
            self.busy()
            self._saving = None

    def busy(self) -> bool:
        """Whether a save is under way on any process.  Raises CheckpointError, on all of them, if one has failed."""
        own = np.array([self._manager.is_saving_in_progress(), bool(self._heard)])
        under_way, failed = multihost_utils.process_allgather(own).reshape(-1, 2).T
        with self._write_errors():
            if failed.any():
                raise self._heard[0] if self._heard else OSError(f"process {failed.argmax()} has not written its part")
        return bool(under_way.any())

    def _hear(self, record: logging.LogRecord) -> None:
        """Collects Orbax's errors from its log: it raises them only once all processes have reached a barrier."""
        here = self._saving is not None and str(self._manager.directory) in record.getMessage()
        if here and record.levelno >= logging.ERROR and record.exc_info and record.exc_info[1]:
            self._heard.append(record.exc_info[1])

    def close(self) -> None:
        """`wait`, and frees the threads of Orbax."""
        try:
            self.wait()
        finally:
            if not self._failure:  # else Orbax would only raise its error again, and its threads run on for a while
                self._manager.close()
                self._quiet.close()

    @contextlib.contextmanager
    def _write_errors(self):
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise many kinds
            kind, remedy = CheckpointError, "free space there or give another folder"
            if buckets.url(self.directory):
                kind, remedy = OutageError, "run the same again"
            self._failure = kind(
                f"{self.directory}: the checkpoint of step {self._saving} cannot be written "
                f"({type(error).__name__}: {first_line(error)}); {remedy}"
            )
            raise self._failure from error

    def restore(self, abstract: Any, at_least: int = 0) -> Restored | None:
        """The newest complete checkpoint, of step `at_least` or later, or None if there is none.

        `abstract` is the pytree that was saved, as ShapeDtypeStructs with the shardings to restore onto, or arrays.
        Damaged checkpoints are reported and, once an older one was read, renamed to `damaged-STEP`.  Raises
        CheckpointError if all are damaged, and if the arrays differ from `abstract`, naming the first.
        """
        self.wait()
        damaged = {}
        found = sorted((step for step in self._manager.all_steps() if step >= at_least), reverse=True)
        for step in _from_process_0(found):
            try:
                restored = self._read(step, abstract)
            except _DamagedError as error:
                damaged[step] = str(error)
                self._report(f"{self.directory / str(step)} is damaged ({error}); trying the one before")
                continue
            self._put_aside(list(damaged))
            return restored
        if damaged:
            newest = max(damaged)
            raise CheckpointError(
                f"{self.directory}: none of its {len(damaged)} checkpoints can be read (step {newest}: "
                f"{damaged[newest]}); repair one, or remove the folder to start again"
            )
        return None

    def _read(self, step: int, abstract: Any) -> Restored:
        folder, targets = self.directory / str(step), flat_paths(abstract)
        with _damage(RUN):
            written = json.loads(find(folder / RUN / "metadata").read_text(encoding="utf-8"))
            run = written["run"]
            if written["sha256"] != _sha256(run) or run["step"] != step:
                raise _DamagedError("it is not what was written")
        _check_same(folder, run["kinds"], {path: _kind(target) for path, target in targets.items()})
        with _damage(ARRAYS):
            stored, arrays = Arrays(folder / ARRAYS), {}
            for path, target in targets.items():
                if _kind(stored[path]) != run["kinds"][path]:
                    raise _DamagedError(f"{path} is not what was written")
                arrays[path] = stored.restore(path, target)
        if wrong := [path for path, value in fingerprints(arrays).items() if value != run["fingerprints"][path]]:
            raise _DamagedError(f"{ARRAYS}: {wrong[0]} is not what was written")
        leaves = [arrays[path] for path in targets]
        return Restored(step, jax.tree.unflatten(jax.tree.structure(abstract), leaves), run["position"], run["config"])

    def _put_aside(self, steps: list[int]) -> None:
        """Renames damaged checkpoints, so that the run can write those steps again."""
        if steps and (self._own or jax.process_index() == 0):
            for step in steps:
                folder, aside = self.directory / str(step), self.directory / f"damaged-{step}"
                if buckets.url(folder):
                    uploads.move(folder, aside)
                else:
                    shutil.rmtree(aside, ignore_errors=True)
                    folder.rename(aside)
        if steps:
            multihost_utils.sync_global_devices("damaged checkpoints put aside")
            self._manager.close()  # its `reload` would read metadata, which may be damaged in the others too
            self._manager = self._open()


class _DamagedError(Exception):
    pass


@contextlib.contextmanager
def _damage(item: str) -> Iterator[None]:
    """Turns an error in the block into a _DamagedError on all processes; the block must not contain a barrier."""
    problem = ""
    try:
        yield
    except (_DamagedError, CheckpointError) as error:
        problem = first_line(error)
    except OutageError:  # the others end with this process
        raise
    except Exception as error:  # TensorStore and damaged JSON raise many kinds
        problem = f"{type(error).__name__}: {first_line(error)}"
    if on_any(problem):
        raise _DamagedError(f"{item}: {problem or 'another process cannot read it'}")


def _kind(array: Any) -> str:
    """Such as float32[2, 3]."""
    return f"{array.dtype.name}{list(array.shape)}"


def _check_same(folder: Path, stored: dict[str, str], wanted: dict[str, str]) -> None:
    for path in [*wanted, *stored]:
        there, asked = stored.get(path, "absent"), wanted.get(path, "absent")
        if there != asked:
            raise CheckpointError(
                f"{folder}: {path} is {there} there and {asked} in this run; go on with the configuration that the "
                "checkpoint was made with, or give another output folder"
            )


def _from_process_0(steps: list[int]) -> list[int]:
    """Process 0's list, for all processes: hosts may see different listings of a shared folder for a while."""
    padded = np.full(LISTED, -1, np.int32)
    padded[: len(steps)] = steps[:LISTED]
    return [int(step) for step in multihost_utils.broadcast_one_to_all(padded) if step >= 0]


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
