"""LLaVA-format data -> records: `read_records(path, media)[i]`, and the frames of a record's media file.

    {"id": "7", "image" | "video" | "features": "folder/file", "conversations": [{"from": "human", "value": ...}, ...]}

A "video" may also have "subtitles": "folder/file.srt"; it is then a film, with text between its frames
(`text/subtitles.py`).  Records are in a list (.json), one per line (.jsonl), or in a folder of shards
(`data/shards.py`).  A file name that ends in .npz, .npy, .safetensors or .pkl means ready features
(`media/features.py`); a record without media is text only.  The file stays on disk and only the byte ranges of its
records are kept, so that 665,000 of them are cheap to hold and to send to worker processes.

Deviations from the original: a record that cannot be used raises an error when it is read, and no other sample replaces
it; the path fallbacks apply only if the named file is missing; a key with null counts as absent.
"""

import contextlib
import json
import mmap
import operator
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llamavid_jax.buckets import is_address, kind, place
from llamavid_jax.data.record import DataError, Record, as_utf8
from llamavid_jax.files import find, local
from llamavid_jax.media import features
from llamavid_jax.media.images import open_image
from llamavid_jax.media.source import MediaError, local_file
from llamavid_jax.media.video import iter_frames, plan_video
from llamavid_jax.text.subtitles import TIMES, interleave, parse_subtitles, read_subtitles

MEDIA_KEYS = ("image", "video", "features")
PICKLES = (".pt", ".pth", ".bin")


class JsonRows(Sequence):
    """The values of a .json list or the lines of a .jsonl, parsed one at a time: `rows[i]` raises DataError."""

    def __init__(self, path: str | Path):
        try:
            self.path = str(local_file(path))
            content = Path(self.path).read_bytes()
            spans = _line_spans(content) if str(path).endswith(".jsonl") else _list_spans(content.decode())
        except MediaError as error:
            raise DataError(str(error)) from None
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(
                f"{path} is not a readable list of records ({error}); write [RECORD, ...], or a .jsonl"
            ) from None
        if not len(spans):
            raise DataError(f"{path} holds no records; give a file with at least one")
        self._spans = np.array(spans, np.int64)
        self._content: mmap.mmap | None = None

    def __getstate__(self):
        return self.__dict__ | {"_content": None}  # each process maps the file itself

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: Any) -> Any:
        start, stop = self._spans[operator.index(index)].tolist()
        if self._content is None:
            with find(self.path).open("rb") as file:
                self._content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            return json.loads(self._content[start:stop])
        except (ValueError, RecursionError) as error:
            raise DataError(f"record {index} of {self.path} is not readable JSON: {error}") from None


def _line_spans(content: bytes) -> list[tuple[int, int]]:
    """The byte ranges (start, stop) of the lines that are not blank."""
    start, spans = 3 if content.startswith(b"\xef\xbb\xbf") else 0, []
    while start < len(content):
        stop = content.find(b"\n", start) % (len(content) + 1)  # -1: the last line has no newline
        if content[start:stop].strip():
            spans.append((start, stop))
        start = stop + 1
    return spans


def _list_spans(text: str) -> list[tuple[int, int]]:
    """The byte ranges (start, stop) of a JSON list's values, in UTF-8.  Raises ValueError if it is not a list."""
    blank, parse = re.compile(r"[ \t\n\r]*").match, json.JSONDecoder().raw_decode

    def skip(place: int) -> int:
        return blank(text, place).end()

    at = skip(1 if text.startswith("\ufeff") else 0)
    if not text.startswith("[", at):
        raise ValueError(f"it begins with {text[at : at + 20]!r}")
    spans, seen, byte = [], 0, 0  # `byte` is the byte offset of character `seen`
    at = skip(at + 1)
    while not text.startswith("]", at):
        _, end = parse(text, at)
        start = byte + len(text[seen:at].encode())
        seen, byte = end, start + len(text[at:end].encode())
        spans.append((start, byte))
        at = skip(end)
        if text.startswith(",", at):
            at = skip(at + 1)
        elif not text.startswith("]", at):
            raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
    if skip(at + 1) < len(text):
        raise json.JSONDecodeError("Text after the list", text, skip(at + 1))
    return spans


