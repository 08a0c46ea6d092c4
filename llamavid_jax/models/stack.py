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
    """The module with `select` done to every parameter."""
    graphdef, state = nnx.split(layers)
    return nnx.merge(graphdef, jax.tree.map(select, state))


def layer(layers: nnx.Module, index: int) -> nnx.Module:
    """One layer of a stack."""
    return part(layers, lambda parameter: parameter[index])


def scan(apply: Callable[[Any, Any], tuple[Any, Any]], layers: Any, carry: Any) -> tuple[Any, Any]:
    """Runs `carry, output = apply(layer, carry)` through the stack; outputs come back stacked `[L, ...]`.

    `layers` may be a tuple of stacks of one length; `layer` is then a tuple too.
    """
    graphdef, state = nnx.split(layers)
    return jax.lax.scan(lambda carry, state: apply(nnx.merge(graphdef, state), carry), carry, state)
