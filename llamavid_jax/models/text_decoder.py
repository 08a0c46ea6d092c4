"""The text decoder: one frame's features `[S, W]` and one question → the states that query the frame.

    Q-Former  Q learned queries and then the question's tokens; all attend to all.  In every nth layer the queries
              alone attend to the frame.  Queries and text have separate feed-forwards.  Returns the queries' states.
    BERT      the question's tokens, each attending to those before it and, in every layer, to the frame.  Returns all
              its states, those of padding too.

Queries have no position embedding; the embedding norm applies to queries and text.  Everything here handles one frame
and one question; `LlamaVid.frames_tokens` maps it over frames.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from llamavid_jax.attention.reference import reference_attention
from llamavid_jax.config.parts import LLaMAVIDLlavaQFormerConfig
from llamavid_jax.config.schema import LLaMAVIDLlavaConfig
from llamavid_jax.models import stack
from llamavid_jax.models.activation import gelu
from llamavid_jax.parallel.sharding import constrain

MEMORY_NORM_EPS = 1e-5  # InstructBLIP's ln_vision keeps torch's default, unlike every other norm here


def dropout(x: Float[Array, "*B C"], rate: float, key: Key[Array, ""] | None) -> Float[Array, "*B C"]:
    """Dropout in training; `x` unchanged where `key` is None."""
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
        mask: Bool[Array, " S"] | Bool[Array, "T S"] | None = None,
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
        hidden = gelu(self.fc1(x))
        return self.norm(x + dropout(self.fc2(hidden), self.dropout_rate, key)).astype(x.dtype)


class Layer(nnx.Module):
    """The modules that every layer has; the cross-attention of every nth layer is in a separate stack."""

    def __init__(self, config: LLaMAVIDLlavaQFormerConfig, has_queries: bool, *, dtype, param_dtype, rngs: nnx.Rngs):
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        self.self_attention = Attention(config, config.hidden_size, **dtypes, rngs=rngs)
        self.text_mlp = Mlp(config, **dtypes, rngs=rngs)
        self.query_mlp = Mlp(config, **dtypes, rngs=rngs) if has_queries else None


class TextDecoder(nnx.Module):
    def __init__(self, model: LLaMAVIDLlavaConfig, *, dtype, param_dtype, rngs: nnx.Rngs, remat: str = "none"):
        """`remat` names what the gradient keeps of a group of layers (`stack.REMAT`)."""
        config, dtypes = model.qformer_config, {"dtype": dtype, "param_dtype": param_dtype}
        width, self.is_bert = config.hidden_size, model.bert_type == "raw_bert"
        embed = functools.partial(
            nnx.Embed, features=width, **dtypes, embedding_init=jax.nn.initializers.normal(0.02), rngs=rngs
        )
        query = jax.nn.initializers.normal(0.02)(rngs.params(), (model.num_query, width), param_dtype)
        self.query = None if self.is_bert else nnx.Param(query)
        has_norm = model.bert_type == "qformer_pretrain"
        self.memory_norm = layer_norm(model.memory_width, MEMORY_NORM_EPS, param_dtype, rngs) if has_norm else None
        self.word_embeddings = embed(config.vocab_size)
        self.position_embeddings = embed(config.max_position_embeddings)
        self.token_type_embeddings = embed(2) if self.is_bert else None
        self.embeddings_norm = layer_norm(width, config.layer_norm_eps, param_dtype, rngs)
        self.layers = stack.stack(
            lambda rngs: Layer(config, not self.is_bert, **dtypes, rngs=rngs), config.num_hidden_layers, rngs
        )
        self.cross_attention = stack.stack(
            lambda rngs: Attention(config, model.memory_width, **dtypes, rngs=rngs),
            config.num_cross_attention_layers,
            rngs,
        )
        self.config, self.remat = config, remat
        self.dtype = dtype

    @jax.named_scope("qformer")
    def __call__(
        self,
        features: Float[Array, "S W"],
        text_ids: Int[Array, " T"],
        text_mask: Bool[Array, " T"],
        dropout_key: Key[Array, ""] | None = None,
    ) -> Float[Array, "Q C"]:
        """The states after the last layer: of the queries, or of BERT's text.

        `text_mask` is True on the question's own tokens; `dropout_key` switches the dropout of training on.
        """
        memory = features.astype(self.dtype)
        if self.memory_norm is not None:  # only here: the patches stay un-normed elsewhere
            memory = self.memory_norm(features).astype(self.dtype)
        text = self.word_embeddings(jnp.maximum(text_ids, 0)) + self.position_embeddings(jnp.arange(len(text_ids)))
        if self.is_bert:
            number, x = 0, text + self.token_type_embeddings(jnp.zeros_like(text_ids))
            mask = text_mask & jnp.tri(len(text_ids), dtype=bool)
        else:
            number, x = len(self.query), jnp.concatenate([self.query.astype(self.dtype), text])
            mask = jnp.concatenate([jnp.ones(number, bool), text_mask])
        key, key_embed = split(dropout_key, 2)
        x = dropout(self.embeddings_norm(x).astype(self.dtype), self.config.dropout, key_embed)

        def group(modules: tuple[Layer, Attention], carry, size: int):
            """The layers from one cross-attention to the next."""
            (layers, cross), (x, key) = modules, carry
            for index in range(size):
                layer, x = stack.layer(layers, index), constrain(x, None, None)  # replicated, unlike the kernels
                key, key_self, key_cross, key_query, key_text = split(key, 5)
                x = layer.self_attention(x, x, mask, key_self)
                if self.is_bert:
                    x = layer.text_mlp(cross(x, memory, key=key_cross) if index == 0 else x, key_text)
                    continue
                queries, text = x[:number], x[number:]
                if index == 0:
                    queries = cross(queries, memory, key=key_cross)
                x = jnp.concatenate([layer.query_mlp(queries, key_query), layer.text_mlp(text, key_text)])
            return (x, key), None

        # scanned, because a dozen unrolled layers take minutes to compile; `rest` layers are an incomplete last group
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
        return carry[0] if self.is_bert else carry[0][:number]


def layer_norm(width: int, epsilon: float, param_dtype, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """A layer norm in float32; the variance is that of the centred values, as torch computes it."""
    return nnx.LayerNorm(
        width, epsilon=epsilon, dtype=jnp.float32, param_dtype=param_dtype, use_fast_variance=False, rngs=rngs
    )
