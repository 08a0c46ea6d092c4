"""The size of every sample, known before a run: records -> a table of frames, questions and tokens, cached in a file.

Planning which samples share a row (`plan.py`) needs the size of each without decoding it.  The table takes 17 bytes a
sample.  The cache key covers the data's files, the number of records and everything that defines the reader.  The
original measures in words, and only for one of its samplers.
"""

import concurrent.futures
import dataclasses
import hashlib
import io
import json
import os
import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int, Int64

from llamavid_jax.buckets import listing, status, url
from llamavid_jax.data.examples import ExampleReader, SampleSize
from llamavid_jax.data.records import find_media
from llamavid_jax.data.shards import Shards
from llamavid_jax.errors import InputError, OutageError
from llamavid_jax.files import find, local, write_files

KINDS = ("text", "pixels", "features", "broken")
TEXT_ONLY, BROKEN = KINDS.index("text"), KINDS.index("broken")
_CHUNK = 256  # records that a thread measures at a time


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sample i: `KINDS[kind[i]]` and the other fields of its SampleSize.

    `broken` names the samples that cannot be measured, as `{"id", "reason"}`; they are never planned.
    """

    kind: Int[np.ndarray, " N"]
    frames: Int[np.ndarray, " N"]
    questions: Int[np.ndarray, " N"]
    tokens: Int[np.ndarray, " N"]
    marks: Int[np.ndarray, " N"]
    broken: Sequence[dict[str, str]] = ()

    @classmethod
    def of(cls, sizes: Sequence[SampleSize]) -> "Sizes":
        """The table of these sizes."""
        rows = np.array([(KINDS.index(size.kind), *size[1:]) for size in sizes], np.int32)
        kind, *others = rows.reshape(-1, 5).T
        return cls(kind.astype(np.int8), *others)

    def fingerprint(self) -> bytes:
        return hashlib.sha256(
            b"".join(x.tobytes() for x in (self.kind, self.frames, self.questions, self.tokens))
        ).digest()


def read_sizes(
    records: Sequence,  # of Record; annotated as such, the tests' type checks would read a random one
    reader: ExampleReader,
    data_path: str | Path | None = None,
    cache: str | Path | None = None,
    threads: int = 2,
    retry: bool = True,
) -> Sizes:
    """Measures every record, or reads `cache` (an .npz file) if it was made from the same `data_path` and reader.

    Broken records are measured again, as are those whose media files have another size or time; with `retry` False they
    are not, so that a resumed run keeps its plan.  Raises InputError if the cache cannot be written.  An unexpected
    error in the reader becomes a RuntimeError that names the record.
    """
    key = _key(records, reader, data_path) if cache is not None else b""
    nothing = np.full((5, len(records)), BROKEN, np.int32), np.zeros((2, len(records)), np.int64), None
    table, media, broken = _cached(cache, key) or nothing
    if retry or broken is None:
        before = media
        if cache is not None and not isinstance(records, Shards):  # these hold their media
            media = media_files(records, threads)
        table[0, (media != before).any(0)] = BROKEN
        missing = np.flatnonzero(table[0] == BROKEN)
    else:
        missing = np.array([], int)
    if len(missing):
        broken = []
    with concurrent.futures.ThreadPoolExecutor(max(threads, 1)) as pool:
        chunks = [missing[start : start + _CHUNK].tolist() for start in range(0, len(missing), _CHUNK)]
        for chunk, sizes in zip(chunks, pool.map(lambda chunk: _measure(records, reader, chunk), chunks), strict=True):
            for index, size in zip(chunk, sizes, strict=True):
                if isinstance(size, dict):
                    broken.append(size)
                else:
                    table[:, index] = KINDS.index(size.kind), *size[1:]
    if cache is not None and len(missing):
        content = io.BytesIO()
        key, broken_json = (np.frombuffer(part, np.uint8) for part in (key, json.dumps(broken).encode()))
        np.savez(content, table=table, key=key, media=media, broken=broken_json)
        write_files(Path(cache).parent, {Path(cache).name: content.getvalue()})
    kind, *others = table
    return Sizes(kind.astype(np.int8), *others, broken or ())


def media_files(records: Sequence, threads: int) -> Int64[np.ndarray, "2 N"]:
    """Size in bytes and time in nanoseconds of every record's media file, -1 without one; subtitles are added to both.

    Files in a bucket are listed, not fetched.
    """
    folder = local(getattr(records, "media", ""))
    listed = {str(folder / name): found for name, found in listing(folder).items()} if url(folder) else {}

    def is_there(path: str) -> bool:
        return path in listed if listed else os.path.exists(path)

    def look(index: int) -> tuple[int, int]:
        try:
            record = records[index]
            files = [find_media(record, is_there)] * bool(record.media) + [record.subtitles] * bool(record.subtitles)
            found = [listed.get(file) or status(file) for file in files]
        except (InputError, OSError, ValueError):
            found = []
        return (sum(one.size for one in found), sum(one.time for one in found)) if found else (-1, -1)

    with concurrent.futures.ThreadPoolExecutor(max(threads, 1)) as pool:
        return np.array(list(pool.map(look, range(len(records)))), np.int64).reshape(-1, 2).T


def _measure(records: Sequence, reader: ExampleReader, indices: Sequence[int]) -> list[SampleSize | dict]:
    out = []
    for index in indices:
        name = f"record {index}"  # until it is known to have an id
        try:
            if isinstance(records, Shards):  # without reading the media's bytes
                record, header = records.outline(index)
                if record.subtitles is not None or record.times:  # where the text goes depends on all frames' times
                    record, header = records[index], None
            else:
                record, header = records[index], None
            name = record.id
            out.append(reader.size(record, index, header))
        except InputError as error:
            out.append({"id": name, "reason": str(error)})
        except OutageError:  # the sample is not to blame
            raise
        except Exception as error:
            raise RuntimeError(f"sample {name} cannot be measured: {type(error).__name__}: {error}") from error
    return out


def _key(records: Sequence, reader: ExampleReader, data_path: str | Path | None) -> bytes:
    """A hash of all that sizes depend on: the data's files, the media's folder, the tokenizer, the template, ..."""
    path = find(data_path or "")
    files = sorted(listing(path).items()) if path.is_dir() and data_path else []
    name = url(path) or str(path)  # hosts keep copies of a bucket in different places
    stats = [(name, path.stat().st_size, path.stat().st_mtime_ns)] if data_path and not files else []
    stats += [(f"{name}/{file}", *status) for file, status in files]
    media = getattr(records, "media", "")
    media = media and (url(media) or media)  # shards hold their own
    return hashlib.sha256(repr((len(records), stats, media)).encode() + pickle.dumps(reader)).digest()


def _cached(cache: str | Path | None, key: bytes) -> tuple[np.ndarray, np.ndarray, list[dict[str, str]]] | None:
    """Table, media files and broken records; None if the file is absent, damaged, or made from something else."""
    try:
        if cache is not None:
            with np.load(cache) as content:
                if content["key"].tobytes() == key and len(content["table"]) == 5:
                    return content["table"], content["media"], json.loads(content["broken"].tobytes())
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass
    return None
