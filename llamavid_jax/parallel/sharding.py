"""Where every array lives on a device mesh: axis names of `weights/` and of activations, put on mesh axes.

Modules know nothing of the mesh but `constrain`.
"""

from collections.abc import Container, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from llamavid_jax.config.schema import LLaMAVIDLlavaConfig
from llamavid_jax.parallel.mesh import AXIS_RULES, ShardingError
from llamavid_jax.weights.llama import TARGETS
from llamavid_jax.weights.row import Parameter
from llamavid_jax.weights.table import parameters


def param_axes(shapes: Mapping[str, tuple[int, ...]], config: LLaMAVIDLlavaConfig) -> dict[str, tuple[str | None, ...]]:
    """Axis names of every parameter path, as the inventory (`weights/`) has them; None for the inputs of a block.

    LLaMA's linear layers may be quantised and may have updates, all of one rank.  Strict: a path without a row, a row
    without a path and a row whose axes have other sizes are errors.
    """
    rank = next((shape[-1] for path, shape in shapes.items() if path.endswith(".lora.a")), 0)
    targets = [target for target, row in TARGETS.items() if row.low_rank()[0].path in shapes]
    kind = "int8" if any(path.endswith(".qvalue") for path in shapes) else "none"
    expected = parameters(config, rank, targets, kind)
    for path, shape in shapes.items():
        if path not in expected:
            raise ShardingError(f"parameter {path} {tuple(shape)} has no row in the inventory, weights/; add one")
        if expected[path].shape != tuple(shape):
            row = f"{' '.join(name or 'block' for name in expected[path].axes)} = {expected[path].shape}"
            raise ShardingError(f"the inventory says {path} is {row}, but it is {tuple(shape)}")
    if missing := expected.keys() - shapes.keys():
        raise ShardingError(f"the inventory's row {min(missing)} matches no parameter; remove it")
    return {path: expected[path].axes for path in shapes}


def partition_spec(shape: tuple[int, ...], names: tuple[str | None, ...], mesh: Any) -> PartitionSpec:
    """Mesh axes of an array; a dimension is cut by those of its mesh axes, first to last, that divide it."""
    spec = []
    for size, name in zip(shape, names, strict=True):
        axes = []
        for axis in AXIS_RULES[name] if name else ():
            if mesh.shape[axis] > 1 and size % mesh.shape[axis] == 0:
                axes.append(axis)
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


def placed_params(
    config: LLaMAVIDLlavaConfig, dtype: Any, mesh: Mesh | AbstractMesh, float32: Container[str] = ()
) -> dict[str, jax.ShapeDtypeStruct]:
    """Every parameter of a model by its path, in `dtype` (those of `float32` in it), with its place on `mesh`."""

    def place(path: str, parameter: Parameter) -> jax.ShapeDtypeStruct:
        kind = jnp.float32 if path in float32 else parameter.dtype or dtype
        sharding = NamedSharding(mesh, partition_spec(parameter.shape, parameter.axes, mesh))
        return jax.ShapeDtypeStruct(parameter.shape, jnp.dtype(kind), sharding=sharding)

    return {path: place(path, parameter) for path, parameter in parameters(config).items()}


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


def pin(params: dict[str, jax.Array], axes: Mapping[str, tuple[str | None, ...]]) -> dict[str, jax.Array]:
    """Parameters by path, pinned to their places on the mesh in context: so are their gradients, which are then
    scattered as they are summed, rather than replicated first."""
    return {path: constrain(value, *axes[path]) for path, value in params.items()}
