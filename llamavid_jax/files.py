"""Small files, written completely or not at all; and the files that come with the package, wherever it stands."""

import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from llamavid_jax.errors import CheckpointError, InputError

PACKAGE = Path(__file__).parent
SUMS = "SHA256SUMS"  # as `sha256sum -c` reads it
BROUGHT = PACKAGE if (PACKAGE / "configs").is_dir() else PACKAGE.parent  # as installed; in a clone


def find(path: str | Path) -> Path:
    """`path`; where nothing is there and it begins with `configs/` or `demo/`, the package's own of that name."""
    path = Path(path)
    if path.parts[:1] in (("configs",), ("demo",)) and not os.path.exists(path) and (BROUGHT / path).exists():
        return BROUGHT / path
    return path


def write_files(directory: str | Path, files: Mapping[str, bytes]) -> None:
    """Each file is written aside and renamed, so that a reader never meets half of one.  InputError if it cannot be."""
    folder = Path(directory)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as aside:
            for name, content in files.items():
                Path(aside, name).write_bytes(content)
                os.replace(Path(aside, name), folder / name)
    except OSError as error:
        raise InputError(f"{folder} cannot be written to ({error.strerror}); give a folder that can") from None


def with_sums(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The same files, and their SHA-256 sums in one more."""
    lines = (f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in files.items())
    return {**files, SUMS: "".join(lines).encode()}


def check_sums(folder: Path) -> None:
    """Raises CheckpointError where a file in `folder` is not what SHA256SUMS there says; silent where it says none."""
    if not (folder / SUMS).is_file():
        return
    for line in (folder / SUMS).read_text(encoding="utf-8", errors="replace").splitlines():
        wanted, _, name = line.partition(" ")
        file = folder / name.lstrip(" *")
        if file.parent != folder or not file.is_file():
            continue
        with file.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != wanted:
                raise CheckpointError(
                    f"{file} is damaged: its SHA-256 is not that in {SUMS}; copy the folder again, or remove {SUMS} if "
                    "you changed the file"
                )
