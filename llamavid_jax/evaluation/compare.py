"""Compares two results of one set: which questions changed, and whether the difference is more than chance."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llamavid_jax.errors import InputError
from llamavid_jax.evaluation.score import RESULT
from llamavid_jax.evaluation.store import gather
from llamavid_jax.files import find

RESAMPLES = 10_000
SEED = 0


def read_result(path: str | Path) -> dict[str, Any]:
    """The result in a run's folder, or in the given result file."""
    file = find(path)
    file = file / RESULT if file.is_dir() else file
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(result, dict) or not {"header", "figures", "items", "media"} <= set(result):
            raise ValueError("it is no result of an evaluation")
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read ({error}); score the answers first: llamavid-evaluate score") from None
    return result


def bootstrap(differences: np.ndarray, clusters: np.ndarray) -> tuple[float, float, float]:
    """Paired bootstrap of a mean difference over whole clusters: its 95 % interval, and the two-sided p.

    p is at least 2 · 0.5^clusters, the chance that all clusters differ the same way: with few clusters, resampling
    alone would give a p that is too small.
    """
    names, places = np.unique(clusters, return_inverse=True)
    sums = np.bincount(places, differences, len(names))
    sizes = np.bincount(places, minlength=len(names)).astype(float)
    generator, means = np.random.default_rng(SEED), np.empty(RESAMPLES)
    for number in range(RESAMPLES):
        drawn = generator.integers(0, len(names), len(names))
        means[number] = sums[drawn].sum() / sizes[drawn].sum()
    low, high = np.quantile(means, [0.025, 0.975])
    tail = min((means <= 0).mean(), (means >= 0).mean())
    return float(low), float(high), float(min(1.0, 2 * max(tail, 1 / RESAMPLES, 0.5 ** len(names))))


def compare(a: str | Path, b: str | Path) -> tuple[str, dict[str, Any]]:
    """The comparison as text, and as values for JSON."""
    one, two = read_result(a), read_result(b)
    if one["header"]["set"] != two["header"]["set"]:
        raise InputError(f"{a} is of {one['header']['set']} and {b} of {two['header']['set']}; compare one set")
    common = [name for name in one["items"] if name in two["items"]]
    if not common:
        raise InputError(f"{a} and {b} have no question in common that both scored; compare runs of the same questions")
    values = np.array([[one["items"][name], two["items"][name]] for name in common], float)
    differences = values[:, 1] - values[:, 0]
    clusters = np.array([one["media"].get(name) or name for name in common])
    low, high, p = bootstrap(differences, clusters)
    changed = [name for name, difference in zip(common, differences, strict=True) if difference != 0]
    outcome = {
        "questions": len(common),
        "first": float(values[:, 0].mean()),
        "second": float(values[:, 1].mean()),
        "difference": float(differences.mean()),
        "interval": [low, high],
        "p": p,
        "differing settings": differing(one, two),
        "better": [name for name, d in zip(common, differences, strict=True) if d > 0],
        "worse": [name for name, d in zip(common, differences, strict=True) if d < 0],
    }
    lost = len(one["items"].keys() ^ two["items"].keys())
    texts = [_texts(find(path)) for path in (a, b)]
    lines = [
        f"{len(common)} questions: {values[:, 0].mean():.4f} and {values[:, 1].mean():.4f}, difference "
        f"{differences.mean():+.4f}, 95 % interval {low:+.4f} to {high:+.4f}, p = {p:.2g}",
        *([f"{lost} questions that one of them alone scored are left out"] if lost else []),
        "the difference is " + ("more than chance" if p < 0.05 else "within what chance makes"),
        f"{len(outcome['better'])} became better, {len(outcome['worse'])} worse",
        *(f"differs: {name}: {x!r}, {y!r}" for name, (x, y) in outcome["differing settings"].items()),
    ]
    for name in changed[:50]:
        shown = [repr(text[name]) if name in text else "" for text in texts]
        lines.append(f"  {name}: {one['items'][name]:g} → {two['items'][name]:g}  {shown[0]} → {shown[1]}")
    lines += [f"  and {len(changed) - 50} more; --json has all"] if len(changed) > 50 else []
    return "\n".join(lines), outcome


def differing(one: Mapping[str, Any], two: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The entries of headers and scoring that differ: name → both values."""
    flat = [_flat({**result["header"], "scored": result["scored"]}) for result in (one, two)]
    ignored = ("scored.judge counts", "started")
    names = [name for name in dict.fromkeys([*flat[0], *flat[1]]) if not name.startswith(ignored)]
    return {name: (flat[0].get(name), flat[1].get(name)) for name in names if flat[0].get(name) != flat[1].get(name)}


def _flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{above}{name}.") if isinstance(value, Mapping) else {above + name: value}
    return flat


def _texts(path: Path) -> dict[str, str]:
    """The answers by id, if they are in the result's folder."""
    try:
        return {row["id"]: row["text"] for row in gather(path if path.is_dir() else path.parent)[1]}
    except InputError:
        return {}
