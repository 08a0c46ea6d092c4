"""Work on many frames, spread over devices: in chunks and on a mesh it gives the same values and gradients."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llamavid_jax.models.spread import in_turns, spread
from llamavid_jax.parallel.mesh import make_mesh
from llamavid_jax.precompile.collectives import collectives


@pytest.fixture(scope="module")
def layer():
    return nnx.Linear(16, 24, rngs=nnx.Rngs(0))


def run(layer, x, at_a_time, remat="none"):
    """The result, and the gradients of a sum that weights each element differently."""

    def loss(state, x):
        out = spread(
            lambda layer, x: jnp.tanh(layer(x)), nnx.merge(graphdef, state), x, at_a_time=at_a_time, remat=remat
        )
        return jnp.sum(out * jnp.arange(out.size).reshape(out.shape)), out

    graphdef, state = nnx.split(layer)
    gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(state, x)
    return jax.tree.leaves((out, gradients))


def equal(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        assert np.linalg.norm(one - other) <= 1e-6 * np.linalg.norm(other)


@pytest.mark.parametrize("length", [1, 7, 8, 24])
def test_turns_change_nothing(layer, length):
    x = jax.random.normal(jax.random.key(1), (length, 16))
    wanted = run(layer, x, length)
    for at_a_time, remat in itertools.product((1, 3, 8), ("none", "full")):
        equal(run(layer, x, at_a_time, remat), wanted)


def test_no_more_than_asked_at_a_time():
    seen = []
    in_turns(lambda x: seen.append(len(x)) or x, 4, jnp.zeros((10, 2)))
    assert seen == [2]  # five turns of two, without padding, rather than three of four


@pytest.mark.sharding
@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"fsdp": 2, "tensor": 2, "sequence": 2}], ids=str)
@pytest.mark.parametrize("length", [6, 48])
def test_devices_change_nothing(layer, sizes, length):
    x = jax.random.normal(jax.random.key(1), (length, 16))
    wanted = run(layer, x, length)
    with jax.set_mesh(make_mesh(**sizes)):
        equal(run(layer, x, 2), wanted)


@pytest.mark.sharding
def test_gradients_are_reduced_once(layer):
    """Whatever the number of turns on a device."""
    graphdef, state = nnx.split(layer)

    def loss(state, x):
        return spread(lambda layer, x: jnp.tanh(layer(x)), nnx.merge(graphdef, state), x, at_a_time=2).sum()

    with jax.set_mesh(make_mesh(fsdp=8)):
        compiled = jax.jit(jax.grad(loss)).lower(state, jnp.zeros((64, 16))).compile()
    parameters = 16 * 24 + 24
    assert collectives(compiled.as_text())["all-reduce"].bytes == 2 * 4 * parameters * 7 / 8
