"""Causal self-attention on TPU by JAX's own Pallas splash-attention kernel.

Tokamax wraps the same kernel; taken from JAX itself, it needs no further dependency.  Under a mesh it runs per shard:
rows over the batch axes, heads over `tensor`; a row cut over `sequence` is gathered for it.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from llamavid_jax.sharding import activation_spec

BLOCK = 512  # queries and keys held in VMEM at a time
LANES = 128  # lengths must be a multiple of it


def splash_supports(q: jax.Array, k: jax.Array) -> bool:
    """Whether the shapes fit the kernel: self-attention over a multiple of 128 positions, heads of 64 or more."""
    return q.shape[1] == k.shape[1] and q.shape[1] % LANES == 0 and q.shape[-1] % 64 == 0


def splash_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"] | None = None,
    *,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Causal softmax(q kᵀ / √H) v, within segments where they are given.  `interpret` runs it on a CPU, for tests."""
    length, heads, size = q.shape[1:]
    if not splash_supports(q, k):
        raise ValueError(f"splash attention takes T a multiple of {LANES} and H of 64, not q {q.shape} and k {k.shape}")

    def one_shard(q: jax.Array, k: jax.Array, v: jax.Array, *segments: jax.Array) -> jax.Array:
        block = next(b for b in (BLOCK, 256, LANES) if length % b == 0)
        sizes = kernel.BlockSizes(
            block_q=block, block_kv=block, block_kv_compute=block,
            block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=block, block_q_dq=block, block_kv_dq=block,
        )  # fmt: skip
        mask = masks.MultiHeadMask([masks.CausalMask((length, length))] * q.shape[1])
        groups = q.shape[1] // k.shape[1]
        k, v = (jnp.repeat(x, groups, axis=1) for x in (k, v))
        run = kernel.make_splash_mha_single_device(mask=mask, block_sizes=sizes, interpret=interpret)
        return jax.vmap(run)(q * size**-0.5, k, v, *(kernel.SegmentIds(s, s) for s in segments))

    segments = () if segment_ids is None else (segment_ids,)
    spec = activation_spec((q.shape[0], heads, length, size), "batch", "heads", None, None)
    kv_spec = activation_spec((k.shape[0], k.shape[2], length, size), "batch", "kv_heads", None, None)
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        if spec[1] != kv_spec[1]:  # key-value heads do not divide over the mesh: give each query head its own
            k, v = (jnp.repeat(x, heads // k.shape[2], axis=2) for x in (k, v))
            kv_spec = spec
        specs = (spec, kv_spec, kv_spec, *(PartitionSpec(spec[0], None) for _ in segments))
        one_shard = jax.shard_map(one_shard, mesh=mesh, in_specs=specs, out_specs=spec, check_vma=False)
    swap = functools.partial(jnp.swapaxes, axis1=1, axis2=2)
    return swap(one_shard(swap(q), swap(k), swap(v), *segments))
