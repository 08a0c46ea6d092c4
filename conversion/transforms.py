"""What the tables mean: one weight of a file ↔ one layer of one parameter.

A row's einops pattern turns the torch layout into ours; with its sides swapped, back again.  Parameters of all layers
are stacked on axis 0, so a row with `{l}` or `{c}` stands for as many weights as that axis is long.
"""

import dataclasses
import math
import re
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from llamavid_jax.errors import CheckpointError


class Row(NamedTuple):
    """`original` and `documented` are names in the two PyTorch layouts; `path` is ours; `pattern` leads from them to
    us."""

    original: str
    path: str
    pattern: str
    documented: str


@dataclasses.dataclass(frozen=True)
class Weight:
    """One weight of a PyTorch file, and where it goes.

    `third` is 0 or 2 where the file fuses three vectors (`qkv.bias`), `index` the layer of a stacked parameter, `shape`
    the shape in the file.
    """

    name: str
    third: int | None
    path: str
    index: int | None
    pattern: str
    shape: tuple[int, ...]


def weights(
    rows: Iterable[Row], layout: str, shapes: dict[str, tuple[int, ...]], cross_attention_frequency: int
) -> list[Weight]:
    """Every weight of a file in `layout` ("original" or "documented") for parameters of these `shapes` (path → shape).

    Raises KeyError if rows and parameters are not one to one: that is a mistake in the tables, not in a checkpoint.
    """
    rows = list(rows)
    paths = [row.path for row in rows]
    if sorted(paths) != sorted(shapes):
        raise KeyError(f"rows without parameter or parameters without row: {sorted(set(paths) ^ set(shapes))}")
    found = []
    for row in rows:
        template = getattr(row, layout)
        name, third = (template[:-3], int(template[-2])) if template.endswith("]") else (template, None)
        step = cross_attention_frequency if "{c}" in name else 1
        stacked = "{" in name
        shape = torch_shape(row.pattern, shapes[row.path][1:] if stacked else shapes[row.path])
        shape = (3 * shape[0],) if third is not None else shape
        for index in range(shapes[row.path][0]) if stacked else (None,):
            layer = {} if index is None else {"l": index, "c": index * step}
            found.append(Weight(name.format(**layer), third, row.path, index, row.pattern, shape))
    return found


def torch_shape(pattern: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The file's shape of a parameter of `shape`: `("(n h) d -> d n h", (6, 2, 3))` gives `(6, 6)`."""
    left, _ = pattern.split(" -> ")
    sizes = axis_sizes(pattern, shape)
    groups = re.findall(r"\(([^)]*)\)|(\w+)", left)
    return tuple(math.prod(sizes.get(axis, 1) for axis in (group or single).split()) for group, single in groups)


def axis_sizes(pattern: str, shape: tuple[int, ...]) -> dict[str, int]:
    """Letter → size, read off our side of the pattern, which names every axis alone."""
    _, right = pattern.split(" -> ")
    return dict(zip(right.split(), shape, strict=True))


def to_jax(value: np.ndarray, weight: Weight, shape: tuple[int, ...]) -> np.ndarray:
    """A file's weight in our layout; `shape` is one layer's. The value may be a view."""
    if weight.third is not None:
        value = value.reshape(3, -1)
        if np.any(value[1] != 0):
            raise CheckpointError(
                f"{weight.name} has a key bias that is not zero; EVA ViT has none, so this is another model"
            )
        value = value[weight.third]
    return rearrange(value, weight.pattern, **axis_sizes(weight.pattern, shape))


def to_torch(value: np.ndarray, pattern: str) -> np.ndarray:
    """One layer of a parameter in the file's layout (a fused vector's third as it is)."""
    left, right = pattern.split(" -> ")
    return rearrange(value, f"{right} -> {left}")


def resize_positions(table: np.ndarray, side: int) -> np.ndarray:
    """Position table [1+p*p, E] for another image size: [1+side*side, E], the CLS row kept.

    torch's bicubic without antialiasing and without aligned corners, in float32, as the original does at load time.
    """
    old = math.isqrt(len(table) - 1)
    if old * old != len(table) - 1:
        raise CheckpointError(f"the position table has {len(table)} rows; one CLS row and a square number are needed")
    grid = jnp.asarray(table[1:], jnp.float32).reshape(old, old, -1)
    grid = jax.image.resize(grid, (side, side, grid.shape[-1]), "bicubic-pytorch", antialias=False)
    return np.concatenate([table[:1], np.asarray(grid).reshape(side * side, -1).astype(table.dtype)])