class Records(Sequence):
    """`records[i]` is a Record; it raises DataError if the i-th row cannot be used."""

    def __init__(self, rows: Sequence[Any], media: str | Path):
        self.rows, self.media = rows, str(local(media))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Record:
        row = self.rows[index]
        if not isinstance(row, Mapping):
            raise DataError(f"record {index} is {str(row)[:60]!r}; it must be an object with 'conversations'")
        name = str(index) if row.get("id") is None else as_utf8(str(row["id"]))
        conversations = row.get("conversations")
        if conversations is None and "messages" in row:
            raise DataError(
                f"record {name!r} has 'messages', as chat templates write them; LLaVA's format has 'conversations', "
                'turns of the form {"from": "human" or "gpt", "value": TEXT}'
            )
        if not isinstance(conversations, list) or not conversations:
            raise DataError(f"record {name!r}: conversations is {str(conversations)[:60]!r}; give a list of turns")
        keys = [key for key in MEDIA_KEYS if row.get(key) is not None]
        if len(keys) > 1:
            raise DataError(f"record {name!r} has {' and '.join(keys)}; give one of them")
        subtitles = row.get("subtitles")
        if subtitles is not None and keys != ["video"]:
            raise DataError(
                f"record {name!r} has subtitles, but no video; they go with one, and a file of features holds its own "
                "in `inputs`"
            )
        times = row.get("times")
        if times is not None and times not in TIMES:
            raise DataError(f"record {name!r}: times is {str(times)[:60]!r}; use one of {', '.join(TIMES)}")
        if times is not None and keys not in (["video"], ["features"]):
            raise DataError(f"record {name!r} has times, but no video or features; they go with one of these")
        if not keys:
            return Record(name, conversations, None, "text")
        value = row[keys[0]]
        for key, path in ((keys[0], value), ("subtitles", "-" if subtitles is None else subtitles)):
            if not isinstance(path, str) or not path.strip() or min(path) < " ":  # no control characters
                raise DataError(f"record {name!r}: {key} is {str(path)[:60]!r}; give the path of one file")
        suffix = os.path.splitext(value)[1].lower()
        kind = "features" if suffix in features.SUFFIXES else keys[0]
        if suffix in PICKLES:
            raise DataError(
                f"record {name!r}: {value} is a pickle, which may run any code when it is read; {features.REMEDY}"
            )
        if subtitles is not None and kind == "features":
            raise DataError(f"record {name!r} has subtitles, but {value} holds its own in `inputs`; write them there")
        subtitles = None if subtitles is None else self._path(subtitles)
        return Record(name, conversations, self._path(value), kind, None, subtitles, times)

    def _path(self, name: str) -> str:
        return str(place(name)) if is_address(name) else os.path.join(self.media, name)


def read_records(path: str | Path, media: str | Path = "") -> Sequence:
    """The records of a .json list, a .jsonl or a folder of shards; their media are relative to `media`.

    `media` defaults to the folder of `path`.  Raises DataError for any other file, and if `media` is not a folder; a
    record that cannot be used raises it only when it is read.  (So the type is not `Sequence[Record]`: a run-time type
    checker would read some of them.)
    """
    path = find(path)
    if path.is_dir():
        from llamavid_jax.data.shards import read_shards

        return read_shards(path)
    if media and kind(local(media)) != "directory":
        raise DataError(f"the folder of the media, {media}, does not exist; give the one that the paths start from")
    return Records(JsonRows(path), media or path.parent)


def is_there(path: str) -> bool:
    """Whether the file exists; one in a bucket is fetched."""
    return os.path.exists(find(path))


def find_media(record: Record, is_there: Callable[[str], bool] = is_there) -> str:
    """The path of the media file, by the original's fallbacks if the named file is missing."""
    path = record.media or ""
    if record.kind == "image" and not is_there(path):
        moved = path.replace("VG_100K_2", "images").replace("VG_100K", "images")
        candidates = [moved, path.removesuffix(".jpg") + ".png"] if "ocr" in path else [moved]
        path = next((candidate for candidate in candidates if is_there(candidate)), path)
    return path


def film_text(record: Record, times: Iterable[float]) -> str | None:
    """`<image>` for each frame of `times`, with the subtitles between them; None if the record is not a film.

    Raises ConversationError for subtitles that cannot be read.
    """
    if record.subtitles is None:
        return interleave(times, ()) if record.times else None
    is_text = record.data is not None
    return interleave(times, (parse_subtitles if is_text else read_subtitles)(record.subtitles))


@contextlib.contextmanager
def media_file(record: Record) -> Iterator[Path]:
    """`with media_file(record) as path`: the media file on disk, a temporary one for `data`.  Raises MediaError."""
    if record.data is None:
        yield local_file(find_media(record))
        return
    name = record.media or f"the {record.kind} of record {record.id!r}"
    with tempfile.TemporaryDirectory(prefix="llamavid-") as folder:
        path = Path(folder).resolve() / "medium"
        path.write_bytes(record.data)
        try:
            yield path
        except MediaError as error:
            raise MediaError(str(error).replace(str(path), name)) from None


def media_size(record: Record, fps: float | int) -> int:
    """The number of frames of the media file at `fps` a second, found without decoding it; an image is not opened.

    Raises MediaError.
    """
    if record.kind in ("text", "image"):
        return int(record.kind == "image")
    with media_file(record) as path:
        return count_frames(path, record.kind, fps)


def count_frames(path: str | Path, kind: str, fps: float | int) -> int:
    """`media_size` of a local file."""
    if kind == "image":
        return 1
    if kind == "features":
        return features.read_header(path).frames
    return len(plan_video(path, fps))


def decode(path: Path, kind: str, fps: float | int, max_frames: int | None = None) -> Iterator[np.ndarray]:
    """The frames of a local file one by one: uint8 [h, w, 3], or float [P, E] of features.  Raises MediaError.

    If there are more than `max_frames`, only the `thinned` ones.
    """
    if kind == "image":
        yield np.asarray(open_image(path))
    elif kind == "features":
        places = set(thinned(features.read_header(path).frames, max_frames))
        yield from (frame for place, frame in enumerate(features.iter_features(path)) if place in places)
    else:
        plan = plan_video(path, fps)
        for _, frame in iter_frames(path, plan.only(thinned(len(plan), max_frames))):
            yield frame


def thinned(count: int, max_frames: int | None) -> list[int]:
    """Indices of the frames to keep of `count`: at most `max_frames`, evenly spaced from the first to the last."""
    if max_frames is None or count <= max_frames:
        return list(range(count))
    return np.linspace(0, count - 1, max_frames).round().astype(int).tolist()
