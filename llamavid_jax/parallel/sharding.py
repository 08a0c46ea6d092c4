"""Where every array lives on a device mesh: `weights/` names the dimensions, one table here gives them mesh axes.

The mesh has four axes: `data` (copies of the model; across slices), `fsdp` (parameters cut along their width),
`tensor` (heads and MLP cut) and `sequence` (long rows cut; parameters too, as along `fsdp`).  Modules know nothing of
it but `constrain`.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from llamavid_jax.config.schema import LLaMAVIDLlavaConfig
from llamavid_jax.weights import inventory

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


def param_shardings(
    params: Mapping[str, Any], config: LLaMAVIDLlavaConfig, mesh: Mesh | AbstractMesh
) -> dict[str, NamedSharding]:
    """A NamedSharding for every parameter by its path; the values are arrays or ShapeDtypeStructs.

    Raises CheckpointError for parameters that are not the configuration's.
    """
    axes = inventory.axes(config, {path: leaf.shape for path, leaf in params.items()})
    return {path: NamedSharding(mesh, partition_spec(leaf.shape, axes[path], mesh)) for path, leaf in params.items()}


def activation_spec(shape: tuple[int, ...], *names: str | None) -> PartitionSpec:
    """The spec of an activation on the mesh in context; replicated without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return PartitionSpec(*[None] * len(shape)) if mesh.empty else partition_spec(shape, names, mesh)


def target() -> Any:
    """The compile target, with `platform` and `device_kind`: a device of the mesh in context, attached or not."""
    return jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Pins an activation's axes to the mesh in context; nothing without one, or on one device's share of an array."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:
        return x
    return jax.lax.with_sharding_constraint(x, activation_spec(x.shape, *names))


def pin(params: dict[str, jax.Array], specs: Mapping[str, PartitionSpec]) -> dict[str, jax.Array]:
    """Parameters by path, pinned to their places on the mesh in context: so are their gradients, which are then
    scattered as they are summed, rather than replicated first."""
    return {path: jax.lax.with_sharding_constraint(value, specs[path]) for path, value in params.items()}
