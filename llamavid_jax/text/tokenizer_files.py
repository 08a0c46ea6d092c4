"""The files of a tokenizer, kept in memory with it, and the tokens that a fine-tune added to its vocabulary."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llamavid_jax.files import find, parse_object, read_bytes
from llamavid_jax.text.conversation import ConversationError

SETTINGS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)  # optional files beside a tokenizer


@dataclasses.dataclass(frozen=True)
class AddedToken:
    """A token that is matched literally in the text, before the rest is tokenised.

    `lstrip` and `rstrip`: it absorbs the white space on that side; `single_word`: it does not match inside a word;
    `special`: it decodes to nothing.
    """

    content: str
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    special: bool = False


def read_files(directory: str | Path, required: str, optional: tuple[str, ...], remedy: str) -> dict[str, bytes]:
    """Name -> content.  Raises ConversationError, which ends in `remedy`, if `required` is missing."""
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
    """The JSON object in one of the files, {} if that file is absent."""
    try:
        return parse_object(files.get(name, b"{}"))
    except ValueError as error:
        raise ConversationError(f"{Path(directory) / name} is not readable JSON: {error}") from None


def added_tokens(files: Mapping[str, bytes], directory: str | Path) -> dict[int, AddedToken]:
    """Id -> token, from added_tokens.json and from the more detailed added_tokens_decoder in tokenizer_config.json."""
    config, names, plain = (json_object(files, name, directory) for name in SETTINGS)
    special = {_content(token) for key, token in (config | names).items() if key.endswith("_token")}
    for listed in ("additional_special_tokens", "extra_special_tokens"):
        value = names.get(listed) or config.get(listed) or ()
        special |= {_content(token) for token in (value.values() if isinstance(value, dict) else value)}
    detailed = config.get("added_tokens_decoder") or {}
    path = Path(directory) / SETTINGS[0 if detailed else 2]
    tokens = {}
    try:
        for content, number in plain.items():
            tokens[_token_id(number)] = AddedToken(content, special=content in special)
        for number, entry in detailed.items():
            flags = {field.name: entry.get(field.name, False) for field in dataclasses.fields(AddedToken)[1:]}
            tokens[_token_id(int(number))] = AddedToken(entry["content"], **flags)
        if not all(isinstance(token.content, str) and token.content for token in tokens.values()):
            raise ValueError
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ConversationError(
            f"the added tokens in {path} are not as transformers writes them; copy it again"
        ) from None
    if len({token.content for token in tokens.values()}) < len(tokens):
        raise ConversationError(f"{path} gives one added token two ids; copy the files of one tokenizer")
    return tokens


def _content(token: Any) -> Any:
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _token_id(number: Any) -> int:
    if type(number) is not int or not 0 <= number < 2**31:
        raise ValueError
    return number


def flag(config: Mapping[str, Any], name: str, default: bool, path: Path) -> bool:
    """The boolean `name` of `config`, which is the file `path`; null is False."""
    value = config.get(name, default)
    if value is not None and type(value) is not bool:
        raise ConversationError(f"{path}: {name} is {value!r}; use true or false")
    return bool(value)


def max_length(config: Mapping[str, Any], path: Path) -> int:
    """`model_max_length` of the file `path`, in tokens; 10**30 means no limit, as in transformers."""
    value = config.get("model_max_length") or 10**30
    if type(value) not in (int, float) or not 1 <= value <= 1e31:
        raise ConversationError(f"{path}: model_max_length is {value!r}; use a whole number of tokens")
    return int(value)
