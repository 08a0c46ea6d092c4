"""`answers.jsonl`: a header, then a row per answer, appended as they come; and such files of several processes.

A process may be killed at any moment: complete lines stay, an incomplete last line is removed, and the next process
asks what is left.  A lock keeps two processes from writing to one file.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

from llamavid_jax import uploads
from llamavid_jax.errors import InputError
from llamavid_jax.evaluation.items import Row
from llamavid_jax.files import find, locked, write_files

NAME = "answers.jsonl"
IDENTITY = "set", "like_original", "settings", "model", "data", "shard"  # the header's fields that identify a run


def part_name(shard: tuple[int, int]) -> str:
    return NAME if shard == (0, 1) else f"answers-{shard[0]}-of-{shard[1]}.jsonl"


def as_line(row: Row) -> bytes:
    """A row as a line of UTF-8; half surrogate pairs in a question are kept as they are."""
    return json.dumps(row, ensure_ascii=False).encode(errors="surrogatepass") + b"\n"


def read_rows(path: Path) -> tuple[dict[str, Any], list[Row], int]:
    """Header, rows, and the length of the complete lines in bytes.  InputError if it is no such file."""
    rows, whole = [], 0
    try:
        with path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break  # incomplete: the process was killed
                rows.append(json.loads(line))
                whole += len(line)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read behind byte {whole} ({error}); move it away") from None
    if not rows:
        return {}, [], 0
    if not isinstance(rows[0], dict) or "header" not in rows[0]:
        raise InputError(f"{path} does not begin with the header of an evaluation; give another folder")
    return rows[0]["header"], rows[1:], whole


class Store:
    """The open file of answers.  `done`: the ids that it and the other parts have.

    `outdated`: other parts, written with other annotations than the present ones; resuming such a part updates it.
    """

    def __init__(self, file: BinaryIO, rows: Sequence[Row], outdated: Sequence[Path] = ()):
        self.file, self.outdated = file, outdated
        self.done = {row["id"] for row in rows}
        self.broken = sum("error" in row for row in rows)

    def write(self, rows: Sequence[Row]) -> None:
        """Appends rows; they are on disk when this returns."""
        self.file.write(b"".join(map(as_line, rows)))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.done |= {row["id"] for row in rows}
        self.broken += sum("error" in row for row in rows)


def current(rows: Sequence[Row], rest: Sequence[Row], references: Mapping[str, Any], retry: bool) -> list[Row]:
    """The rows with the present references: the folder's annotations may have changed since they were written."""
    known = {name: {"reference": reference} for name, reference in references.items()}
    known |= {row["id"]: row for row in rest}
    kept = [
        row
        for row in rows
        if not (retry and "error" in row) and (row.get("text", "") is not None or row["id"] in known)
    ]
    return [json.loads(as_line({**row, **known.get(row["id"], {})})) for row in kept]


@contextlib.contextmanager
def open_store(
    path: Path,
    header: Mapping[str, Any],
    rest: Sequence[Row],
    retry: bool = False,
    references: Mapping[str, Any] = MappingProxyType({}),
) -> Iterator[Store]:
    """Resumes the file, or starts it with the header.

    The first part also gets `rest`, the rows of questions that are never asked.  What other parts have answered is done
    too, as there may be more or fewer processes than before.  `retry` removes the broken rows; `references` are the
    questions' references by id.  InputError if this or another part was begun with other settings.
    """
    with contextlib.ExitStack() as exits:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{path.parent} cannot be made ({error.strerror}); give another --out") from None
        exits.enter_context(locked(path.with_suffix(".lock"), str(path)))
        find(path)
        exits.enter_context(uploads.sending(path))
        before, rows, whole = read_rows(path) if path.exists() else ({}, [], 0)
        if before:
            check_same(before, header, path)
        others = [part for part in parts(path.parent) if part[0] != path]
        for file, theirs, _ in others:
            check_same({**theirs, "shard": None}, {**header, "shard": None}, file)
        kept = current(rows, rest, references, retry)
        if not before or kept != rows:
            lines = [{"header": before or dict(header)}, *kept]
            content = b"".join(map(as_line, lines))
            write_files(path.parent, {path.name: content})
            rows, whole = kept, len(content)
        try:
            file = exits.enter_context(path.open("r+b"))
        except OSError as error:
            raise InputError(f"{path} cannot be written to ({error.strerror}); give another --out") from None
        file.truncate(whole)
        file.seek(whole)
        store = Store(file, rows, [one for one, _, more in others if current(more, rest, references, False) != more])
        store.done |= {row["id"] for *_, more in others for row in more if not (retry and "error" in row)}
        if header.get("shard", [0, 1])[0] == 0:
            store.write([row for row in rest if row["id"] not in store.done])
        yield store


def check_same(before: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    for name in IDENTITY:
        if before.get(name) != now.get(name):
            raise InputError(
                f"{path} was begun with another {name.replace('_', ' ')} ({_short(before.get(name))}, now "
                f"{_short(now.get(name))}); give another --out, or the same"
            )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 200 else text[:200] + "..."


def gather(folder: Path) -> tuple[dict[str, Any], list[Row]]:
    """The rows of all parts in the set's order, each question once; a broken row only if no part has an answer.

    InputError if there are none, or if the parts are of different runs.
    """
    header: dict[str, Any] = {}
    rows: dict[str, Row] = {}
    for file, own, more in parts(folder):
        check_same({**own, "shard": None}, {**(header or own), "shard": None}, file)
        header = header or own
        rows |= {row["id"]: row for row in more if "error" not in row or row["id"] not in rows}
    if not header:
        raise InputError(f"{folder} holds no {NAME}; give the --out of an evaluation")
    return header, sorted(rows.values(), key=lambda row: row["index"])


def parts(folder: Path) -> list[tuple[Path, dict[str, Any], list[Row]]]:
    """File, header and rows of each existing part."""
    files = [folder / NAME, *sorted(folder.glob("answers-*-of-*.jsonl"))]
    found = [(file, *read_rows(file)[:2]) for file in files if file.exists()]
    return [part for part in found if part[1]]
