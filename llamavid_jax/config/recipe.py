"""YAML files that override fields of another: `base: FILE`, in the same folder, is read first (one level)."""

import collections
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from llamavid_jax.errors import ConfigError
from llamavid_jax.files import find, read_bytes

MAX_BYTES = 1 << 18  # of a file; the longest recipe has some 3,000


class _TreeLoader(yaml.SafeLoader):
    """YAML without aliases, which let a few lines expand a billionfold, and without duplicate keys.

    Of duplicates, YAML would silently drop the first.
    """

    def compose_node(self, parent: Any, index: Any) -> yaml.Node:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"*{self.peek_event().anchor} is an alias; write out what it stands for")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = collections.Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for key, count in keys.most_common(1):
            if count > 1:
                raise yaml.YAMLError(f"{key!r} stands there twice; write it once")
        return super().construct_mapping(node, deep)


def load_yaml(text: str) -> Any:
    """Numbers, texts, lists and mappings.  Raises yaml.YAMLError, also where they are nested too deeply."""
    try:
        return yaml.load(text, _TreeLoader)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None


def read_recipe(path: str | Path, whole: Collection[str] = (), home: str = "configs/") -> dict[str, Any]:
    """The file's fields over those of its base: sections field by field, those named in `whole` as a whole.

    Raises ConfigError for a file that cannot be read, and for a base that has a base itself.
    """
    values = _read(Path(path), home)
    if "base" not in values:
        return values
    name = values.pop("base")
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{path}: base is {name!r}; give the name of a file beside it")
    base = _read(Path(path).parent / name, home)
    if "base" in base:
        raise ConfigError(f"{path}: its base, {name}, has a base itself ({base['base']}); name that one, or none")
    for field, value in values.items():
        sections = isinstance(value, dict) and isinstance(base.get(field), dict) and field not in whole
        base[field] = base[field] | value if sections else value
    return base


def _read(path: Path, home: str) -> dict[str, Any]:
    file = find(path)
    try:
        values = load_yaml(read_bytes(file, MAX_BYTES).decode("utf-8")) or {}
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; such files are in {home}") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder; give a file, such as one of {home}") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: no mapping of fields")
    return values
