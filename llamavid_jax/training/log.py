"""Logs that never stop a run: a failed write is reported once and blocks nothing, malformed lines are skipped.

Writes are synchronous.  TensorBoard's usual writer has a thread, which dies when the disk is full, and a queue, on
which the run would then block forever.
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
    """What all logs share: `with self.writing()` reports the first failure and suppresses all of them."""

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
    """A file of JSON objects, one per line.  Each write reopens it, so that a deleted folder is noticed."""

    def rows(self) -> list[dict[str, Any]]:
        """The objects in the file.  Other lines, as a killed run or a full disk leaves them, are skipped."""
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
        """Makes these the file's only rows; without any, deletes the file."""
        content = _lines(rows)
        with self.writing():
            if content:
                write_files(self.path.parent, {self.path.name: content})
            else:
                remove(self.path)


def _lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode(errors="backslashreplace")


class TensorBoard(Log):
    """An event file in the folder `path`.  TensorBoard hides what earlier files there hold from `first_step` on."""

    def __init__(self, path: Path, first_step: int, report: Callable[[str], None]):
        super().__init__(path, report)
        # a quick restart would have the same second in its name: so the step is in it too
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
        if self._failed:  # a partial event may be there; nothing after it would be read
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
