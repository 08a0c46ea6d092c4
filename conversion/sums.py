"""SHA-256 checksums of the files that were read, as `sha256sum` writes and checks them.

safetensors, GGUF and torch's older files contain no checksums: nothing else detects a damaged number in them.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from llamavid_jax.errors import CheckpointError
from llamavid_jax.files import read_bytes


def sha256_sums(files: Iterable[Path]) -> dict[Path, str]:
    found = {}
    for file in files:
        with file.open("rb") as stream:
            found[file] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found


def verify(sums: Mapping[Path, str], listing: Path) -> None:
    """Raises CheckpointError unless `listing`, lines of `SUM  NAME`, states the sum of every file.

    It may omit JSON and text files, for which repositories of weights state no checksums.
    """
    try:
        lines = read_bytes(listing).decode("utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{listing} cannot be read ({error}); give the output of sha256sum") from None
    stated: dict[str, set[str]] = {}
    for line in filter(None, map(str.strip, lines)):
        match = re.fullmatch(r"([0-9a-fA-F]{64}) [ *]?(.+)", line)
        if match is None:
            raise CheckpointError(f"{listing} holds the line {line[:80]!r}; lines of SUM  NAME are needed")
        stated.setdefault(Path(match[2]).name, set()).add(match[1].lower())
    for file, found in sums.items():
        if file.name not in stated and file.suffix not in (".json", ".txt"):
            raise CheckpointError(f"{listing} has no line for {file.name}, which {file.parent} holds; add it")
        if found not in stated.get(file.name, {found}):
            raise CheckpointError(
                f"{file} has the SHA-256 {found}, but {listing} says {min(stated[file.name])}; download it again"
            )
