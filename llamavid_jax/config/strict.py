"""Dataclasses read strictly from mappings: an unknown key, a wrong type or range is an error that names the field."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from llamavid_jax.errors import ConfigError

# above any model's: tables of this size are built before any file of weights is checked against them
LIMITS = {"num_hidden_layers": 1001, "image_size": 4097}


def strict(cls, values: Any, path: str):
    """Builds the dataclass `cls` from a mapping: unknown keys and wrong types are errors that name the field."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path.rstrip('.') or 'the configuration'} is {values!r}; a mapping of fields is needed")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    unknown = sorted(set(values) - set(fields), key=str)
    if unknown:
        raise ConfigError(f"unknown field {path}{unknown[0]}; the fields here are {', '.join(fields)}")
    arguments = {}
    for name, value in values.items():
        kind = fields[name].type
        if dataclasses.is_dataclass(kind):
            arguments[name] = strict(kind, value, f"{path}{name}.")
            continue
        value = float(value) if kind is float and type(value) is int and abs(value) < 2**31 else value
        value = tuple(value) if kind is tuple and isinstance(value, list) else value
        check_type(path + name, value, kind)
        arguments[name] = value
    return cls(**arguments)


def check_fields(
    config: Any, section: str = "", from_zero: Collection[str] = (), own_range: Collection[str] = ()
) -> None:
    """Every field has its declared type, and numbers are above 0 and below 2**31, or their LIMITS.

    Those named in `from_zero` may be 0; `own_range` names those whose range the class itself checks.
    """
    for field in dataclasses.fields(config):
        name, value = section + field.name, getattr(config, field.name)
        check_type(name, value, field.type)
        if field.type not in (int, float) or field.name in own_range:
            continue
        limit = LIMITS.get(field.name, 2**31)
        if not 0 <= value < limit or (value == 0 and field.name not in from_zero):
            least = "of 0 or more" if field.name in from_zero else "above 0"
            raise ConfigError(
                f"{name} is {value}; a number {least} and below {LIMITS.get(field.name, '2**31')} is needed"
            )


def check_type(name: str, value: Any, kind: type) -> None:
    if type(value) is not kind:
        raise ConfigError(f"{name} is {value!r}; a value of type {kind.__name__} is needed")


def require_divisible(section: str, name: str, value: int, by_name: str, by: int) -> None:
    if by < 1 or value < 1 or value % by:
        raise ConfigError(f"{section}.{name} is {value}, which is not a positive multiple of {by_name} = {by}")


def require_one_of(name: str, value: str, known: Collection[str]) -> None:
    if value not in known:
        *others, last = [repr(one) for one in known]
        raise ConfigError(f"{name} is {value!r}; use {', '.join(others)} or {last}")
