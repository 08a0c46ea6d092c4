"""The two files of `llamavid-batch`: its questions, and their answers, which survive any end of the process."""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llamavid_jax.data.records import JsonRows
from llamavid_jax.errors import InputError, say
from llamavid_jax.files import local, read_object, write_files
from llamavid_jax.text.conversation import check_text

START = b'{"id": '  # beginning of every answer
# fields of records, chats and commands, refused here: they would be ignored, and the answer would be wrong
UNREAD = {"videos", "images", "features", "subtitles", "transcribe", "times", "fps", "num_frames"}


class Row(NamedTuple):
    """A line of the questions; `error` says why it cannot be answered."""

    id: str
    question: str = ""
    videos: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    error: str = ""

    def said(self) -> dict[str, Any]:
        """The fields that its answer repeats, by which the answer is recognised."""
        media = {"video": self.videos, "image": self.images}
        shown = {name: paths[0] if len(paths) == 1 else list(paths) for name, paths in media.items() if paths}
        return {"id": self.id, "question": self.question, **shown}


def read_questions(path: str) -> list[Row]:
    """All rows, also invalid ones.  Raises InputError if two have the same id."""
    lines, rows = JsonRows(local(path)), {}
    for number in range(len(lines)):
        row = _row(lines, number)
        if row.id in rows:
            raise InputError(f"{path} holds two rows of id {row.id!r}; give each its own, or none")
        rows[row.id] = row
    return list(rows.values())


def _row(lines: Sequence[Any], number: int) -> Row:
    name = str(number)
    try:
        value = lines[number]
        if not isinstance(value, Mapping):
            raise InputError(f"row {number} is {str(value)[:60]!r}; give an object with 'video' and 'question'")
        if value.get("id") is not None:
            check_text(name := str(value["id"]), f"the id of row {number}")
        if unread := sorted(UNREAD & {key for key in value if value[key] is not None}):
            raise InputError(
                f"it has {unread[0]!r}, which is not read here: a row has 'id', 'question', 'video' and 'image'; --fps "
                "and --times hold for all, and a video's feature file may hold subtitles"
            )
        check_text(value.get("question"), "the question")
        if not value["question"].strip():
            raise InputError("the question is empty; write one")
        return Row(name, value["question"].strip(), *(_paths(value, kind) for kind in ("video", "image")))
    except InputError as error:
        return Row(name if name.isprintable() else str(number), error=str(error))


def _paths(value: Mapping[str, Any], kind: str) -> tuple[str, ...]:
    given = value.get(kind)
    paths = [] if given is None else given if isinstance(given, list) else [given]
    for path in paths:
        if not isinstance(path, str) or not path.strip():
            raise InputError(f"{kind} is {str(path)[:60]!r}; give the path or URL of a file")
        check_text(path, kind)
    return tuple(paths)


class Answers:
    """The file of answers; `done` holds the ids in it.  `write` appends its answers with one system call."""

    def __init__(self, path: Path, rows: Iterable[Row]):
        self.path, known = path, {row.id: row for row in rows}
        self.done: set[str] = set()
        self.failed = 0
        with self._said():
            self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        with open(self._file, "rb", closefd=False) as file:
            whole = 0
            for line in file:
                if not line.endswith(b"\n") and line.startswith(START[: len(line)]):
                    break  # the process was killed while it wrote this
                whole += len(line)
                self._read(line, known)
            if whole < os.fstat(self._file).st_size:
                os.truncate(self._file, whole)

    def _read(self, line: bytes, known: Mapping[str, Row]) -> None:
        try:
            answer = json.loads(line)
            row = known.get(answer["id"])
        except (ValueError, TypeError, KeyError):
            raise InputError(f"{self.path} holds {line[:60]!r}, which is no answer; give another --out") from None
        if row is None or {name: answer.get(name) for name in row.said()} != row.said():
            raise InputError(f"{self.path} holds the answer {answer['id']!r} to another question; give another --out")
        if answer["id"] in self.done:
            raise InputError(f"{self.path} holds two answers of id {answer['id']!r}; delete one of the lines")
        self.done.add(answer["id"])
        self.failed += "error" in answer

    def write(self, answers: Sequence[dict[str, Any]]) -> None:
        data = "".join(json.dumps(answer) + "\n" for answer in answers).encode()
        while data:
            with self._said():
                data = data[os.write(self._file, data) :]
        self.done.update(answer["id"] for answer in answers)
        self.failed += sum("error" in answer for answer in answers)

    @contextlib.contextmanager
    def _said(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(f"{self.path} cannot be written to ({error.strerror}); what it holds is whole") from None

    def fail(self, rows: Sequence[Row], error: object) -> None:
        self.write([{**row.said(), "error": str(error)} for row in rows])
        for row in rows:
            say(f"llamavid-batch: {row.id}: {error}")

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Reports the settings that differ from those of the answers already in the file, which stay as they are."""
        file = self.path.with_name(f".{self.path.name}.settings")
        before: Mapping[str, Any] = settings
        with contextlib.suppress(OSError, ValueError):
            before = read_object(file) if self.done else settings
        for name, value in settings.items():
            if before.get(name) != value:
                say(f"{self.path} was begun with {name} {before.get(name)}, now {value}: the answers in it stay")
        if not self.done:
            write_files(file.parent, {file.name: json.dumps(settings).encode()})
