"""Which parameters train: a table of patterns over parameter paths, `{"visual_tokens.*": true, "llama.*": false}`.

Strict both ways: a parameter matches exactly one pattern, a pattern at least one parameter.  The stages of the paper
are three such tables.
"""

import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any

from llamavid_jax.errors import ConfigError


def matches(paths: Iterable[str], patterns: Mapping[str, Any], name: str) -> dict[str, Any]:
    """`{path: the value of its pattern}`; `*` in a pattern stands for anything, dots included.

    Raises ConfigError for a path with no pattern or with several, and for a pattern without a path.
    """
    found, unused = {}, set(patterns)
    for path in paths:
        own = [pattern for pattern in patterns if fnmatch.fnmatchcase(path, pattern)]
        if len(own) != 1:
            several = f"matches {' and '.join(own)}" if own else "matches no pattern"
            raise ConfigError(f"{name}: parameter {path} {several}; it must match exactly one")
        unused.discard(own[0])
        found[path] = patterns[own[0]]
    if unused:
        raise ConfigError(f"{name}: the pattern {min(unused)!r} matches no parameter; remove it")
    return found


def trainable_paths(paths: Iterable[str], patterns: Mapping[str, Any]) -> frozenset[str]:
    """The paths that train."""
    wrong = [pattern for pattern, value in patterns.items() if type(value) is not bool]
    if wrong:
        raise ConfigError(f"trainable: {wrong[0]!r} has {patterns[wrong[0]]!r}; use true or false")
    chosen = frozenset(path for path, value in matches(paths, patterns, "trainable").items() if value)
    if not chosen:
        raise ConfigError("trainable: no parameter trains; set at least one pattern to true")
    return chosen
