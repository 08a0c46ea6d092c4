"""Finds the mesh, rematerialisation and accumulation for a run on a slice: by formula first, the best by compiling.

    memory     parameters, gradients and Adam's moments, exactly; activations that LLaMA's layers keep
    time       the roofline of `roofline.py` over FLOPs, recomputed ones, and the collectives that a mesh needs

The formula leaves out other uses of memory, so it rules out only what cannot fit.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np

from llamavid_jax.config.parts import LlamaConfig
from llamavid_jax.models.flops import flops_done_again
from llamavid_jax.models.stack import REMAT
from llamavid_jax.parallel.mesh import DATA, FSDP, MESH_AXES, SEQUENCE, TENSOR, describe, make_mesh, shards
from llamavid_jax.parallel.sharding import partition_spec
from llamavid_jax.precompile.report import Report
from llamavid_jax.precompile.roofline import estimate
from llamavid_jax.precompile.topology import CompileError, chip_of, in_own_process, slice_devices
from llamavid_jax.precompile.train import check_training, largest, step_flops
from llamavid_jax.shapes import RowShape
from llamavid_jax.training.config import TrainConfig
from llamavid_jax.training.forecast import kept_bytes
from llamavid_jax.training.layout import Layout, lay_out
from llamavid_jax.weights import inventory

LONG = 8192  # rows of at least so many tokens may be cut over `sequence`
LANES = 128  # the parts of a cut row are multiples of it


class Try(NamedTuple):
    """One set of choices, with lower bounds by formula: the GiB that it needs and the seconds of a step."""

    mesh: dict[str, int]
    remat: str
    micro_batches: int
    gib: float
    seconds: float

    def overrides(self, config: TrainConfig) -> TrainConfig:
        loop = dataclasses.replace(config.training, remat=self.remat, micro_batches=self.micro_batches, device_rows=0)
        return dataclasses.replace(config, training=loop, mesh=self.text)

    @property
    def text(self) -> str:
        return describe(self.mesh) or f"{FSDP}=1"


def plan(
    config: TrainConfig, topology: str, num_slices: int = 1, features: bool = False, name: str = "", compiles: int = 4
) -> list[Report]:
    """Reports of the `compiles` most promising choices, the fastest that fits first.

    Raises CompileError with the remedy if none can fit.
    """
    layout, devices = in_own_process(_layout, config, topology, num_slices)
    tries = rank(config, layout, topology, devices, num_slices, features)
    chip, shape = chip_of(topology), largest(config.data.shapes)
    fitting = [one for one in tries if one.gib <= chip.hbm_gib]
    if not fitting:
        least = min(tries, key=lambda one: one.gib)
        raise CompileError(
            f"{least.gib:.1f} GiB needed at least, {chip.hbm_gib:g} GiB available, with mesh={least.text} and "
            f"training.remat={least.remat} on {topology}: "
            f"try {'shorter rows, ' if shape.tokens >= LONG else ''}a larger slice, or a generation with more memory"
        )
    reports = [
        in_own_process(check_training, one.overrides(config), topology, one.text, num_slices, features, name, False)
        for one in fitting[:compiles]
    ]
    return sorted(reports, key=lambda report: (not report.fits, report.seconds))


def _layout(config: TrainConfig, topology: str, num_slices: int) -> tuple[Layout, int]:
    """The run's parameters, laid out on one device, and the number of devices in the slices."""
    devices = slice_devices(topology, num_slices)
    layout = lay_out(config, make_mesh(jax.devices()[:1]))
    shapes = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in layout.trained.items()}
    frozen = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in layout.frozen.items()}
    return dataclasses.replace(layout, structure=None, trained=shapes, frozen=frozen), len(devices)


def rank(
    config: TrainConfig, layout: Layout, topology: str, devices: int, num_slices: int = 1, features: bool = False
) -> list[Try]:
    """Every choice, those that fit first, then by seconds; each with the least accumulation that fits."""
    chip, shape, batch = chip_of(topology), largest(config.data.shapes), config.training.batch_size
    tries = []
    for mesh in meshes(layout.config.text_config, shape, devices, num_slices):
        batch_shards = shards(mesh, "batch")
        micro_batches = [
            number for number in range(1, batch + 1) if batch % number == 0 and batch // number % batch_shards == 0
        ]
        for remat in REMAT:
            found = [_try(config, layout, topology, mesh, remat, number, features) for number in micro_batches]
            tries += next(([one] for one in found if one.gib <= chip.hbm_gib), found[-1:])
    if not tries:
        raise CompileError(
            f"training.batch_size is {batch}, which no mesh of {devices} devices divides; use a multiple of {devices}, "
            "or longer rows that can be cut over sequence"
        )
    return sorted(tries, key=lambda one: (one.gib > chip.hbm_gib, one.seconds))


