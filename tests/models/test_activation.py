"""GELU is PyTorch's, in every type."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from llamavid_jax.models.activation import gelu


@pytest.mark.parity
def test_gelu_of_every_bfloat16():
    """Both round the same float32 value, except where the two float32 values round to different neighbours."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    every = every[every.isfinite()]
    theirs = torch.nn.functional.gelu(every).double().numpy()
    ours, rounded = (np.asarray(f(jnp.asarray(every.float().numpy(), jnp.bfloat16)), np.float64) for f in (gelu, other))
    exact = torch.nn.functional.gelu(every.double()).numpy()
    assert np.all(np.abs(ours - theirs) <= 2**-7 * np.abs(theirs) + 1e-6)
    assert np.mean(ours == theirs) > 0.99
    near = np.abs(exact) < 100
    assert np.abs(ours - exact)[near].mean() <= np.abs(rounded - exact)[near].mean()


def other(x):
    return jax.nn.gelu(x, approximate=False)


@pytest.mark.parity
def test_gelu_of_float32():
    x = np.linspace(-12, 12, 100_001, dtype=np.float32)
    exact = torch.nn.functional.gelu(torch.from_numpy(x).double()).numpy()
    ours = np.asarray(jax.jit(gelu)(x))
    assert np.abs(ours - exact).max() < 1e-6
    assert np.linalg.norm(ours - exact) / np.linalg.norm(exact) < 1e-7
