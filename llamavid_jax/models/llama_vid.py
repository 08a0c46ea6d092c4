"""LLaMA-VID: frames and a question become visual tokens, which take their slots among the text's embeddings.

    pixels [F, 3, H, W] ─ vision ─▶ features [F, 1+P, E] ─ qformer + visual_tokens, one frame at a time ─▶ [F, n+1, D]
    token ids [B, T], visual tokens, one index a position ─ merge ─▶ [B, T, D] ─ llama ─▶ logits [B, T, V]

The compiled functions take a Structure and its parameters separately, so one program serves all models of a structure.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from llamavid_jax.config.schema import LLaMAVIDLlavaConfig
from llamavid_jax.models.llama import Llama
from llamavid_jax.models.spread import spread
from llamavid_jax.models.structure import Params, Structure
from llamavid_jax.models.text_decoder import TextDecoder
from llamavid_jax.models.vision import VisionTower
from llamavid_jax.models.visual_tokens import VisualTokens
from llamavid_jax.parallel.rows import take_slots
from llamavid_jax.parallel.sharding import constrain
from llamavid_jax.shapes import TEXT

PAIR_CHUNK = 64  # pairs that a device compresses at a time; the original's blocks of frames


class LlamaVid(nnx.Module):
    """The whole model; parameters in `param_dtype`, matmuls in `dtype` (the policy is in `config/schema.py`)."""

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
        self.vision = VisionTower(config.vision_tower_config, **dtypes, rngs=rngs)
        self.qformer = TextDecoder(config, **dtypes, rngs=rngs, remat=remat)
        self.visual_tokens = VisualTokens(config, **dtypes, rngs=rngs)
        self.llama = Llama(config.text_config, **dtypes, rngs=rngs, remat=remat, kv_cache=kv_cache)
        if config.quantization != "none":
            from llamavid_jax.models.quantize import quantize_base  # Qwix takes a second to import

            quantize_base(self.llama, config.quantization)

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

        `has_cls` says whether `features` start with the CLS token, as EVA's do and the precomputed features of long
        videos do not.  `text_ids` are negative beyond the padding to a sample's longest question.  `remat` as in
        `stack.REMAT`.
        """

        def one_frame(modules, *arrays):
            return modules[1](*_asked(modules, *arrays, has_cls=has_cls))

        def tokens(modules, *arrays):
            return jax.vmap(functools.partial(one_frame, modules))(*arrays)

        keys = () if dropout_keys is None else (dropout_keys,)
        arrays = features, text_ids, text_mask, *keys
        return spread(tokens, (self.qformer, self.visual_tokens), *arrays, at_a_time=PAIR_CHUNK, remat=remat)

    def merge(
        self,
        token_ids: Int[Array, "B T"],
        visual: Float[Array, "#B N D"],
        visual_index: Int[Array, "B T"],
        learns: Bool[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Embeds the text and puts visual tokens into their slots: one gather.

        `visual` holds each row's visual tokens, or has a first axis of 1 where all rows share one table.
        `visual_index` is every position's index into it, TEXT where the position holds `token_ids`.  If `learns` is
        given, the text embeddings of positions where it is False get no gradient.
        """
        text = self.llama.embed_row(token_ids)
        text = text if learns is None else jnp.where(learns[..., None], text, jax.lax.stop_gradient(text))
        seen = take_slots(visual, visual_index).astype(text.dtype)
        return jnp.where((visual_index == TEXT)[..., None], text, constrain(seen, "batch", "sequence", None))

    def __call__(
        self, token_ids: Int[Array, "B T"], visual: Float[Array, "#B N D"], visual_index: Int[Array, "B T"]
    ) -> Float[Array, "B T V"]:
        """Logits of every position."""
        return self.llama.logits(self.llama(self.merge(token_ids, visual, visual_index)))


def _asked(modules: tuple[TextDecoder, VisualTokens], features, text_ids, *question, has_cls: bool) -> tuple:
    """One frame's patches, the states that query it, and which of these count (None: all).

    The CLS token counts as a patch only where `select_feature` says so.  The Q-Former reads it in any case, BERT only
    as a patch.
    """
    decoder, visual_tokens = modules
    patches = features[1:] if has_cls and not visual_tokens.keeps_cls else features
    memory = visual_tokens.memory(patches if decoder.is_bert else features)
    return patches, decoder(memory, text_ids, *question), text_ids >= 0 if decoder.is_bert else None


@functools.partial(jax.jit, static_argnums=0)
def encode_frames(structure: Structure, params: Params, pixels: Float[Array, "F 3 y x"]) -> Float[Array, "F P E"]:
    """The vision tower on one chunk of frames."""
    return structure.model(params).vision(pixels)


@functools.partial(jax.jit, static_argnums=0, static_argnames="has_cls")
def compress_frames(
    structure: Structure,
    params: Params,
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
    model = structure.model(params)
    return model.frames_tokens(features[frame], text_ids[text], text_mask[text], has_cls=has_cls)


@functools.partial(jax.jit, static_argnums=0, static_argnames="has_cls")
def attend_frames(
    structure: Structure,
    params: Params,
    features: Float[Array, "F P E"],
    text_ids: Int[Array, " T"],
    text_mask: Bool[Array, " T"],
    *,
    has_cls: bool,
) -> Float[Array, "F p"]:
    """Where in each frame the question looks: the context token's weights over the patches."""
    model = structure.model(params)
    modules = model.qformer, model.visual_tokens

    def attend(features: jax.Array) -> jax.Array:
        return model.visual_tokens.context_attention(*_asked(modules, features, text_ids, text_mask, has_cls=has_cls))

    return jax.vmap(attend)(features)


@functools.partial(jax.jit, static_argnums=0)
def forward(structure: Structure, params: Params, token_ids, visual, visual_index) -> Float[Array, "B T V"]:
    """Logits of whole rows."""
    return structure.model(params)(token_ids, visual, visual_index)
