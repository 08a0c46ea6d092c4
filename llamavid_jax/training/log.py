"""Logs that are never worth a run: what cannot be written is said once, nobody waits for it, odd lines are left out.

Everything is written where it is asked for.  TensorBoard's usual writer has a thread of its own, which dies of a full
disk, and a queue, on which the run would wait for ever.
"""

import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import RecordWriter
from tensorboardX.summary import scalar

from llamavid_jax.errors import InputError, OutageError
from llamavid_jax.files import write_files
from llamavid_jax.uploads import remove


class Log:
    """What all logs share: `with self.writing()` says the first failure and ends none of what is around it."""

    def __init__(self, path: Path, report: Callable[[str], None]):
        self.path, self._report, self._failed = path, report, False

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, InputError, OutageError) as error:
            if not self._failed:
                reason = getattr(error, "strerror", None) or error
                self._report(f"{self.path} cannot be written ({reason}); the run goes on without it")
            self._failed = True


class JsonLines(Log):
    """A file of JSON objects, one a line.  It is opened for each writing: so it is told when its folder is deleted."""

    def rows(self) -> list[dict[str, Any]]:
        """The objects in it.  Lines that are none, as a killed run or a full disk leaves them, are left out."""
        try:
            lines = self.path.read_bytes().split(b"\n")
        except OSError:
            return []
        rows = []
        for line in lines:
            with contextlib.suppress(ValueError, RecursionError):
                rows.append(json.loads(line))
        return [row for row in rows if isinstance(row, dict)]

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        content = _lines(rows)
        with self.writing():
            if content:
                with open(self.path, "ab+") as file:
                    file.seek(max(file.tell() - 1, 0))
                    half = file.read() not in (b"", b"\n")
                    file.write(b"\n" * half + content)

    def replace(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Makes these its rows; without any there is no file."""
        content = _lines(rows)
        with self.writing():
            if content:
                write_files(self.path.parent, {self.path.name: content})
            else:
                remove(self.path)


def _lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode(errors="backslashreplace")


class TensorBoard(Log):
    """A file of numbers in the folder `path`.  What earlier files there say of `first_step` and later is not shown."""

    def __init__(self, path: Path, first_step: int, report: Callable[[str], None]):
        super().__init__(path, report)
        # the second is in the name, which a quick restart would share
        name = f"events.out.tfevents.{int(time.time()):010}.{socket.gethostname()}.{first_step}"
        self._file: _Records | None = None
        with self.writing():
            path.mkdir(parents=True, exist_ok=True)
            self._file = _Records(str(path / name))
        self._write(
            Event(file_version="brain.Event:2"),
            Event(step=first_step, session_log=SessionLog(status=SessionLog.START)),
        )

    def add(self, step: int, values: Mapping[str, float]) -> None:
        self._write(*(Event(step=step, summary=scalar(name, value)) for name, value in values.items()))

    def _write(self, *events: Event) -> None:
        if self._file is None:
            return
        with self.writing():
            for event in events:
                event.wall_time = time.time()
                self._file.write(event.SerializeToString())
            self._file.flush()
        if self._failed:  # half an event may be there, behind which nothing would be read
            self.close()

    def close(self) -> None:
        if self._file is not None:
            with self.writing():
                self._file.close()
            self._file = None


class _Records(RecordWriter):
    def flush(self) -> None:
        """Without `fsync`, which may wait for a checkpoint that is being written to the same disk."""
        self._writer.flush()
