"""The LLaMA's linear layer: `x [..., in] → x·W [..., out]`, plus a low-rank update where it has one.

The update is LoRA (Hu et al. 2021): W stays as it is, and `(α / r) · dropout(x)·A·B` is added, A `[in, r]` and B
`[r, out]`.  `in` and `out` may be several axes each (heads and their size), as the kernel's are.  `add_lora` gives the
layers of a model their updates (`llamavid_jax/models/lora.py`); without one this is `nnx.LinearGeneral`.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jaxtyping import Array, Float


class DropoutKeys(nnx.Variable):
    """The random keys of one layer's dropout, one for each row; not a parameter."""


class LowRank(nnx.Module):
    """`scale · dropout(x)·A·B`.  B starts at zero, so the update does too; A starts as PEFT's, uniform in ±1/√in."""

    dropout_keys: DropoutKeys | None = None  # none: no dropout

    def __init__(
        self,
        in_features: tuple[int, ...],
        out_features: tuple[int, ...],
        *,
        rank: int,
        scale: float,
        dropout: float,
        dtype,
        param_dtype,
        rngs: nnx.Rngs,
    ):
        # Kaiming-uniform with a = √5, as torch initialises a linear layer: variance 1 / (3 in)
        uniform = jax.nn.initializers.variance_scaling(
            1 / 3, "fan_in", "uniform", in_axis=tuple(range(len(in_features))), out_axis=-1
        )
        self.a = nnx.Param(uniform(rngs.params(), (*in_features, rank), param_dtype))
        self.b = nnx.Param(jnp.zeros((rank, *out_features), param_dtype))
        self.scale, self.dropout, self.dtype = scale, dropout, dtype

    def __call__(self, x: Float[Array, "*B_in"]) -> Float[Array, "*B_out"]:
        x, a, b = promote_dtype((x, self.a[...], self.b[...]), dtype=self.dtype)
        if self.dropout_keys is not None and self.dropout > 0:
            keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - self.dropout, x.shape[1:]))
            kept = keep(self.dropout_keys[...])
            x = jnp.where(kept, x / (1 - self.dropout), 0)
        return jnp.tensordot(jnp.tensordot(x, a, a.ndim - 1), b, 1) * self.scale


class Linear(nnx.LinearGeneral):
    lora: LowRank | None = None

    def __call__(self, x: Float[Array, "*B_in"]) -> Float[Array, "*B_out"]:
        out = super().__call__(x)
        return out if self.lora is None else out + self.lora(x)
