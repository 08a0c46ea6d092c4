"""The memory that one question about a video takes on each device, by arithmetic: configuration, length → MemoryPlan.

    parameters of each part     in their type, cut over `tensor` as `parallel/sharding.py` cuts them
    visual tokens               of all frames
    key-value cache             of the prompt and of the answer, each in its bucket
    frames in flight            two chunks of pixels and features, and the largest arrays of one block of the tower
    prompt in flight            the largest arrays of one layer

Nothing is compiled, so the compiler's own copies are not counted; `infer.py --compile-only` asks the compiler.  For 7B
in bfloat16 and an hour of video the compiler reports 19.5 GiB for prefill on one v6e chip (JAX 0.10.2), and this plan
20.0 in total.
"""

import dataclasses
import math
import os
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Sharding

from llamavid_jax.checkpoints.weights import abstract_params, parse_dtype
from llamavid_jax.config.schema import LLaMAVIDLlavaConfig
from llamavid_jax.inference.encode import SMALLEST_TABLE
from llamavid_jax.inference.generate import SMALLEST_LENGTH
from llamavid_jax.models.flops import PARTS
from llamavid_jax.models.kv_cache import AXES
from llamavid_jax.parallel.chips import CHIPS
from llamavid_jax.parallel.mesh import MESH_AXES, TENSOR
from llamavid_jax.parallel.sharding import partition_spec
from llamavid_jax.precompile.topology import chip_of
from llamavid_jax.shapes import FRAME_CHUNK, bucket

TEXT_TOKENS = 128  # of the template and a question; visual tokens come on top
GIB = 2**30


class Item(NamedTuple):
    what: str
    kind: str  # the type of its numbers
    gib: float


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Memory of one device in GiB; `there_gib` is available.  `items` are not all in memory at the same time."""

    device: str
    devices: int
    there_gib: float
    items: Sequence[Item]

    @property
    def total_gib(self) -> float:
        return sum(item.gib for item in self.items)

    @property
    def fits(self) -> bool:
        return self.total_gib <= self.there_gib

    def __str__(self) -> str:
        """A line for each item, and the verdict."""
        rows = [*self.items, Item("together", "", self.total_gib)]
        lines = [f"{what:28}{kind:10}{_size(gib):>11}" for what, kind, gib in rows]
        verdict = "fits" if self.fits else "does NOT fit"
        return "\n".join([*lines, f"{verdict}: {_size(self.there_gib)} on each of {self.devices} × {self.device}"])


def plan_memory(
    config: LLaMAVIDLlavaConfig,
    frames: int,
    new_tokens: int,
    dtype: str = "bfloat16",
    *,
    quantize: str | None = None,
    topology: str | None = None,
) -> MemoryPlan:
    """The plan for a video of `frames` and an answer of `new_tokens`, with the model cut over `tensor`.

    `quantize` "int8" or "int4" is the type of the kernels of LLaMA's layers, in blocks that share a scale of `dtype`.
    `topology` is a slice such as "v5e:1x1"; None means all attached devices.  Raises CompileError for an invalid one.
    """
    config = config.quantized(quantize) if quantize else config
    name, devices, there = attached() if topology is None else _of_slice(topology)
    kind, vision, text = parse_dtype(dtype), config.vision_tower_config, config.text_config
    sizes = dict.fromkeys(MESH_AXES, 1) | {TENSOR: devices}
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))

    def gib(shape: tuple[int, ...], names: tuple[str | None, ...], of: jnp.dtype = kind) -> float:
        shards = math.prod(mesh.shape[axis] for axis in jax.tree.leaves(tuple(partition_spec(shape, names, mesh))))
        return math.prod(shape) * of.itemsize / shards / GIB

    weights = dict.fromkeys(PARTS, 0.0)
    for path, leaf in abstract_params(config, kind, mesh).items():
        weights[path.partition(".")[0]] += device_bytes(leaf, leaf.sharding) / GIB

    visual = frames * config.tokens_per_frame
    prompt = bucket(visual + TEXT_TOKENS, SMALLEST_LENGTH)
    cached = prompt + bucket(new_tokens, SMALLEST_LENGTH)
    cache = (2 * text.num_hidden_layers, 1, cached, text.num_key_value_heads, text.head_dim)

    chunk, seen, side = FRAME_CHUNK, 1 + vision.num_patches, vision.image_size
    in_flight = (
        gib((2 * chunk, 3, side, side), (None, None, None, None), jnp.dtype("float32"))
        + 2 * gib((chunk, seen, vision.hidden_size), ("frames", None, None))
        + gib((chunk, seen, vision.intermediate_size), ("frames", None, None))
        + gib((chunk, vision.num_attention_heads, seen, seen), ("frames", None, None, None), jnp.dtype("float32"))
    )
    layer = 2 * gib((prompt, text.intermediate_size), (None, "mlp")) + 4 * gib((prompt, text.hidden_size), (None, None))
    table = bucket(visual, SMALLEST_TABLE)
    items = [
        *(
            Item(f"parameters: {part}", quantize if quantize and part == "llama" else kind.name, size)
            for part, size in weights.items()
        ),
        Item(f"visual tokens: {visual}", kind.name, gib((table, text.hidden_size), (None, None))),
        Item(f"key-value cache: {cached}", kind.name, gib(cache, AXES)),
        Item(f"frames in flight: {chunk}", kind.name, in_flight),
        Item(f"prompt in flight: {prompt}", kind.name, layer),
    ]
    return MemoryPlan(name, devices, there, items)


def device_bytes(leaf: jax.ShapeDtypeStruct, sharding: Sharding) -> float:
    """Bytes of an array on one device; two int4 share a byte."""
    bits = 4 if leaf.dtype == jnp.int4 else 8 * leaf.dtype.itemsize
    return math.prod(sharding.shard_shape(leaf.shape)) * bits / 8


def attached() -> tuple[str, int, float]:
    """Kind, number and memory (GiB) of the attached devices.

    A chip's memory is from the table, a GPU's from its statistics; CPU devices share the machine's.
    """
    device, count = jax.devices()[0], jax.device_count()
    known = {chip.kind: chip.hbm_gib for chip in CHIPS.values()}
    if device.device_kind in known:
        return device.device_kind, count, known[device.device_kind]
    if limit := (device.memory_stats() or {}).get("bytes_limit"):
        return device.device_kind, count, limit / GIB
    return device.device_kind, count, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB / count


def _of_slice(topology: str) -> tuple[str, int, float]:
    chip = chip_of(topology)
    chips = math.prod(int(side) for side in topology.partition(":")[2].split("x"))
    return chip.kind, chips * chip.devices, chip.hbm_gib


def _size(gib: float) -> str:
    return f"{gib:.2f} GiB" if gib >= 0.1 else f"{1024 * gib:.1f} MiB"
