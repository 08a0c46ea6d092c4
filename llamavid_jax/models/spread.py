"""The same function for many frames, or pairs of a frame and a question, spread over every device of the mesh.

    arrays [N, ...] ─ N/n a device ─▶ a bounded number at a time ─▶ [N, ...]
    parameters, sharded ─ gathered once ─▶ whole on every device ─▶ gradients summed there, then reduced once

Left to the compiler, each chunk would gather the parameters and reduce their gradients anew.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from llamavid_jax.models import stack
from llamavid_jax.parallel.sharding import activation_spec


def spread(
    function: Callable[..., jax.Array], modules: Any, *arrays: jax.Array, at_a_time: int, remat: str = "none"
) -> jax.Array:
    """`function(modules, *arrays)` over the first axis of all arrays, in turns of up to `at_a_time` a device.

    Each element of the result may depend only on the elements of the arrays at its own index.  `remat` is what a turn
    keeps for the gradient (`stack.REMAT`).
    """
    graphdef, state = nnx.split(modules)

    def turn(state: Any, *part: jax.Array) -> jax.Array:
        return function(nnx.merge(graphdef, state), *part)

    def share(state: Any, *arrays: jax.Array) -> jax.Array:
        one = functools.partial(stack.rematerialise(turn, remat, in_loop=False), state)
        return in_turns(one, at_a_time, *arrays)

    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        spec = activation_spec(arrays[0].shape[:1], "frames")
        specs = (jax.P(), *(spec for _ in arrays))
        share = jax.shard_map(share, mesh=mesh, in_specs=specs, out_specs=spec, check_vma=False)
    return share(state, *arrays)


def in_turns(function: Callable[..., jax.Array], at_a_time: int, *arrays: jax.Array) -> jax.Array:
    """`function(*arrays)`, one chunk of their first axis after another; the last chunk is padded where necessary."""
    length = len(arrays[0])
    if length <= at_a_time:
        return function(*arrays)
    least = -(-length // at_a_time)
    turns = next((number for number in range(least, 2 * least) if length % number == 0), least)  # padding is a copy
    size = -(-length // turns)

    def cut(x: jax.Array) -> jax.Array:
        x = jnp.concatenate([x, *[x[-1:]] * (turns * size - length)]) if length < turns * size else x
        return x.reshape(turns, size, *x.shape[1:])

    out = jax.lax.map(lambda part: function(*part), tuple(cut(x) for x in arrays))
    return out.reshape(turns * size, *out.shape[2:])[:length]
