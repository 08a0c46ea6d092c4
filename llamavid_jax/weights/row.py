"""What a row of the inventory says, and what follows from it: one weight here ↔ the weights of a PyTorch file.

    W("llama.layers.attn.q.kernel", "layers embed heads head_dim",
      torch="(heads head_dim) embed", name="model.layers.{l}.self_attn.q_proj.weight")

The parameters of all layers are stacked along their first axis: a row with `{l}` stands for as many weights of a file
as that axis is long, and `torch` is the layout of one.  Both layouts are einops patterns.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from einops import rearrange

BLOCK = 64  # inputs of a quantised kernel that share a scale
PEFT_PREFIX = "base_model.model."  # before every name of the model that PEFT wraps


class Parameter(NamedTuple):
    """A parameter of one model: its axes' names (None within a block), its shape, and its type where it has its own."""

    axes: tuple[str | None, ...]
    shape: tuple[int, ...]
    dtype: str = ""

    @property
    def stacked(self) -> bool:
        """Whether the first axis counts layers."""
        return str(self.axes[0]).endswith("layers")


class W(NamedTuple):
    """`name` and `documented` are its names in the original's files and in the documented layout's.

    A documented name may end in `[0]` or `[2]`: the first or the last third of a vector that the file fuses.  `{l}`
    counts the file's layers in steps of `every`.
    """

    path: str
    axes: str
    torch: str
    name: str
    documented: str = ""
    every: int = 1

    @property
    def stacked(self) -> bool:
        return "{l}" in self.name

    @property
    def pattern(self) -> str:
        """Leads from one weight of a file to one layer of ours."""
        return f"{self.torch} -> {' '.join(self.axes.split()[self.stacked :])}"

    @property
    def sides(self) -> list[str]:
        """The outputs and the inputs of a kernel, as torch keeps them: `["(heads head_dim)", "embed"]`."""
        return re.findall(r"\([^)]*\)|\w+", self.torch)

    @property
    def inputs(self) -> int:
        """How many axes of one layer's kernel are summed over."""
        return len(self.sides[1].strip("()").split())

    def parameter(self, sizes: Mapping[str, int]) -> Parameter:
        names = tuple(self.axes.split())
        return Parameter(names, tuple(sizes[name] for name in names))

    @property
    def block_axes(self) -> tuple[str | None, ...]:
        """The axes of a quantised kernel: its last input axis counts blocks, and None goes through one."""
        names, cut = tuple(self.axes.split()), self.inputs + 1
        return (*names[:cut], None, *names[cut:])

    def in_blocks(self, sizes: Mapping[str, int], dtype: str) -> dict[str, Parameter]:
        """A quantised kernel's integers and scales: `[L, D, M]` → `[L, D/64, 64, M]` and `[L, D/64, 1, M]`."""
        shape, last = self.parameter(sizes).shape, self.inputs
        block = math.gcd(BLOCK, shape[last])
        before, after = (*shape[:last], shape[last] // block), shape[last + 1 :]
        return {
            f"{self.path}.qvalue": Parameter(self.block_axes, (*before, block, *after), dtype),
            f"{self.path}.scale": Parameter(self.block_axes, (*before, 1, *after)),
        }

    def low_rank(self) -> tuple["W", "W"]:
        """A kernel's LoRA update: A from the inputs to the rank and B from there to the outputs, under PEFT's names."""
        outputs, inputs = self.sides
        path, name = self.path.removesuffix("kernel") + "lora", PEFT_PREFIX + self.name.removesuffix(".weight")
        return (
            W(f"{path}.a", f"layers {inputs.strip('()')} rank", f"rank {inputs}", f"{name}.lora_A.weight"),
            W(f"{path}.b", f"layers rank {outputs.strip('()')}", f"{outputs} rank", f"{name}.lora_B.weight"),
        )

    def weights(self, sizes: Mapping[str, int], layout: str = "original") -> list["TorchWeight"]:
        """The weights of a file in `layout` ("original" or "documented") that the parameter holds."""
        template = self.documented if layout == "documented" else self.name
        name, third = (template[:-3], int(template[-2])) if template.endswith("]") else (template, None)
        ours = self.parameter(sizes).shape[self.stacked :]
        theirs = tuple(math.prod(sizes.get(axis, 1) for axis in side.strip("()").split()) for side in self.sides)
        theirs = (3 * theirs[0],) if third is not None else theirs
        layers = range(sizes[self.axes.split()[0]]) if self.stacked else (None,)
        return [
            TorchWeight(
                name if layer is None else name.format(l=layer * self.every),
                third, self.path, layer, self.pattern, ours, theirs,
            )
            for layer in layers
        ]  # fmt: skip


def linear(
    path: str, layers: str, inputs: str, outputs: str, name: str, documented: str = "", every: int = 1
) -> tuple[W, W]:
    """Kernel and bias of a linear layer; `layers` is the axis of its stack, or nothing."""
    sides = [f"({side})" if " " in side else side for side in (outputs, inputs)]
    names = [(f"{name}.{part}", f"{documented or name}.{part}", every) for part in ("weight", "bias")]
    return (
        W(f"{path}.kernel", f"{layers} {inputs} {outputs}".strip(), " ".join(sides), *names[0]),
        W(f"{path}.bias", f"{layers} {outputs}".strip(), sides[0], *names[1]),
    )


def norm(path: str, layers: str, width: str, name: str, documented: str = "", every: int = 1) -> tuple[W, W]:
    """Scale and bias of a layer norm."""
    kernel, bias = linear(path, layers, "", width, name, documented, every)
    return kernel._replace(path=f"{path}.scale", axes=bias.axes, torch=width), bias


@dataclasses.dataclass(frozen=True)
class TorchWeight:
    """One weight of a PyTorch file, of `shape` there, and where it goes: `layer` of the parameter at `path`.

    `layer_shape` is its shape here, `third` as in `W.documented`.
    """

    name: str
    third: int | None
    path: str
    layer: int | None
    pattern: str
    layer_shape: tuple[int, ...]
    shape: tuple[int, ...]

    def to_jax(self, value: np.ndarray) -> np.ndarray:
        """The file's weight (of a fused vector its third) in our layout; it may be a view."""
        axes = self.pattern.split(" -> ")[1].split()
        return rearrange(value, self.pattern, **dict(zip(axes, self.layer_shape, strict=True)))

    def to_torch(self, value: np.ndarray) -> np.ndarray:
        """One layer of the parameter in the file's layout (of a fused vector its third)."""
        theirs, ours = self.pattern.split(" -> ")
        return rearrange(value, f"{ours} -> {theirs}")
