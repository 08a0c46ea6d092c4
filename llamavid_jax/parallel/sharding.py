"""How every array is sharded over a device mesh: its dimensions' names → mesh axes (`mesh.AXIS_RULES`).

Modules use nothing of the mesh but `constrain`.
"""

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from llamavid_jax.config.schema import LLaMAVIDLlavaConfig
from llamavid_jax.parallel.mesh import AXIS_RULES
from llamavid_jax.weights import inventory


def partition_spec(shape: tuple[int, ...], names: tuple[str | None, ...], mesh: Any) -> PartitionSpec:
    """Mesh axes of an array; a dimension is sharded over those of its mesh axes, first to last, that divide it."""
    spec = []
    for size, name in zip(shape, names, strict=True):
        axes = []
        for axis in AXIS_RULES[name] if name else ():
            if mesh.shape[axis] > 1 and size % mesh.shape[axis] == 0:
                axes.append(axis)
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
    """Pins an activation's axes to the mesh in context; does nothing without one, or inside a shard_map."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:
        return x
    return jax.lax.with_sharding_constraint(x, activation_spec(x.shape, *names))


def specs(params: Mapping[str, Any]) -> dict[str, PartitionSpec]:
    """Path → spec of the parameters that are placed on a mesh."""
    placed = ((path, leaf.sharding) for path, leaf in params.items())
    return {path: sharding.spec for path, sharding in placed if isinstance(sharding, NamedSharding)}


def pin(params: dict[str, jax.Array], specs: Mapping[str, PartitionSpec]) -> dict[str, jax.Array]:
    """Pins parameters, by path, to their `specs` on the mesh in context.

    That pins their gradients too, which are then reduce-scattered rather than replicated first.
    """
    return {path: jax.lax.with_sharding_constraint(value, specs[path]) for path, value in params.items()}
