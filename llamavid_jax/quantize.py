"""QLoRA: the frozen kernels of the LLaMA's layers in 4 or 8 bits, made whole again in the product.

Dettmers et al. 2023 (T9), by Qwix: blocks of 64 inputs share one scale, in the kernel's own type; "nf4" takes the 16
quantiles of a normal distribution, "int8" whole numbers.  The tree changes so (L layers):

    llama.layers.mlp.up.kernel  [L, D, M]   →   llama.layers.mlp.up.kernel.qvalue  [L, D, M]     uint4 or int8
                                                llama.layers.mlp.up.kernel.scale   [L, D/64, M]

One layer's kernels are whole at a time, inside the scan over layers.  Deviations: scales are not quantised themselves
(0.25 bits a weight in bfloat16, where the original's double quantisation has 0.13), and the head stays as it is.
Qwix flattens what it looks up in nf4's table, so that under tensor parallelism every device makes whole kernels.
"""

import math

import jax
import qwix
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype

from llamavid_jax.config import ConfigError
from llamavid_jax.lora import linears
from llamavid_jax.models.llama_vid import LlamaVid
from llamavid_jax.param_axes import PARAM_AXES
from llamavid_jax.sharding import constrain

KINDS = ("nf4", "int8")
BLOCK = 64


def quantize_base(model: LlamaVid, kind: str) -> None:
    """Replaces the kernels of the decoder's linear layers, frozen from here on.

    On a mesh, call it with the mesh in context.  Raises ConfigError for an unknown kind.
    """
    if kind not in KINDS:
        raise ConfigError(f"the kind of quantisation is {kind!r}; use one of {', '.join(KINDS)}")
    for path, linear in linears(model.llama.layers):
        names = PARAM_AXES[f"llama.layers.{path}.kernel"].split()
        axis = len(linear.in_features) - 1  # of one layer: heads have their size as the last input
        tile = math.gcd(BLOCK, linear.in_features[-1])

        def quantize(kernel: jax.Array, axis=axis, tile=tile) -> qwix.QArray:
            others = [other for other in range(kernel.ndim) if other != axis]
            return qwix.quantize(kernel, kind, channelwise_axes=others, tiled_axes={axis: tile})

        def quantize_all(kernels: jax.Array, quantize=quantize, names=names) -> qwix.QArray:
            return jax.tree.map(lambda part: constrain(part, *names), jax.lax.map(quantize, kernels))

        linear.kernel = nnx.Param(jax.jit(quantize_all)(linear.kernel[...]))
        linear.promote_dtype = _promote_dequantized


def _promote_dequantized(arrays: tuple, dtype) -> tuple:
    """What `nnx.LinearGeneral` calls on input, kernel and bias before its product."""
    inputs, kernel, bias = arrays
    return promote_dtype((inputs, qwix.dequantize(kernel), bias), dtype=dtype)
