"""`attention(q, k, v)`: one function for the vision tower, prefill and decoding, that picks the backend.

| backend   | where                | what it takes                                                     |
|-----------|----------------------|-------------------------------------------------------------------|
| reference | everywhere           | any mask, any length; scores in blocks of queries                 |
| cudnn     | NVIDIA GPU, 16 bit   | causal or unmasked; fused, no scores in memory                    |
| splash    | TPU, v4 and later    | causal self-attention; Pallas kernel, no scores in memory         |

Rows that hold several samples (`segment_ids`) run on all three; cuDNN then gets the mask as an array `[B, 1, T, T]`.
Causal rows that are sharded over the mesh's `sequence` axis go to `ring.ring_attention`, whose tiles splash computes on
TPU.  Chunks of a prompt after a cached part have more keys than queries and use `chunk.chunk_attention` everywhere.

Every backend is compared with `reference_attention` in `tests/attention/test_attention.py`.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from llamavid_jax.attention.reference import reference_attention
from llamavid_jax.attention.ring import ring_attention, ring_supports
from llamavid_jax.attention.splash import splash_attention, splash_supports
from llamavid_jax.parallel.sharding import target

WITHOUT_KERNELS = ("TPU v2", "TPU v3")  # Pallas has no bfloat16 matmuls there
Backend = Literal["reference", "cudnn", "splash"]


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    mask: Bool[Array, "..."] | None = None,
    causal: bool = False,
    segment_ids: Int[Array, "B T"] | None = None,
    backend: Backend | None = None,
) -> Float[Array, "B T N H"]:
    """softmax(q kᵀ / √H) v with grouped-query heads.

    `mask` is True where a query may look at a key and broadcasts to `[B, N, T, S]`; it excludes `causal`.
    `segment_ids`, with `causal` only, number the samples that share a row: each attends only to itself.  `backend` None
    takes the fastest one that fits the device, the type and the mask.
    """
    if causal and mask is not None:
        raise ValueError("mask and causal exclude each other; put causality into the mask")
    if segment_ids is not None and not causal:
        raise ValueError("segment_ids go with causal=True; put the segments into the mask")
    backend = backend or _fastest(q, k, mask, causal)
    if causal and ring_supports(q, k):
        return ring_attention(q, k, v, segment_ids, splash=backend == "splash")
    match backend:
        case "cudnn":
            same = None if segment_ids is None else segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
            return jax.nn.dot_product_attention(q, k, v, mask=same, is_causal=causal, implementation="cudnn")
        case "splash":
            return splash_attention(q, k, v, segment_ids=segment_ids)
        case _:
            return reference_attention(q, k, v, mask=mask, causal=causal, segment_ids=segment_ids)


def _fastest(q: jax.Array, k: jax.Array, mask: jax.Array | None, causal: bool) -> Backend:
    if mask is not None:
        return "reference"
    device = target()
    match device.platform:
        case "gpu" if q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128:
            return "cudnn"
        case "tpu" if causal and splash_supports(q, k) and device.device_kind not in WITHOUT_KERNELS:
            return "splash"
        case _:
            return "reference"
