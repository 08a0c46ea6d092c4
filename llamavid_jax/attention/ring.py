"""Causal self-attention of rows that are sharded over the mesh's `sequence` axis: keys and values go round a ring.

    chip i of n   positions i·T/n ...  ─ exchange ─▶  halves i and 2n-1-i of the row, of T/2n positions each
    step 0        its queries see its own keys, causally
    step s        the keys of chip j = i-s visit: j < i, all its queries see j's first half;
                  j > i, its second half of queries sees all of j's keys.  The same work for every chip (zig-zag)

A chip holds its own share of keys and values and a visiting one, which is sent on while it is used.  The gradient goes
round likewise: it recomputes every tile and returns each share's summed gradients to its chip.  Ring attention: arXiv
2310.01889; the zig-zag order is that of Llama 3's and MaxText's load-balanced context parallelism.  Tokamax has a ring
too, but one that takes the whole mask as an array, 4 GB for 65,536 tokens.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from llamavid_jax.attention.splash import LANES, split_heads
from llamavid_jax.attention.tile import LAX_TILE, Tile, merge, splash_tile
from llamavid_jax.parallel.rows import AXIS, send, ways


def ring_supports(q: jax.Array, k: jax.Array) -> bool:
    """Whether the mesh in context shards rows, and their length divides into two halves for each chip."""
    return ways() > 1 and q.shape[1] == k.shape[1] and q.shape[1] % (2 * ways()) == 0


def ring_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"] | None = None,
    *,
    splash: bool = False,
    interpret: Any = False,
) -> Float[Array, "B T N H"]:
    """Causal softmax(q kᵀ / √H) v, within segments where they are given, on the mesh in context.

    `splash` computes the tiles with the Pallas kernel, where their length is a multiple of 128.
    """
    mesh = jax.sharding.get_abstract_mesh()
    half = q.shape[1] // ways() // 2
    tile = splash_tile(interpret) if splash and half % LANES == 0 else LAX_TILE
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))
    k, v, spec, kv_spec = split_heads(q, k, v, AXIS)
    ids_spec = PartitionSpec(spec[0], None, AXIS)
    ids = None if segment_ids is None else segment_ids[:, None]
    run = jax.shard_map(
        functools.partial(_one_shard, tile),
        mesh=mesh,
        in_specs=(spec, kv_spec, kv_spec, ids_spec),
        out_specs=spec,
        check_vma=False,
    )
    return jnp.swapaxes(run(q, k, v, ids), 1, 2)


def _one_shard(tile: Tile, q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array | None) -> jax.Array:
    q, k, v, ids = jax.tree.map(_to_zigzag, (q, k, v, ids))
    return _from_zigzag(_ring(tile, q, k, v, ids))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(tile: Tile, q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array | None) -> jax.Array:
    return _forward(tile, q, k, v, ids)[0]


def _forward(tile: Tile, q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array | None):
    first, second = _halves(q)
    queries, keys = (q, ids), (k, v, ids)

    def look(carry, keys, number):
        """Merges the queries' attention to chip i - number's keys."""

        def earlier():
            return tile.forward(queries, _part(keys, first), False)

        def later():
            out, lse = tile.forward(_part(queries, second), keys, False)
            return _pad(out, first), _pad(lse, first, -jnp.inf)

        return merge(carry, jax.lax.cond(jax.lax.axis_index(AXIS) >= number, earlier, later))

    def step(carry, number):
        visiting, merged = carry
        return (send(visiting), look(merged, visiting, number)), None

    out, lse = tile.forward(queries, keys, True)
    start = send(keys), (out.astype(jnp.float32), lse)
    (visiting, merged), _ = jax.lax.scan(step, start, jnp.arange(1, ways() - 1))
    out, lse = look(merged, visiting, ways() - 1)
    out = out.astype(q.dtype)
    return out, (q, k, v, ids, out, lse)


def _backward(tile: Tile, kept: tuple, d_out: jax.Array):
    q, k, v, ids, out, lse = kept
    first, second = _halves(q)
    queries, keys, row = (q, ids), (k, v, ids), (out, lse, d_out)

    def look(keys, number):
        def earlier():
            d_q, d_k, d_v = _float32(tile.backward(queries, _part(keys, first), row, False))
            return d_q, (_pad(d_k, second), _pad(d_v, second))

        def later():
            d_q, d_k, d_v = _float32(tile.backward(_part(queries, second), keys, _part(row, second), False))
            return _pad(d_q, first), (d_k, d_v)

        return jax.lax.cond(jax.lax.axis_index(AXIS) >= number, earlier, later)

    def step(carry, number):
        visiting, sums, d_q = carry
        following, sums = send(visiting), send(sums)  # the sums follow their keys round, one step behind
        d_q_part, parts = look(visiting, number)
        return (following, jax.tree.map(jnp.add, sums, parts), d_q + d_q_part), None

    d_q, *sums = _float32(tile.backward(queries, keys, row, True))
    start = send(keys), tuple(sums), d_q
    (visiting, sums, d_q), _ = jax.lax.scan(step, start, jnp.arange(1, ways() - 1))
    d_q_part, parts = look(visiting, ways() - 1)
    d_k, d_v = send(jax.tree.map(jnp.add, send(sums), parts))
    return (d_q + d_q_part).astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None


_ring.defvjp(_forward, _backward)


# ---- halves: axis 2 of every array


def _halves(x: jax.Array) -> tuple[slice, slice]:
    half = x.shape[2] // 2
    return slice(half), slice(half, None)


def _part(tree: Any, half: slice) -> Any:
    return jax.tree.map(lambda x: x[:, :, half], tree)


def _pad(x: jax.Array, missing: slice, value: float = 0.0) -> jax.Array:
    """Puts the half that is missing beside the one that is given."""
    ends = (0, x.shape[2]) if missing.stop is None else (x.shape[2], 0)
    return jnp.pad(x, [(0, 0), (0, 0), ends] + [(0, 0)] * (x.ndim - 3), constant_values=value)


def _float32(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def _zigzag_homes(place: int) -> list[tuple[int, int]]:
    """(i, the chip that half 2i + `place` of the row goes to): half h to chip h, or 2n-1-h where that is less."""
    return [(i, min(2 * i + place, 2 * ways() - 1 - 2 * i - place)) for i in range(ways())]


def _to_zigzag(x: jax.Array) -> jax.Array:
    """Chip i's halves 2i and 2i+1 of the row → halves i and 2n-1-i."""
    arrived = [jax.lax.ppermute(x[:, :, part], AXIS, _zigzag_homes(place)) for place, part in enumerate(_halves(x))]
    return _in_order(*arrived)


def _from_zigzag(x: jax.Array) -> jax.Array:
    even_then_odd = jnp.split(_in_order(*jnp.split(x, 2, axis=2)), 2, axis=2)
    back = [
        jax.lax.ppermute(part, AXIS, [(home, i) for i, home in _zigzag_homes(place)])
        for place, part in enumerate(even_then_odd)
    ]
    return jnp.concatenate(back, axis=2)


def _in_order(one: jax.Array, other: jax.Array) -> jax.Array:
    """Both halves in the order of the row; odd chips hold the later one first."""
    odd = jax.lax.axis_index(AXIS) % 2 == 1
    return jnp.concatenate([jnp.where(odd, other, one), jnp.where(odd, one, other)], axis=2)
