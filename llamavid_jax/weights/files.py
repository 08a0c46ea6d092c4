"""Rows as weights of PyTorch's files: one weight of a file ↔ one layer of one parameter.

A row's einops pattern converts from the file's layout to ours and, with its sides swapped, back again.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping

import numpy as np
from einops import rearrange

from llamavid_jax.config.schema import LLaMAVIDLlavaConfig
from llamavid_jax.errors import CheckpointError
from llamavid_jax.weights import inventory
from llamavid_jax.weights.row import W

EMPTY = "is empty: DeepSpeed's ZeRO-3 saved it without gathering its parts; make it whole with zero_to_fp32.py"


@dataclasses.dataclass(frozen=True)
class Weight:
    """One weight of a PyTorch file, and where it goes.

    `third` is 0 or 2 where the file fuses three vectors (`qkv.bias`), `index` the layer of a stacked parameter, `shape`
    the shape in the file, `layer_shape` that of the layer or of the whole parameter here.
    """

    name: str
    third: int | None
    path: str
    index: int | None
    pattern: str
    shape: tuple[int, ...]
    layer_shape: tuple[int, ...]


def weight_table(config: LLaMAVIDLlavaConfig, layout: str) -> list[Weight]:
    """Every weight of a file in `layout` ("original" or "documented")."""
    frequency = config.qformer_config.cross_attention_frequency
    return expand(inventory.rows(config), layout, inventory.axis_sizes(config), frequency)


def expand(rows: Iterable[W], layout: str, sizes: Mapping[str, int], cross_frequency: int = 1) -> list[Weight]:
    """One Weight for each row, or for each layer of a row that is stacked."""
    found = []
    for row in rows:
        template = row.documented if layout == "documented" else row.name
        name, third = (template[:-3], int(template[-2])) if template.endswith("]") else (template, None)
        step = cross_frequency if "{c}" in name else 1
        layer_shape = tuple(sizes[axis] for axis in row.layer_axes)
        pattern = f"{row.torch} -> {' '.join(row.layer_axes)}"
        shape = torch_shape(pattern, layer_shape)
        shape = (3 * shape[0],) if third is not None else shape
        for index in range(sizes[row.axes.split()[0]]) if row.stacked else (None,):
            layer = {} if index is None else {"l": index, "c": index * step}
            found.append(Weight(name.format(**layer), third, row.path, index, pattern, shape, layer_shape))
    return found


def torch_shape(pattern: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in the file of a parameter of `shape`: `("(n h) d -> d n h", (6, 2, 3))` gives `(6, 6)`."""
    left, _ = pattern.split(" -> ")
    sizes = axis_sizes(pattern, shape)
    groups = re.findall(r"\(([^)]*)\)|(\w+)", left)
    return tuple(math.prod(sizes.get(axis, 1) for axis in (group or single).split()) for group, single in groups)


def axis_sizes(pattern: str, shape: tuple[int, ...]) -> dict[str, int]:
    """Axis → size, read off our side of the pattern, which names every axis separately."""
    _, right = pattern.split(" -> ")
    return dict(zip(right.split(), shape, strict=True))


def to_jax(value: np.ndarray, weight: Weight) -> np.ndarray:
    """A file's weight in our layout, one layer of it.  The value may be a view."""
    if weight.third is not None:
        value = value.reshape(3, -1)
        if np.any(value[1] != 0):
            raise CheckpointError(
                f"{weight.name} has a key bias that is not zero; EVA ViT has none, so this is another model"
            )
        value = value[weight.third]
    return rearrange(value, weight.pattern, **axis_sizes(weight.pattern, weight.layer_shape))


def to_torch(value: np.ndarray, pattern: str) -> np.ndarray:
    """One layer of a parameter in the file's layout (a third of a fused vector stays separate)."""
    left, right = pattern.split(" -> ")
    return rearrange(value, f"{right} -> {left}")
