"""LLaMA-VID: frames and a question become visual tokens, which take their slots among the text's embeddings.

    pixels [F, 3, H, W] ─ eva_vit ─▶ features [F, 1+P, E] ─ qformer + visual_tokens, one frame at a time ─▶ [F, n+1, D]
    token ids [B, T], visual tokens, one index a position ─ merge ─▶ [B, T, D] ─ llama ─▶ logits [B, T, V]

The compiled functions take `(graphdef, params)` apart, so that one program serves every model of one shape.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from llamavid_jax.config.schema import LLaMAVIDLlavaConfig
from llamavid_jax.models.eva_vit import EvaViT
from llamavid_jax.models.llama import Llama
from llamavid_jax.models.qformer import QFormer
from llamavid_jax.models.spread import spread
from llamavid_jax.models.visual_tokens import VisualTokens
from llamavid_jax.parallel.rows import take_slots
from llamavid_jax.parallel.sharding import constrain
from llamavid_jax.shapes import IGNORE_LABEL, TEXT

PAIR_CHUNK = 64  # pairs that a device compresses at a time; the original's blocks of frames


class LlamaVid(nnx.Module):
    """The whole model; parameters in `param_dtype`, products in `dtype` (the policy stands in `config/schema.py`)."""

    def __init__(
        self,
        config: LLaMAVIDLlavaConfig,
        *,
        rngs: nnx.Rngs,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        remat: str = "none",
        kv_cache: str = "float",
    ):
        """`remat` names what the gradient keeps of a layer (`stack.REMAT`), `kv_cache` a kind of `kv_cache.KINDS`."""
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        self.vision = EvaViT(config.vision_tower_config, **dtypes, rngs=rngs)
        memory_width = config.vision_tower_config.hidden_size
        self.qformer = QFormer(config.qformer_config, config.num_query, memory_width, **dtypes, rngs=rngs, remat=remat)
        self.visual_tokens = VisualTokens(config, **dtypes, rngs=rngs)
        self.llama = Llama(config.text_config, **dtypes, rngs=rngs, remat=remat, kv_cache=kv_cache)
        if config.quantization != "none":
            from llamavid_jax.models.quantize import quantize_base  # Qwix takes a second to import

            quantize_base(self, config.quantization)

    def frames_tokens(
        self,
        features: Float[Array, "G P E"],
        text_ids: Int[Array, "G T"],
        text_mask: Bool[Array, "G T"],
        dropout_keys: Key[Array, " G"] | None = None,
        *,
        has_cls: bool,
        remat: str = "none",
    ) -> Float[Array, "G n D"]:
        """Token compression of G pairs of a frame and a question, spread over the mesh: the context token first.

        `has_cls` says whether `features` start with the CLS token: yes after the vision tower, no for ready features
        of long videos.  The Q-Former sees it where it is there; the tokens never hold it.  `remat` as in
        `stack.REMAT`.
        """

        def one_frame(modules, features, *question):
            qformer, visual_tokens = modules
            queries = qformer(features, *question)
            return visual_tokens(features[1:] if has_cls else features, queries)

        def tokens(modules, *arrays):
            return jax.vmap(functools.partial(one_frame, modules))(*arrays)

        keys = () if dropout_keys is None else (dropout_keys,)
        arrays = features, text_ids, text_mask, *keys
        return spread(tokens, (self.qformer, self.visual_tokens), *arrays, at_a_time=PAIR_CHUNK, remat=remat)

    def merge(
        self, token_ids: Int[Array, "B T"], visual: Float[Array, "#B N D"], visual_index: Int[Array, "B T"]
    ) -> Float[Array, "B T D"]:
        """Embeds the text and puts visual tokens into their slots: one gather.

        `visual` holds each row's visual tokens, or has a first axis of 1 where all rows share one table.
        `visual_index` is the place in it of every position, TEXT where the position holds `token_ids`.
        """
        text = self.llama.embed_row(token_ids)
        seen = take_slots(visual, visual_index).astype(text.dtype)
        return jnp.where((visual_index == TEXT)[..., None], text, constrain(seen, "batch", "sequence", None))

    def __call__(
        self, token_ids: Int[Array, "B T"], visual: Float[Array, "#B N D"], visual_index: Int[Array, "B T"]
    ) -> Float[Array, "B T V"]:
        """Logits of every position."""
        return self.llama.logits(self.llama(self.merge(token_ids, visual, visual_index)))


def abstract_params(config: LLaMAVIDLlavaConfig, param_dtype=jnp.float32) -> dict[str, Any]:
    """The nested dict of parameters as shapes and types; nothing is allocated."""
    model = nnx.eval_shape(lambda: LlamaVid(config, rngs=nnx.Rngs(0), param_dtype=param_dtype))
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


@functools.partial(jax.jit, static_argnums=0)
def encode_frames(graphdef, params, pixels: Float[Array, "F 3 y x"]) -> Float[Array, "F P E"]:
    """The vision tower on one chunk of frames."""
    return nnx.merge(graphdef, params).vision(pixels)


@functools.partial(jax.jit, static_argnums=0, static_argnames="has_cls")
def compress_frames(
    graphdef,
    params,
    features: Float[Array, "F P E"],
    frame: Int[Array, " G"],
    text: Int[Array, " G"],
    text_ids: Int[Array, "U T"],
    text_mask: Bool[Array, "U T"],
    *,
    has_cls: bool,
) -> Float[Array, "G n D"]:
    """The tokens of G pairs of a frame and a question.

    `frame` and `text` index `features` and `text_ids`: the tower runs once a frame, the Q-Former once a pair.
    """
    model = nnx.merge(graphdef, params)
    return model.frames_tokens(features[frame], text_ids[text], text_mask[text], has_cls=has_cls)


@functools.partial(jax.jit, static_argnums=0)
def attend_frames(
    graphdef, params, features: Float[Array, "F P E"], text_ids: Int[Array, " T"], text_mask: Bool[Array, " T"]
) -> Float[Array, "F p"]:
    """Where in each frame the question looks: the context token's weights over the patches.  CLS first, not weighed."""
    model = nnx.merge(graphdef, params)

    def attend(features: jax.Array) -> jax.Array:
        return model.visual_tokens.context_attention(features[1:], model.qformer(features, text_ids, text_mask))

    return jax.vmap(attend)(features)


@functools.partial(jax.jit, static_argnums=0)
def forward(graphdef, params, token_ids, visual, visual_index) -> Float[Array, "B T V"]:
    """Logits of whole rows."""
    return nnx.merge(graphdef, params)(token_ids, visual, visual_index)


@jax.jit
def next_token_loss(logits: Float[Array, "B T V"], labels: Int[Array, "B T"]) -> Float[Array, ""]:
    """Mean cross-entropy of position t's logits against label t+1, over the labels that are not ignored."""
    targets = labels[:, 1:]
    kept = targets != IGNORE_LABEL
    log_probs = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32), axis=-1)
    picked = jnp.take_along_axis(log_probs, jnp.where(kept, targets, 0)[..., None], axis=-1)[..., 0]
    return -jnp.sum(picked * kept) / jnp.maximum(kept.sum(), 1)
