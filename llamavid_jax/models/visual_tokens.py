"""The token generator: one frame's features and queries → one context token and n content tokens, `[n+1, D]`.

Paper section 3.2; the original's `token_generation`.  The context token sums up where the question looks: the raw
patches, weighted by the queries' mean attention.  The content tokens are the patches, pooled or not.
"""

import functools
import math

import jax
import jax.numpy as jnp
from einops import reduce
from flax import nnx
from jaxtyping import Array, Bool, Float

from llamavid_jax.config.schema import LLaMAVIDLlavaConfig, grid_stride, projector_depth
from llamavid_jax.models.activation import gelu


def pool_patches(patches: Float[Array, "P E"], stride: int) -> Float[Array, "n E"]:
    """Average pooling over the square of patches; incomplete windows at the edge are dropped, as avg_pool2d does."""
    if stride == 0:
        return patches
    if patches.shape[0] == stride**2 + 1:  # the CLS token is one of them
        return patches.astype(jnp.float32).mean(axis=0, keepdims=True).astype(patches.dtype)
    side = math.isqrt(patches.shape[0])
    kept = side // stride * stride
    square = patches.reshape(side, side, -1)[:kept, :kept]
    return reduce(square.astype(jnp.float32), "(y p) (x q) e -> (y x) e", "mean", p=stride, q=stride).astype(
        patches.dtype
    )


class VisualTokens(nnx.Module):
    def __init__(self, config: LLaMAVIDLlavaConfig, *, dtype, param_dtype, rngs: nnx.Rngs):
        vision, text = config.vision_tower_config.hidden_size, config.text_config.hidden_size
        linear = functools.partial(nnx.Linear, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.to_memory = linear(vision, config.memory_width) if config.projects_memory else None
        self.query_projector = linear(config.qformer_config.hidden_size, vision)
        self.key_projector = linear(vision, vision)
        self.value_projector = linear(vision, text)
        depth = projector_depth(config.mm_projector_type)
        self.projector = nnx.List([linear(vision if i == 0 else text, text) for i in range(depth)])
        self.kinds = ("context", "content") if config.frame_tokens == "both" else (config.frame_tokens,)
        self.stride = grid_stride(config.compress_type, config.vision_tower_config.side)
        self.keeps_cls = config.vision_tower_config.select_feature == "cls_patch"
        self.dtype = dtype

    def memory(self, features: Float[Array, "S E"]) -> Float[Array, "S W"]:
        """The features as the text decoder reads them, in its width."""
        return features if self.to_memory is None else self.to_memory(features)

    def context_attention(
        self, patches: Float[Array, "P E"], queries: Float[Array, "Q C"], counted: Bool[Array, " Q"] | None = None
    ) -> Float[Array, " P"]:
        """Where the question looks: float32 weights over the patches, summing to one.

        They are the mean over the queries, or over those where `counted` is True.
        """
        q, k = self.query_projector(queries), self.key_projector(patches)
        scores = jnp.einsum("qe,pe->qp", q, k, preferred_element_type=jnp.float32) / math.sqrt(k.shape[-1])
        weights = jax.nn.softmax(scores, axis=-1)
        if counted is None:
            return weights.mean(axis=0)
        return jnp.sum(weights, axis=0, where=counted[:, None]) / jnp.maximum(counted.sum(), 1)  # padding has none

    @jax.named_scope("visual_tokens")
    def __call__(
        self, patches: Float[Array, "P E"], queries: Float[Array, "Q C"], counted: Bool[Array, " Q"] | None = None
    ) -> Float[Array, "n D"]:
        """`[context, content...]` of one frame.  `patches` are not normed; `counted` as above.

        The attention weights are averaged over the queries: this equals the original's mean of Q weighted sums, at the
        cost of one sum.
        """
        tokens = []
        if "context" in self.kinds:
            weights = self.context_attention(patches, queries, counted)
            context = jnp.einsum("p,pe->e", weights.astype(self.dtype), patches.astype(self.dtype))
            tokens.append(self.value_projector(context)[None])
        if "content" in self.kinds:
            content = pool_patches(patches, self.stride).astype(self.dtype)
            for index, linear in enumerate(self.projector):
                content = linear(gelu(content) if index else content)
            tokens.append(content)
        return jnp.concatenate(tokens)
