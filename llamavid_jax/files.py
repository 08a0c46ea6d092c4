"""Small files, written whole or not at all."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from llamavid_jax.errors import InputError


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
