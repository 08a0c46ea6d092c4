"""Where every array lives on a device mesh: `weights/param_axes.py` names dimensions, one table here gives mesh axes.

The mesh has four axes: `data` (copies of the model; across slices), `fsdp` (parameters cut along their width),
`tensor` (heads and MLP cut) and `sequence` (long rows cut; parameters too, as along `fsdp`).  Modules know nothing of
it but `constrain`.
"""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from llamavid_jax.config.schema import LLaMAVIDLlavaConfig
from llamavid_jax.errors import InputError
from llamavid_jax.weights.param_axes import ADAPTER_AXES, OPTIONAL_ROWS, PARAM_AXES, axis_sizes, in_blocks

MESH_AXES = ("data", "fsdp", "tensor", "sequence")

AXIS_RULES: Mapping[str, str | tuple[str, ...] | None] = {
    # activations
    "batch": ("data", "fsdp"),
    "frames": ("data", "fsdp", "sequence", "tensor"),
    "sequence": "sequence",
    # llama
    "layers": None,
    "embed": ("fsdp", "sequence"),  # chips that share rows share the parameters' memory too
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "vocab": "tensor",
    "rank": None,
    # vision
    "vision_layers": None,
    "vision_embed": ("fsdp", "sequence"),
    "vision_heads": "tensor",
    "vision_head_dim": None,
    "vision_mlp": "tensor",
    "context": "tensor",
    "qkv": None,
    "patch_row": None,
    "patch_column": None,
    "channels": None,
    "positions": None,
    # q-former
    "qformer_layers": None,
    "qformer_cross_layers": None,
    "qformer_embed": ("fsdp", "sequence"),
    "qformer_heads": "tensor",
    "qformer_head_dim": None,
    "qformer_mlp": "tensor",
    "qformer_vocab": None,
    "qformer_positions": None,
    "queries": None,
    "hidden": "tensor",
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
    """A mesh of the four axes; axes that are not named have size 1.  `data` and then `fsdp` go across slices."""
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
        raise ShardingError(f"a mesh of {asked} needs {needed} devices; {len(devices)} are there")
    types, used = (AxisType.Auto,) * len(MESH_AXES), devices[:needed]
    slices = Counter(getattr(device, "slice_index", 0) for device in used)
    if len(set(slices.values())) > 1:
        raise ShardingError(
            f"a mesh of {asked} takes {sorted(slices.values())} devices of the slices; use whole slices"
        )
    ways: list[int] = []
    for size in shape:  # slices of TPUs, or hosts of GPUs, go over the outermost axes
        ways.append(math.gcd(size, len(slices) // math.prod(ways)))
    inner = [size // outer for size, outer in zip(shape, ways, strict=True)]
    tensor, sequence = shape[2:]
    if len(slices) == 1 and tensor == 1 and (rings := closed_rings(used, sequence)) is not None:
        grid = rings.reshape(shape)
    elif len(slices) == 1:
        grid = create_device_mesh(shape, used, allow_split_physical_axes=True)
    else:
        grid = create_hybrid_device_mesh(inner, ways, used, allow_split_physical_axes=True)
    return Mesh(grid, MESH_AXES, axis_types=types)


def closed_rings(devices: list, ways: int) -> np.ndarray | None:
    """`[rings, ways]`: the chips of a flat TPU slice in rings of neighbours, out along a line, back along the next.

    The links of v5e and v6e slices do not wrap around.  Along a straight line the last chip would send to the first
    across all others, and for that the compiler of v5e stops other work.  None where there is nothing to close.
    """
    if ways < 4 or ways % 2 or any(device.platform != "tpu" or device.coords[2] for device in devices):
        return None
    sides = np.max([device.coords[:2] for device in devices], axis=0) + 1
    if math.prod(sides) != len(devices):
        return None
    grid = np.empty(sides, object)
    for device in devices:
        grid[tuple(device.coords[:2])] = device
    half = ways // 2
    grid = grid if grid.shape[0] % 2 == 0 and grid.shape[1] % half == 0 else grid.T
    if grid.shape[0] % 2 or grid.shape[1] % half:
        return None
    there, back = np.moveaxis(grid.reshape(grid.shape[0] // 2, 2, -1, half), 1, 0)
    return np.concatenate([there, back[..., ::-1]], axis=-1).reshape(-1, ways)


def param_axes(shapes: Mapping[str, tuple[int, ...]], config: LLaMAVIDLlavaConfig) -> dict[str, tuple[str | None, ...]]:
    """Axis names of every parameter path.  Updates of the linear layers may be there or not, all of one rank.

    Quantised kernels have the rows of whole ones, and None for the inputs of a block.
    Strict both ways: a path without a row, a row without a path and a row whose axes have other sizes are errors.
    """
    sizes, unused, axes = axis_sizes(config), set(PARAM_AXES) - OPTIONAL_ROWS, {}
    sizes["rank"] = next((shape[-1] for path, shape in shapes.items() if path.endswith(".lora.a")), 0)
    for path, shape in shapes.items():
        kernel, _, part = path.rpartition(".")
        if kernel in _ROWS and part in ("qvalue", "scale"):
            axes[path] = _axes_in_blocks(path, tuple(shape), _ROWS[kernel], sizes)
            unused.discard(kernel)
            continue
        row = _row(path)
        if row not in _ROWS:
            raise ShardingError(f"parameter {path} {shape} has no row in PARAM_AXES; add one")
        names = tuple(_ROWS[row].split())
        expected = tuple(sizes[name] for name in names)
        if expected != tuple(shape):
            raise ShardingError(f"PARAM_AXES says {path} is {' '.join(names)} = {expected}, but it is {tuple(shape)}")
        unused.discard(row)
        axes[path] = names
    if unused:
        raise ShardingError(f"PARAM_AXES row {min(unused)} matches no parameter; remove it")
    return axes


_ROWS = PARAM_AXES | ADAPTER_AXES


def _row(path: str) -> str:
    return path if path in _ROWS else ".".join("*" if part.isdigit() else part for part in path.split("."))


def _axes_in_blocks(path: str, shape: tuple[int, ...], row: str, sizes: dict[str, int]) -> tuple[str | None, ...]:
    """The axes of a quantised kernel's `qvalue` or `scale`, which must be those of whole blocks."""
    names = in_blocks(row)
    at, whole = names.index(None) - 1, [sizes[name] for name in names if name]
    number = shape[at] if len(shape) == len(names) and shape[at] and whole[at] % shape[at] == 0 else 1
    expected = (*whole[:at], number, whole[at] // number if path.endswith("qvalue") else 1, *whole[at + 1 :])
    if shape != expected:
        raise ShardingError(f"PARAM_AXES says the whole of {path} is {row} = {tuple(whole)}; {shape} is not its blocks")
    return names


def partition_spec(shape: tuple[int, ...], names: tuple[str | None, ...], mesh: Any) -> PartitionSpec:
    """Mesh axes of an array; a dimension is cut by those of its mesh axes, first to last, that divide it."""
    spec = []
    for size, name in zip(shape, names, strict=True):
        axes = []
        for axis in np.atleast_1d(AXIS_RULES[name] or []) if name else []:
            if mesh.shape[axis] > 1 and size % mesh.shape[axis] == 0:
                axes.append(str(axis))
                size //= mesh.shape[axis]
        spec.append(tuple(axes) if len(axes) > 1 else axes[0] if axes else None)
    return PartitionSpec(*spec)


def flat_paths(state: Any) -> dict[str, Any]:
    """`{"llama.norm.scale": leaf}` of a state or a nested dict."""
    tree = nnx.to_pure_dict(state) if isinstance(state, nnx.State) else state
    return {
        ".".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path): leaf
        for path, leaf in jax.tree.flatten_with_path(tree)[0]
    }


def param_shardings(params: Any, config: LLaMAVIDLlavaConfig, mesh: Mesh | AbstractMesh) -> Any:
    """A NamedSharding for every parameter of a pure nested dict (arrays or ShapeDtypeStructs)."""
    paths = flat_paths(params)
    axes = param_axes({path: leaf.shape for path, leaf in paths.items()}, config)
    shardings = [NamedSharding(mesh, partition_spec(leaf.shape, axes[path], mesh)) for path, leaf in paths.items()]
    return jax.tree.unflatten(jax.tree.structure(params), shardings)


def activation_spec(shape: tuple[int, ...], *names: str | None) -> PartitionSpec:
    """The spec of an activation on the mesh in context; replicated without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return PartitionSpec(*[None] * len(shape)) if mesh.empty else partition_spec(shape, names, mesh)


def target() -> Any:
    """What programs are for, with `platform` and `device_kind`: the devices of the mesh in context, there or not."""
    return jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Pins an activation's axes to the mesh in context; nothing without one, or on one device's share of an array."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:
        return x
    return jax.lax.with_sharding_constraint(x, activation_spec(x.shape, *names))


def pin(params: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Parameters by path, pinned to their places on the mesh in context: so are their gradients, which are then
    scattered as they are summed, rather than whole on every device first."""
    return {path: constrain(value, *_ROWS[_row(path)].split()) for path, value in params.items()}
