"""Finds and reads the files of a set's official folder; if one is missing, the error says where to get it."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llamavid_jax import buckets, copies
from llamavid_jax.errors import InputError
from llamavid_jax.files import local
from llamavid_jax.media.source import VIDEO_ENDINGS

LLAVA = "LLaVA's eval.zip has it (github.com/haotian-liu/LLaVA, docs/Evaluation.md)"
MAX_BYTES = 2 << 30  # of an annotation file; MMBench's table contains its images


def need(folder: Path, names: Sequence[str], source: str) -> Path:
    """The first of `names` (patterns) that `folder` holds.  InputError names the source to download it from."""
    for name in names:
        found = sorted(folder.glob(name)) if "*" in name else [folder / name]
        if found and found[0].exists():
            return found[0]
    raise InputError(f"{folder} holds no {' nor '.join(names)}: {source}")


def opened(path: str | Path) -> Path:
    """The folder that `--data` names."""
    folder = local(path)
    copies.fetch_all(folder, media=False)
    if not folder.is_dir():
        raise InputError(f"--data {path} is no folder; give the set's official folder")
    return folder


def read_text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise OSError(f"it has more than {MAX_BYTES >> 30} GiB")
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}); download it again") from None


def read_json(path: Path, kind: type = list) -> Any:
    """The JSON value in a file.  InputError if it is not of type `kind`."""
    try:
        value = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path} is no JSON ({error}); download it again") from None
    if not isinstance(value, kind):
        raise InputError(f"{path} holds a JSON {type(value).__name__}, and a {kind.__name__} is needed: another file?")
    return value


def read_lines(path: Path, *fields: str) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file, or of a JSON list.  InputError if one lacks one of the `fields`."""
    text = read_text(path)
    if text.lstrip().startswith("["):
        return checked(path, read_json(path), *fields)
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except (json.JSONDecodeError, RecursionError) as error:
            raise InputError(f"{path}, line {number} is no JSON ({error}); download it again") from None
    return checked(path, rows, *fields)


def checked(path: Path, rows: Sequence[Any], *fields: str) -> list[dict[str, Any]]:
    """Returns `rows`.  InputError if one is no object or lacks one of the `fields`."""
    for number, row in enumerate(rows, 1):
        missing = [field for field in fields if not isinstance(row, dict) or field not in row]
        if missing:
            raise InputError(f"{path}: entry {number} has no {missing[0]!r}; is it another file of that name?")
    return list(rows)


def read_table(path: Path) -> Iterator[dict[str, str]]:
    """The rows of a tab-separated table, as text."""
    csv.field_size_limit(MAX_BYTES)
    try:
        yield from csv.DictReader(io.StringIO(read_text(path), newline=""), delimiter="\t")
    except csv.Error as error:
        raise InputError(f"{path} is no table ({error}); download it again") from None


def video_file(folder: Path, stem: object) -> Path:
    """The video with that stem: the first existing file; if there is none, the first name that was tried."""
    names = [folder / f"{stem}{ending}" for ending in (*VIDEO_ENDINGS, *map(str.upper, VIDEO_ENDINGS))]
    return next((name for name in names if buckets.kind(name)), names[0])
