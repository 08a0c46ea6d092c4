"""Causal self-attention on TPU by JAX's own Pallas splash-attention kernel.

Tokamax wraps the same kernel; taken from JAX itself, it needs no further dependency.  Under a mesh it runs per shard:
rows over the batch axes, heads over `tensor`.  Rows that are sharded over `sequence` are handled by `ring.py`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from llamavid_jax.parallel.sharding import activation_spec

BLOCK = 512  # queries and keys held in VMEM at a time
LANES = 128  # lengths must be a multiple of it


def splash_supports(q: jax.Array, k: jax.Array) -> bool:
    """Whether the shapes fit the kernel: self-attention, a length divisible by 128, a head size divisible by 64."""
    return q.shape[1] == k.shape[1] and q.shape[1] % LANES == 0 and q.shape[-1] % 64 == 0


def make_kernel(
    heads: int, queries: int, keys: int, *, causal: bool = True, save_residuals: bool = False, interpret: Any = False
) -> kernel.SplashAttentionKernel:
    """JAX's kernel, `(q [N, T, H], k [K, S, H], v [K, S, H], segments)`; `save_residuals` adds the log-sum-exp."""
    q_block, kv_block = (next(b for b in (BLOCK, 256, LANES) if length % b == 0) for length in (queries, keys))
    sizes = kernel.BlockSizes(
        block_q=q_block, block_kv=kv_block, block_kv_compute=kv_block,
        block_q_dkv=q_block, block_kv_dkv=kv_block, block_kv_dkv_compute=kv_block,
        block_q_dq=q_block, block_kv_dq=kv_block,
    )  # fmt: skip
    mask = (masks.CausalMask if causal else masks.FullMask)((queries, keys))
    return kernel.make_splash_mha_single_device(
        mask=masks.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        save_residuals=save_residuals,
        interpret=interpret,
    )


def splash_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"] | None = None,
    *,
    interpret: Any = False,
) -> Float[Array, "B T N H"]:
    """Causal softmax(q kᵀ / √H) v, within segments where they are given.  `interpret` runs it on a CPU, for tests."""
    length, _, size = q.shape[1:]
    if not splash_supports(q, k):
        raise ValueError(f"splash attention takes T a multiple of {LANES} and H of 64, not q {q.shape} and k {k.shape}")

    def one_shard(q: jax.Array, k: jax.Array, v: jax.Array, *segments: jax.Array) -> jax.Array:
        run = make_kernel(q.shape[1], length, length, interpret=interpret)
        return jax.vmap(run)(q * size**-0.5, k, v, *(kernel.SegmentIds(s, s) for s in segments))

    segments = () if segment_ids is None else (segment_ids,)
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        k, v, spec, kv_spec = split_heads(q, k, v, None)
        specs = (spec, kv_spec, kv_spec, *(PartitionSpec(spec[0], None) for _ in segments))
        one_shard = jax.shard_map(one_shard, mesh=mesh, in_specs=specs, out_specs=spec, check_vma=False)
    return jnp.swapaxes(one_shard(q, k, v, *segments), 1, 2)


def split_heads(
    q: Float[Array, "B N T H"], k: Float[Array, "B K T H"], v: Float[Array, "B K T H"], sequence: str | None
) -> tuple[jax.Array, jax.Array, PartitionSpec, PartitionSpec]:
    """Keys, values and the specs of queries and keys on the mesh in context: rows over the batch axes, heads over
    `tensor`.  Key-value heads that do not divide over it are repeated, so that each query head has its own."""
    spec = activation_spec(q.shape, "batch", "heads", sequence, None)
    kv_spec = activation_spec(k.shape, "batch", "kv_heads", sequence, None)
    if spec[1] != kv_spec[1]:
        k, v = (jnp.repeat(x, q.shape[1] // k.shape[1], axis=1) for x in (k, v))
        kv_spec = spec
    return k, v, spec, kv_spec
