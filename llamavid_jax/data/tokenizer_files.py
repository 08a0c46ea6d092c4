"""The files that a tokenizer consists of: read into memory with it, written elsewhere whole or not at all."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llamavid_jax.data.conversation import ConversationError


def read_files(directory: str | Path, required: str, optional: tuple[str, ...], remedy: str) -> dict[str, bytes]:
    """Name -> content.  Raises ConversationError, which ends in `remedy`, where `required` is missing."""
    files = {}
    for name in (required, *optional):
        path = Path(directory) / name
        try:
            files[name] = path.read_bytes()
        except FileNotFoundError:
            if name == required:
                raise ConversationError(f"{path} does not exist; {remedy}") from None
        except OSError as error:
            raise ConversationError(f"{path} cannot be read ({error.strerror}); {remedy}") from None
    return files


def json_object(files: Mapping[str, bytes], name: str, directory: str | Path) -> dict[str, Any]:
    """The JSON object in one of the files, {} where that file is absent."""
    try:
        value = json.loads(files.get(name, b"{}"))
    except ValueError as error:
        raise ConversationError(f"{Path(directory) / name} is not readable JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConversationError(f"{Path(directory) / name} holds a JSON {type(value).__name__}; an object is needed")
    return value


def write_files(directory: str | Path, files: Mapping[str, bytes]) -> None:
    """Each file is written aside and renamed, so that a reader never meets half of one."""
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        with tempfile.NamedTemporaryFile(dir=folder, prefix=name, suffix=".tmp", delete=False) as file:
            file.write(content)
        os.chmod(file.name, 0o644)
        os.replace(file.name, folder / name)