def meshes(text: LlamaConfig, shape: RowShape, devices: int, num_slices: int) -> Iterator[dict[str, int]]:
    """All meshes of the slices: `tensor` divides the heads, `sequence` divides long rows, slices are on `data`."""
    inner = devices // num_slices
    for tensor in (
        size for size in range(1, min(inner, 16) + 1) if math.gcd(inner, text.num_key_value_heads) % size == 0
    ):
        for sequence in (size for size in range(1, inner // tensor + 1) if inner // tensor % size == 0):
            if sequence == 1 or (shape.tokens >= LONG and shape.tokens % (sequence * LANES) == 0):
                used = {DATA: num_slices, FSDP: inner // tensor // sequence, TENSOR: tensor, SEQUENCE: sequence}
                yield dict.fromkeys(MESH_AXES, 1) | used


def _try(
    config: TrainConfig,
    layout: Layout,
    topology: str,
    mesh: dict[str, int],
    remat: str,
    micro_batches: int,
    features: bool,
) -> Try:
    shape, text = largest(config.data.shapes), layout.config.text_config
    rows = config.training.batch_size // micro_batches // shards(mesh, "batch")
    tokens = rows * shape.tokens // shards(mesh, "sequence")  # on a device at a time
    state, gathered = _parameters(layout, mesh)
    run = Try(mesh, remat, micro_batches, 0.0, 0.0).overrides(config)
    best = estimate(
        chip_of(topology),
        flops=step_flops(run, layout, shape, features) / math.prod(mesh.values()),
        recomputed=flops_done_again(text, remat, config.training.batch_size, shape.tokens) / math.prod(mesh.values()),
        hbm_bytes=0,
        ici_bytes=micro_batches * (gathered + _exchanged(text, mesh, rows, shape.tokens)),
    )
    return Try(mesh, remat, micro_batches, (state + kept_bytes(text, mesh, tokens, remat)) / 2**30, best.seconds)


def _parameters(layout: Layout, mesh: dict[str, int]) -> tuple[float, float]:
    """Bytes that a device holds of state and gradients, and bytes that it receives of parameters and gradients."""
    cut = jax.sharding.AbstractMesh(tuple(mesh.values()), tuple(mesh))
    leaves = layout.trained | layout.frozen
    axes = inventory.axes(layout.config, {path: leaf.shape for path, leaf in leaves.items()})
    held = received = 0.0
    for path, leaf in leaves.items():
        spec = partition_spec(leaf.shape, axes[path], cut)
        axes_used = {axis for part in spec if part for axis in np.atleast_1d(part)}
        parts, tensor = math.prod(mesh[axis] for axis in axes_used), mesh[TENSOR] if TENSOR in axes_used else 1
        trains = path in layout.trained
        held += leaf.size / parts * (16 if trains else leaf.dtype.itemsize)  # itself, gradient, two moments
        gathered = leaf.size * (1 - tensor / parts) / tensor  # what this device computes with and others hold
        received += gathered * (2 * 2 + 4 * trains)  # forwards and backwards in 16 bits, the gradient in 32
    return held, received


def _exchanged(text: LlamaConfig, mesh: dict[str, int], rows: int, row_tokens: int) -> float:
    """Bytes that a device receives in a micro-batch for `tensor` (4 sums a layer) and `sequence` (keys and values)."""
    tensor, sequence = mesh[TENSOR], mesh[SEQUENCE]
    sums = 4.0 * 2 * (tensor - 1) / tensor * rows * row_tokens / sequence * text.hidden_size
    memory = 3 * (sequence - 1) / sequence * rows * row_tokens * 2 * text.num_key_value_heads / tensor * text.head_dim
    return 2.0 * text.num_hidden_layers * (sums + memory)
