"""The text-guided Q-Former: one frame's features `[P, E]` and one question → queries `[Q, C]`.

InstructBLIP's Q-Former as LLaMA-VID runs it: BERT whose sequence is Q learned queries and then the question's
tokens.  All attend to all; every nth layer lets the queries (only them) attend to the frame; queries and text have
feed-forwards of their own.  Queries carry no position, the embedding norm covers both.  Only the queries come out.

Everything here is about one frame and one question; `LlamaVid.frames_tokens` maps it over frames.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from llamavid_jax.attention.reference import reference_attention
from llamavid_jax.config.schema import LLaMAVIDLlavaQFormerConfig
from llamavid_jax.models import stack
from llamavid_jax.parallel.sharding import constrain

MEMORY_NORM_EPS = 1e-5  # InstructBLIP's ln_vision keeps torch's default, unlike every other norm here


def dropout(x: Float[Array, "*B C"], rate: float, key: Key[Array, ""] | None) -> Float[Array, "*B C"]:
    """Dropout in training; nothing where `key` is None."""
    if key is None:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0).astype(x.dtype)


def split(key: Key[Array, ""] | None, number: int) -> list[Key[Array, ""] | None]:
    return [None] * number if key is None else list(jax.random.split(key, number))


class Attention(nnx.Module):
    """BERT's attention with its output projection, residual and post-norm."""

    def __init__(self, config: LLaMAVIDLlavaQFormerConfig, memory_width: int, *, dtype, param_dtype, rngs: nnx.Rngs):
        width, heads = config.hidden_size, config.num_attention_heads
        linear = functools.partial(nnx.LinearGeneral, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.query = linear(width, (heads, width // heads))
        self.key = linear(memory_width, (heads, width // heads))
        self.value = linear(memory_width, (heads, width // heads))
        self.out = linear((heads, width // heads), width, axis=(-2, -1))
        self.norm = layer_norm(width, config.layer_norm_eps, param_dtype, rngs)
        self.dropout_rate = config.dropout

    def __call__(
        self,
        x: Float[Array, "T C"],
        memory: Float[Array, "S W"],
        mask: Bool[Array, " S"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "T C"]:
        key_weights, key_out = split(key, 2)
        attended = reference_attention(
            self.query(x),
            self.key(memory),
            self.value(memory),
            mask=mask,
            dropout_rate=self.dropout_rate,
            dropout_key=key_weights,
        )
        return self.norm(x + dropout(self.out(attended), self.dropout_rate, key_out)).astype(x.dtype)


class Mlp(nnx.Module):
    """BERT's feed-forward with residual and post-norm; queries and text have one each."""

    def __init__(self, config: LLaMAVIDLlavaQFormerConfig, *, dtype, param_dtype, rngs: nnx.Rngs):
        linear = functools.partial(nnx.Linear, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.fc1 = linear(config.hidden_size, config.intermediate_size)
        self.fc2 = linear(config.intermediate_size, config.hidden_size)
        self.norm = layer_norm(config.hidden_size, config.layer_norm_eps, param_dtype, rngs)
        self.dropout_rate = config.dropout

    def __call__(self, x: Float[Array, "T C"], key: Key[Array, ""] | None = None) -> Float[Array, "T C"]:
        hidden = jax.nn.gelu(self.fc1(x), approximate=False)
        return self.norm(x + dropout(self.fc2(hidden), self.dropout_rate, key)).astype(x.dtype)


class Layer(nnx.Module):
    """What every layer has; the cross-attention of every nth layer stands in a stack of its own."""

    def __init__(self, config: LLaMAVIDLlavaQFormerConfig, *, dtype, param_dtype, rngs: nnx.Rngs):
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        self.self_attention = Attention(config, config.hidden_size, **dtypes, rngs=rngs)
        self.text_mlp = Mlp(config, **dtypes, rngs=rngs)
        self.query_mlp = Mlp(config, **dtypes, rngs=rngs)


class QFormer(nnx.Module):
    def __init__(
        self,
        config: LLaMAVIDLlavaQFormerConfig,
        num_query: int,
        memory_width: int,
        *,
        dtype,
        param_dtype,
        rngs: nnx.Rngs,
        remat: str = "none",
    ):
        """`remat` names what the gradient keeps of a group of layers (`stack.REMAT`)."""
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        width = config.hidden_size
        embed = functools.partial(
            nnx.Embed, features=width, **dtypes, embedding_init=jax.nn.initializers.normal(0.02), rngs=rngs
        )
        self.query = nnx.Param(jax.nn.initializers.normal(0.02)(rngs.params(), (num_query, width), param_dtype))
        self.memory_norm = layer_norm(memory_width, MEMORY_NORM_EPS, param_dtype, rngs)
        self.word_embeddings = embed(config.vocab_size)
        self.position_embeddings = embed(config.max_position_embeddings)
        self.embeddings_norm = layer_norm(width, config.layer_norm_eps, param_dtype, rngs)
        self.layers = stack.stack(lambda rngs: Layer(config, **dtypes, rngs=rngs), config.num_hidden_layers, rngs)
        self.cross_attention = stack.stack(
            lambda rngs: Attention(config, memory_width, **dtypes, rngs=rngs), config.num_cross_attention_layers, rngs
        )
        self.config, self.remat = config, remat
        self.dtype = dtype

    @jax.named_scope("qformer")
    def __call__(
        self,
        features: Float[Array, "P E"],
        text_ids: Int[Array, " T"],
        text_mask: Bool[Array, " T"],
        dropout_key: Key[Array, ""] | None = None,
    ) -> Float[Array, "Q C"]:
        """Queries after the last layer.  `features` holds the CLS token for pixels, not for ready features.

        `text_mask` is True on real tokens of the question; `dropout_key` switches the dropout of training on.
        """
        memory = self.memory_norm(features).astype(self.dtype)  # only here: the patches stay un-normed elsewhere
        text = self.word_embeddings(text_ids) + self.position_embeddings(jnp.arange(len(text_ids)))
        queries = self.query.astype(self.dtype)
        number = len(queries)
        mask = jnp.concatenate([jnp.ones(number, bool), text_mask])
        key, key_embed = split(dropout_key, 2)
        x = self.embeddings_norm(jnp.concatenate([queries, text])).astype(self.dtype)
        x = dropout(x, self.config.dropout, key_embed)

        def group(modules: tuple[Layer, Attention], carry, size: int):
            """The layers from one cross-attention to the next."""
            (layers, cross), (x, key) = modules, carry
            for index in range(size):
                layer, x = stack.layer(layers, index), constrain(x, None, None)  # whole, though the kernels are cut
                key, key_self, key_cross, key_query, key_text = split(key, 5)
                x = layer.self_attention(x, x, mask, key_self)
                queries, text = x[:number], x[number:]
                if index == 0:
                    queries = cross(queries, memory, key=key_cross)
                x = jnp.concatenate([layer.query_mlp(queries, key_query), layer.text_mlp(text, key_text)])
            return (x, key), None

        # scanned, because a dozen unrolled layers take minutes to compile; what is left is an incomplete last group
        size = self.config.cross_attention_frequency
        whole, rest = divmod(self.config.num_hidden_layers, size)
        groups = (
            stack.part(self.layers, lambda p: p[: whole * size].reshape(whole, size, *p.shape[1:])),
            stack.part(self.cross_attention, lambda p: p[:whole]),
        )
        carry, _ = stack.scan(functools.partial(group, size=size), groups, (x, key), self.remat)
        if rest:
            last = stack.part(self.layers, lambda p: p[whole * size :]), stack.layer(self.cross_attention, whole)
            carry, _ = group(last, carry, size=rest)
        return carry[0][:number]


def layer_norm(width: int, epsilon: float, param_dtype, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """A layer norm in float32; the variance is that of the centred values, as torch computes it."""
    return nnx.LayerNorm(
        width, epsilon=epsilon, dtype=jnp.float32, param_dtype=param_dtype, use_fast_variance=False, rngs=rngs
    )
