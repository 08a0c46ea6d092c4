"""The files of a tokenizer, read into memory with it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llamavid_jax.files import find, parse_object, read_bytes
from llamavid_jax.text.conversation import ConversationError


def read_files(directory: str | Path, required: str, optional: tuple[str, ...], remedy: str) -> dict[str, bytes]:
    """Name -> content.  Raises ConversationError, which ends in `remedy`, where `required` is missing."""
    files = {}
    for name in (required, *optional):
        path = find(Path(directory) / name)
        try:
            files[name] = read_bytes(path)
        except FileNotFoundError:
            if name == required:
                raise ConversationError(f"{path} does not exist; {remedy}") from None
        except OSError as error:
            raise ConversationError(f"{path} cannot be read ({error.strerror}); {remedy}") from None
    return files


def json_object(files: Mapping[str, bytes], name: str, directory: str | Path) -> dict[str, Any]:
    """The JSON object in one of the files, {} where that file is absent."""
    try:
        return parse_object(files.get(name, b"{}"))
    except ValueError as error:
        raise ConversationError(f"{Path(directory) / name} is not readable JSON: {error}") from None


def flag(config: Mapping[str, Any], name: str, default: bool, path: Path) -> bool:
    """True or false under `name` of the file `path`; null is false."""
    value = config.get(name, default)
    if value is not None and type(value) is not bool:
        raise ConversationError(f"{path}: {name} is {value!r}; use true or false")
    return bool(value)


def max_length(config: Mapping[str, Any], path: Path) -> int:
    """`model_max_length` of the file `path`, in tokens; 10**30 stands for no limit, as in transformers."""
    value = config.get("model_max_length") or 10**30
    if type(value) not in (int, float) or not 1 <= value <= 1e31:
        raise ConversationError(f"{path}: model_max_length is {value!r}; use a whole number of tokens")
    return int(value)
