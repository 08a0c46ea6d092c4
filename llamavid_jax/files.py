"""Small files, written completely or not at all; and the files that come with the package, wherever it stands."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from llamavid_jax.errors import InputError

PACKAGE = Path(__file__).parent
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
