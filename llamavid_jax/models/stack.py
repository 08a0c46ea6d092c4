"""Layers stacked along a leading axis `L`: one set of parameters, traced once however deep the model is."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx


def stack(make: Callable[[nnx.Rngs], nnx.Module], length: int, rngs: nnx.Rngs) -> nnx.Module:
    """Makes `length` layers as one module whose every parameter has a leading axis `[L, ...]`."""

    @nnx.split_rngs(splits=length)
    @nnx.vmap(in_axes=0, out_axes=0)
    def make_all(rngs: nnx.Rngs) -> nnx.Module:
        return make(rngs)

    return make_all(rngs)


def part(layers: nnx.Module, select: Callable[[jax.Array], jax.Array]) -> nnx.Module:
    """The module with `select` applied to every parameter."""
    graphdef, state = nnx.split(layers)
    return nnx.merge(graphdef, jax.tree.map(select, state))


def layer(layers: nnx.Module, index: int) -> nnx.Module:
    """One layer of a stack."""
    return part(layers, lambda parameter: parameter[index])


def scan(apply: Callable[[Any, Any], tuple[Any, Any]], layers: Any, carry: Any, remat: str = "none") -> tuple[Any, Any]:
    """Runs `carry, output = apply(layer, carry)` through the stack; outputs come back stacked `[L, ...]`.

    `layers` may be a tuple of stacks of one length; `layer` is then a tuple too.  `remat` names what a gradient keeps
    of a layer (REMAT).
    """
    graphdef, state = nnx.split(layers)

    def step(carry, state):
        return apply(nnx.merge(graphdef, state), carry)

    return jax.lax.scan(rematerialise(step, remat), carry, state)


REMAT = {  # what the forward pass keeps for the gradient; the rest is computed again
    "none": None,  # everything
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # results of matmuls with weights
    "full": jax.checkpoint_policies.nothing_saveable,  # a layer's input
}


def rematerialise(function: Callable, remat: str, in_loop: bool = True) -> Callable:
    """`function` under the policy that `remat` names.

    Outside a loop the compiler would merge the recomputed matmul with the first one and keep its result; `prevent_cse`
    prevents that.
    """
    return function if remat == "none" else jax.checkpoint(function, policy=REMAT[remat], prevent_cse=not in_loop)
