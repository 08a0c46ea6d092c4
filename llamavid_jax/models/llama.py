"""LLaMA, the language model: embeddings `[B, T, D]` → logits `[B, T, V]`, with or without a cache.

RMS norm, rotary attention with grouped-query heads, gated MLP.  The layers are stacked: training and prefill scan over
them; decoding loops over them in Python, because a scan that carries the cache copies all of it in every layer on a
GPU.  All share one definition of a layer, which is passed a different `attend`.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from llamavid_jax.attention.attention import attention
from llamavid_jax.attention.chunk import chunk_attention
from llamavid_jax.attention.reference import attention_to_prompt, cached_attention
from llamavid_jax.config.parts import LlamaConfig
from llamavid_jax.models import stack
from llamavid_jax.models.kv_cache import KeysValues, KVCache
from llamavid_jax.models.linear import Linear
from llamavid_jax.models.rotary import rotary, rotate
from llamavid_jax.parallel.sharding import constrain, target

Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # (q, k, v) of the new positions → attended


class Attention(nnx.Module):
    def __init__(self, config: LlamaConfig, *, dtype, param_dtype, rngs: nnx.Rngs):
        linear = functools.partial(Linear, use_bias=False, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        width, size = config.hidden_size, config.head_dim
        self.q = linear(width, (config.num_attention_heads, size))
        self.k = linear(width, (config.num_key_value_heads, size))
        self.v = linear(width, (config.num_key_value_heads, size))
        self.out = linear((config.num_attention_heads, size), width, axis=(-2, -1))

    def __call__(
        self, x: Float[Array, "B T D"], rotation: Float[Array, "2 #B T h"], attend: Attend
    ) -> Float[Array, "B T D"]:
        q, k, v = rotate(self.q(x), rotation), rotate(self.k(x), rotation), self.v(x)
        return self.out(attend(q, k, v))


class GatedMlp(nnx.Module):
    def __init__(self, config: LlamaConfig, *, dtype, param_dtype, rngs: nnx.Rngs):
        linear = functools.partial(Linear, use_bias=False, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.gate = linear(config.hidden_size, config.intermediate_size)
        self.up = linear(config.hidden_size, config.intermediate_size)
        self.down = linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Layer(nnx.Module):
    def __init__(self, config: LlamaConfig, *, dtype, param_dtype, rngs: nnx.Rngs):
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        self.attn_norm = rms_norm(config, param_dtype, rngs)
        self.attn = Attention(config, **dtypes, rngs=rngs)
        self.mlp_norm = rms_norm(config, param_dtype, rngs)
        self.mlp = GatedMlp(config, **dtypes, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], rotation: Float[Array, "2 #B T h"], attend: Attend
    ) -> Float[Array, "B T D"]:
        x = constrain(x, "batch", "sequence", None)
        x = x + self.attn(self.attn_norm(x), rotation, attend)
        return x + self.mlp(self.mlp_norm(x))


class Llama(nnx.Module):
    def __init__(
        self,
        config: LlamaConfig,
        *,
        dtype,
        param_dtype,
        rngs: nnx.Rngs,
        remat: str = "none",
        kv_cache: str = "float",
    ):
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        init = jax.nn.initializers.normal(0.02)
        self.embed = nnx.Embed(config.vocab_size, config.hidden_size, **dtypes, embedding_init=init, rngs=rngs)
        self.layers = stack.stack(lambda rngs: Layer(config, **dtypes, rngs=rngs), config.num_hidden_layers, rngs)
        self.norm = rms_norm(config, param_dtype, rngs)
        if not config.tie_word_embeddings:
            self.lm_head = nnx.Linear(config.hidden_size, config.vocab_size, use_bias=False, **dtypes, rngs=rngs)
        self.config, self.remat, self.kv_cache = config, remat, kv_cache

    def embed_row(self, token_ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """The embeddings of whole rows.  The table's shards over `fsdp` are gathered, rather than the rows."""
        table = constrain(self.embed.embedding.astype(self.embed.dtype), "vocab", None)
        rows = jnp.take(table, constrain(token_ids, "batch", "sequence"), axis=0)
        return constrain(rows, "batch", "sequence", None)

    def rotation(self, positions: Int[Array, "B T"]) -> Float[Array, "2 B T h"]:
        return rotary(positions, self.config.head_dim, self.config.rope_theta, self.config.rope_factor)

    @jax.named_scope("llama")
    def __call__(
        self,
        x: Float[Array, "B T D"],
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Final hidden states of whole rows.  Rows are padded on the right, where causality hides the padding.

        A row may hold several samples: `segment_ids` number them, `positions` count from 0 in each.
        """
        return self._causal(x, segment_ids, positions)[0]

    @jax.named_scope("prefill")
    def prefill(self, x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T D"], KeysValues]:
        """`__call__` that also returns the keys and values of all layers, for the cache."""
        return self._causal(x, None, None, keep=True)

    def _causal(self, x, segment_ids, positions, keep: bool = False):
        rotation = self.rotation(jnp.arange(x.shape[1])[None] if positions is None else positions)

        def apply(layer: Layer, x: jax.Array):
            seen = None

            def attend(q, k, v):
                nonlocal seen
                seen = KeysValues.of(k, v, self.kv_cache) if keep else None
                return attention(q, k, v, causal=True, segment_ids=segment_ids)

            return layer(x, rotation, attend), seen

        x, seen = stack.scan(apply, self.layers, x, self.remat)
        return self.norm(x), seen

    @jax.named_scope("extend")
    def extend(
        self, x: Float[Array, "B T D"], start: Int[Array, ""], prompt: KeysValues
    ) -> tuple[Float[Array, "B T D"], KeysValues]:
        """Prefill of the positions from `start` on, after those in `prompt`; also returns `prompt` extended by them."""
        rotation = self.rotation(start + jnp.arange(x.shape[1])[None])

        def apply(layer: Layer, carry: tuple[jax.Array, jax.Array]):
            x, index = carry
            seen = None

            def attend(q, k, v):
                nonlocal seen
                seen = KeysValues.of(k, v, self.kv_cache)
                earlier = functools.partial(prompt.block, index)
                return chunk_attention(q, k, v, earlier, prompt.slots, start)

            return (layer(x, rotation, attend), index + 1), seen

        (x, _), new = stack.scan(apply, self.layers, (x, jnp.int32(0)))
        return self.norm(x), prompt.write(new, start)

    def each_layer(self) -> list[Layer] | None:
        """The layers for `decode`, unstacked once before a loop of steps; None where each step does it.

        TPUs and GPUs read a layer's weights in place, in the stack.  A CPU copies them first, and in a loop it would do
        so in every step: six tenths of the time, with no memory saved.
        """
        if target().platform != "cpu":
            return None
        return [stack.layer(self.layers, index) for index in range(self.config.num_hidden_layers)]

    @jax.named_scope("decode")
    def decode(
        self,
        x: Float[Array, "B 1 D"],
        positions: Int[Array, " B"],
        cache: KVCache,
        layers: Sequence[Layer] | None = None,
    ) -> tuple[Float[Array, "B 1 D"], KVCache]:
        """One new position of every row: row b's is `positions[b]`, after those in the cache.

        `layers` are those of `each_layer`.
        """
        rotation, visible = self.rotation(positions[:, None]), cache.visible(positions)
        for index in range(self.config.num_hidden_layers):

            def attend(q, k, v, index=index):
                nonlocal cache
                cache = cache.write(index, k, v)
                return cached_attention(q, [cache.prompt.layer(index), cache.answer.layer(index)], visible)

            layer = stack.layer(self.layers, index) if layers is None else layers[index]
            x = layer(x, rotation, attend)
        return self.norm(x), cache._replace(written=cache.written + 1)

    @jax.named_scope("look_back")
    def look_back(
        self, x: Float[Array, "B A D"], start: Int[Array, " B"], asked: Float[Array, "B A"], prompt: KeysValues
    ) -> Float[Array, "B S"]:
        """How much of an answer's attention falls on each position of its prompt, mean over layers and heads.

        Row b's `x` are the positions from `start[b]` on, after its part of `prompt`; `asked` weights them in the sum.
        One layer's weights `[B, N, A, S]` are in memory at a time.
        """
        rotation = self.rotation(start[:, None] + jnp.arange(x.shape[1]))
        visible = jnp.arange(prompt.slots) < start[:, None]

        def apply(layer: Layer, carry: tuple[jax.Array, jax.Array]):
            x, index = carry
            seen = None

            def attend(q, k, v):
                nonlocal seen
                out, weights = attention_to_prompt(q, prompt.block(index, jnp.int32(0), prompt.slots), (k, v), visible)
                seen = jnp.einsum("bas,ba->bs", weights, asked)
                return out

            return (layer(x, rotation, attend), index + 1), seen

        _, seen = stack.scan(apply, self.layers, (x, jnp.int32(0)))
        return seen.mean(0)

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Float32 scores of the vocabulary."""
        if self.config.tie_word_embeddings:
            return self.embed.attend(hidden).astype(jnp.float32)
        return self.lm_head(hidden).astype(jnp.float32)

    def head_kernel(self) -> Float[Array, "D V"]:
        """The head's kernel, in the compute dtype: the loss takes it in chunks."""
        kernel = self.embed.embedding.T if self.config.tie_word_embeddings else self.lm_head.kernel
        return kernel.astype(self.embed.dtype)


def rms_norm(config: LlamaConfig, param_dtype, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(
        config.hidden_size, epsilon=config.rms_norm_eps, dtype=jnp.float32, param_dtype=param_dtype, rngs=rngs
    )
