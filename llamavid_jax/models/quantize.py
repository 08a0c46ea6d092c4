"""Kernels in 4 or 8 bits, dequantised inside the matmul: LLaMA's for small chips, or frozen under LoRA (QLoRA).

Qwix quantises: blocks of 64 inputs share one scale, in the kernel's own type.  "int8" and "int4" are integers, "nf4"
the 16 quantiles of a normal distribution (Dettmers et al. 2023).  The parameter tree changes as follows (L layers):

    llama.layers.mlp.up.kernel  [L, D, M]   →   llama.layers.mlp.up.kernel.qvalue  [L, D/64, 64, M]   int8, int4, uint4
                                                llama.layers.mlp.up.kernel.scale   [L, D/64, 1, M]

Blocks are a separate axis, which the matmul sums over like the others, so that the TPU compiler dequantises a kernel
inside the matmul that reads it.  If the blocks were merged first, it would write the kernel to memory.

Deviations from QLoRA: scales are not quantised themselves (0.25 bits a weight in bfloat16, where the original's double
quantisation has 0.13), and the head stays as it is.  Qwix flattens nf4 values to look them up, so that under tensor
parallelism every device dequantises whole kernels.
"""

import functools
import math

import jax
import jax.numpy as jnp
import qwix
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype

from llamavid_jax.errors import ConfigError
from llamavid_jax.models.llama import Llama
from llamavid_jax.models.lora import linears
from llamavid_jax.parallel.sharding import constrain
from llamavid_jax.weights.inventory import BLOCK
from llamavid_jax.weights.llama import KERNELS
from llamavid_jax.weights.row import W, in_blocks

KINDS = ("nf4", "int8", "int4")


def quantize_base(llama: Llama, kind: str) -> None:
    """Quantises the kernels of the decoder's linear layers, which are frozen from then on.

    On a mesh, call it with the mesh in context.  Raises ConfigError for an unknown kind.
    """
    if kind not in KINDS:
        raise ConfigError(f"the kind of quantisation is {kind!r}; use one of {', '.join(KINDS)}")
    for target, linear in linears(llama.layers):
        quantize_linear(linear, KERNELS[target], kind)


def quantize_linear(linear: nnx.LinearGeneral | nnx.Linear, row: W, kind: str) -> None:
    """Quantises one stacked linear layer, whose kernel `row` describes."""
    names = in_blocks(row)

    def quantize_all(kernels: jax.Array) -> qwix.QArray:
        return jax.tree.map(lambda part: constrain(part, *names), quantize_kernels(kernels, row, kind))

    linear.kernel = nnx.Param(jax.jit(quantize_all)(linear.kernel[...]))
    linear.promote_dtype, linear.dot_general = _promote_but_kernel, _product_in_blocks


@functools.partial(jax.jit, static_argnames=("row", "kind"))
def quantize_kernels(kernels: jax.Array, row: W, kind: str) -> qwix.QArray:
    """The kernels `[L, *in, *out]` of `row`, quantised.

    One layer after the other: its float32 copy is one layer large.
    """
    axis = row.input_axes  # of the inputs within a block, in one layer

    def quantize(kernel: jax.Array) -> qwix.QArray:
        inputs, outputs = kernel.shape[:axis], kernel.shape[axis:]
        block = math.gcd(BLOCK, inputs[-1])
        blocks = kernel.astype(jnp.float32).reshape(*inputs[:-1], inputs[-1] // block, block, *outputs)
        others = [other for other in range(blocks.ndim) if other != axis]
        return qwix.quantize(blocks, kind, channelwise_axes=others, scale_dtype=kernel.dtype)

    return jax.lax.map(quantize, kernels)


def _promote_but_kernel(arrays: tuple, dtype) -> tuple:
    """What `nnx.LinearGeneral` calls on input, kernel and bias before its matmul."""
    inputs, kernel, bias = arrays
    inputs, bias = promote_dtype((inputs, bias), dtype=dtype)
    return inputs, kernel, bias


def _product_in_blocks(inputs: jax.Array, kernel: qwix.QArray, dimensions, precision=None, out_sharding=None):
    """`lax.dot_general` of the last axes of `inputs` with a kernel whose last input axis is cut into blocks."""
    inner = len(dimensions[0][0])
    blocks = kernel.shape[: inner + 1]
    inputs = inputs.reshape(*inputs.shape[: inputs.ndim - inner], *blocks)
    axes = tuple(range(inputs.ndim - inner - 1, inputs.ndim)), tuple(range(inner + 1))
    full = qwix.dequantize(kernel).astype(inputs.dtype)
    return jax.lax.dot_general(inputs, full, (axes, ((), ())), precision=precision, out_sharding=out_sharding)
