"""Rows that are sharded over the mesh's `sequence` axis: the ring of a row's chips, and how slots are filled."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llamavid_jax.parallel.mesh import SEQUENCE as AXIS
from llamavid_jax.parallel.sharding import activation_spec


def ways() -> int:
    """Sequence shards: the chips that share a row on the mesh in context."""
    return jax.sharding.get_abstract_mesh().shape.get(AXIS, 1)


def send(tree: Any) -> Any:
    """Inside a shard_map: every array to the next chip of the ring."""
    ring = [(i, (i + 1) % ways()) for i in range(ways())]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, AXIS, ring), tree)


def take_slots(table: Float[Array, "#B N D"], index: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """`table[b, index[b, t]]` for indices of 0 or more; arbitrary values for negative ones.

    Where rows are sharded, so is the table, and its shards go round the ring: no chip holds the whole table or row.
    """
    cuts = ways()
    if cuts == 1 or index.shape[1] % cuts:
        return jnp.take_along_axis(table, jnp.maximum(index, 0)[..., None], axis=1)
    size = -(-table.shape[1] // cuts)
    table = jnp.pad(table, [(0, 0), (0, size * cuts - table.shape[1]), (0, 0)])

    def one_shard(table: jax.Array, index: jax.Array) -> jax.Array:
        def step(carry: tuple[jax.Array, jax.Array], number: jax.Array) -> tuple[Any, None]:
            visiting, rows = carry
            place = index - (jax.lax.axis_index(AXIS) - number) % cuts * size
            found = jnp.take_along_axis(visiting, jnp.clip(place, 0, size - 1)[..., None], axis=1)
            rows = jnp.where(((place >= 0) & (place < size))[..., None], found, rows)
            return (send(visiting), rows), None

        start = table, jnp.zeros((*index.shape, table.shape[-1]), table.dtype)
        return jax.lax.scan(step, start, jnp.arange(cuts))[0][1]

    table_spec = activation_spec(table.shape, "batch", "sequence", None)
    rows_spec = activation_spec((*index.shape, 1), "batch", "sequence", None)
    return jax.shard_map(
        one_shard,
        mesh=jax.sharding.get_abstract_mesh(),
        in_specs=(table_spec, jax.P(*rows_spec[:2])),
        out_specs=rows_spec,
        check_vma=False,
    )(table, index)
