"""The device mesh, and the only place that knows its axes.

`data` holds copies of the model, across slices; `fsdp` shards parameters along their width; `tensor` shards heads and
MLP; `sequence` shards long rows, and parameters as `fsdp` does.  All other code names what a dimension is ("heads",
"batch"); AXIS_RULES says which mesh axes shard it.
"""

import math
from collections import Counter
from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

from llamavid_jax.errors import ConfigError, InputError

MESH_AXES = DATA, FSDP, TENSOR, SEQUENCE = ("data", "fsdp", "tensor", "sequence")

AXIS_RULES: Mapping[str, tuple[str, ...]] = {  # what a dimension is → the mesh axes that cut it
    "batch": (DATA, FSDP),
    "frames": (DATA, FSDP, SEQUENCE, TENSOR),
    "sequence": (SEQUENCE,),
    # chips that share rows share the parameters' memory too
    **dict.fromkeys(("embed", "vision_embed", "qformer_embed", "memory"), (FSDP, SEQUENCE)),
    **dict.fromkeys(("heads", "kv_heads", "vision_heads", "qformer_heads"), (TENSOR,)),
    **dict.fromkeys(("mlp", "vision_mlp", "qformer_mlp", "vocab", "context", "hidden", "memory_hidden"), (TENSOR,)),
    **dict.fromkeys(("layers", "vision_layers", "qformer_layers", "qformer_cross_layers"), ()),
    **dict.fromkeys(("head_dim", "vision_head_dim", "qformer_head_dim", "rank", "qkv"), ()),
    **dict.fromkeys(("patch_row", "patch_column", "channels", "positions"), ()),
    **dict.fromkeys(("qformer_vocab", "qformer_positions", "qformer_types", "queries"), ()),
}


class ShardingError(InputError):
    """A mesh or a table row that does not fit: names it, the sizes and the remedy."""


def parse_mesh(text: str) -> dict[str, int]:
    """`"fsdp=4,tensor=2"` → axis sizes.  Raises ShardingError on an unknown axis or a size that is not a number."""
    sizes = {}
    for part in text.replace(",", " ").split():
        name, _, size = part.partition("=")
        if name not in MESH_AXES or name in sizes or not size.isdecimal() or not 1 <= int(size) < 2**31:
            raise ShardingError(
                f"mesh part {part!r} is not AXIS=SIZE with AXIS one of {', '.join(MESH_AXES)}, each once"
            )
        sizes[name] = int(size)
    return sizes


def make_mesh(devices: list[jax.Device] | None = None, **sizes: int) -> Mesh:
    """A mesh of the four axes; axes that are not named have size 1.  `data`, then `fsdp`, span slices."""
    unknown = sorted(set(sizes) - set(MESH_AXES))
    if unknown:
        raise ShardingError(f"{unknown[0]!r} is no mesh axis; the axes are {', '.join(MESH_AXES)}")
    for axis, size in sizes.items():
        if type(size) is not int or size < 1:
            raise ShardingError(f"mesh axis {axis} has size {size!r}; use a whole number of 1 or more")
    devices = jax.devices() if devices is None else devices
    shape = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
    needed, asked = math.prod(shape), ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    if needed > len(devices):
        raise ShardingError(f"a mesh of {asked} needs {needed} devices; {len(devices)} are attached")
    types, used = (AxisType.Auto,) * len(MESH_AXES), devices[:needed]
    slices = Counter(getattr(device, "slice_index", 0) for device in used)
    if len(set(slices.values())) > 1:
        raise ShardingError(
            f"a mesh of {asked} takes {sorted(slices.values())} devices of the slices; use whole slices"
        )
    over_slices: list[int] = []
    for size in shape:  # slices of TPUs, or hosts of GPUs, go over the outermost axes
        over_slices.append(math.gcd(size, len(slices) // math.prod(over_slices)))
    inner = [size // outer for size, outer in zip(shape, over_slices, strict=True)]
    tensor, sequence = sizes.get(TENSOR, 1), sizes.get(SEQUENCE, 1)
    if len(slices) == 1 and tensor == 1 and (rings := closed_rings(used, sequence)) is not None:
        grid = rings.reshape(shape)
    elif len(slices) == 1:
        grid = create_device_mesh(shape, used, allow_split_physical_axes=True)
    else:
        grid = create_hybrid_device_mesh(inner, over_slices, used, allow_split_physical_axes=True)
    return Mesh(grid, MESH_AXES, axis_types=types)


def local_mesh(**sizes: int) -> Mesh:
    """A mesh of this process's own devices."""
    return make_mesh(jax.local_devices(), **sizes)


def closed_rings(devices: list, length: int) -> np.ndarray | None:
    """`[rings, length]`: the chips of a flat TPU slice in rings of neighbours, out along a line, back along the next.

    The links of v5e and v6e slices do not wrap around.  Along a straight line the last chip would send to the first
    across all others, for which v5e's compiler stops other work.  None where no such rings exist or none are needed.
    """
    if length < 4 or length % 2 or any(device.platform != "tpu" or device.coords[2] for device in devices):
        return None
    sides = np.max([device.coords[:2] for device in devices], axis=0) + 1
    if math.prod(sides) != len(devices):
        return None
    grid = np.empty(sides, object)
    for device in devices:
        grid[tuple(device.coords[:2])] = device
    half = length // 2
    grid = grid if grid.shape[0] % 2 == 0 and grid.shape[1] % half == 0 else grid.T
    if grid.shape[0] % 2 or grid.shape[1] % half:
        return None
    there, back = np.moveaxis(grid.reshape(grid.shape[0] // 2, 2, -1, half), 1, 0)
    return np.concatenate([there, back[..., ::-1]], axis=-1).reshape(-1, length)


def host_mesh() -> Mesh:
    """This process's CPU."""
    try:
        return make_mesh(jax.local_devices(backend="cpu"))
    except RuntimeError:
        platforms = jax.config.jax_platforms
        raise ConfigError(
            f"JAX_PLATFORMS is {platforms}, but the CPU quantises and merges; use {platforms},cpu"
        ) from None


def shards(sizes: Mapping[str, int], name: str) -> int:
    """Into how many parts a mesh of these sizes (`mesh.shape`) shards a dimension, such as "batch"."""
    return math.prod(sizes[axis] for axis in AXIS_RULES[name])


def copies(mesh: Mesh | AbstractMesh) -> int:
    """Over how many groups of devices the rows of a batch are spread."""
    return shards(mesh.shape, "batch")


def row_shards(mesh: Mesh | AbstractMesh) -> int:
    """How many devices share a row."""
    return shards(mesh.shape, "sequence")


def spec_of(*names: str | None) -> PartitionSpec:
    """The spec of an array whose dimensions all divide evenly."""
    return PartitionSpec(*(AXIS_RULES[name] if name else None for name in names))


def describe(sizes: Mapping[str, int]) -> str:
    """`fsdp=4,tensor=2`: what `parse_mesh` reads."""
    return ",".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1)
