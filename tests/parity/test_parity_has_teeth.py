"""Every bug that a port of this model has had, or could have, breaks parity.

A row names a file, a piece of its source and the same piece with a bug.  The file runs with the bug in place of the
original, and the comparison of the parity tests must then fail by a factor of at least ten at one of the two scales.
Two bugs are left out because they change no result: a key bias, which adds one number to all scores of a query, and
rotary positions that do not start at 0, because only their differences count.
"""

import dataclasses
import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from torch_models import (
    BAR,
    BERT,
    CLIP,
    CONFIG,
    SCALES,
    frame_error,
    llama_error,
    qformer_error,
    structure,
    tokens_error,
    vision_error,
)

LLAMA, ROTARY, ATTENTION = "models.llama", "models.rotary", "attention.reference"
VISION, QFORMER, TOKENS, WHOLE = "models.vision", "models.text_decoder", "models.visual_tokens", "models.llama_vid"


def unpooled_error(scale: float) -> float:
    """Patches that are not averaged are large enough to distinguish the projector's GELU from another."""
    return tokens_error(scale, dataclasses.replace(CONFIG, compress_type="none"))


def clip_error(scale: float) -> float:
    return vision_error(scale, CLIP)


def bert_error(scale: float) -> float:
    return qformer_error(scale, BERT)


def bert_frame_error(scale: float) -> float:
    return frame_error(scale, BERT)


def cls_patch_error(scale: float) -> float:
    vision = dataclasses.replace(CONFIG.vision_tower_config, select_feature="cls_patch")
    return frame_error(scale, dataclasses.replace(CONFIG, vision_tower_config=vision))


BUGS: dict[str, tuple[Callable, str, str, str]] = {
    # the decoder
    "rotary base 1e6": (llama_error, LLAMA, "self.config.rope_theta", "1e6"),
    "no linear scaling": (llama_error, LLAMA, "self.config.rope_factor", "1.0"),
    "positions times the factor": (llama_error, ROTARY, ") / factor", ") * factor"),
    "rotary frequencies of the whole head": (llama_error, ROTARY, "/ head_dim)", "/ (2 * head_dim))"),
    "interleaved rotary pairs": (
        llama_error,
        ROTARY,
        "jnp.split(x.astype(jnp.float32), 2, axis=-1)",
        "(x.astype(jnp.float32)[..., ::2], x.astype(jnp.float32)[..., 1::2])",
    ),
    "rotation the other way": (llama_error, ROTARY, "jnp.sin(angles)", "-jnp.sin(angles)"),
    "no rotation": (
        llama_error,
        LLAMA,
        "rotate(self.q(x), rotation), rotate(self.k(x), rotation)",
        "self.q(x), self.k(x)",
    ),
    "rotated values": (llama_error, LLAMA, "self.v(x)\n", "rotate(self.v(x), rotation)\n"),
    "no 1/sqrt(H)": (llama_error, ATTENTION, " * size**-0.5", ""),
    "1/sqrt(D)": (llama_error, ATTENTION, "size**-0.5", "(size * heads) ** -0.5"),
    "key-value heads in turn": (
        llama_error,
        ATTENTION,
        "q.reshape(*batch, kv_heads,",
        "q.reshape(*batch, heads // kv_heads, kv_heads, length, size).swapaxes(-3, -4).reshape(*batch, kv_heads,",
    ),
    "no causal mask": (llama_error, LLAMA, "causal=True", "causal=False"),
    "a position does not see itself": (llama_error, ATTENTION, ">= jnp.arange(keys)", "> jnp.arange(keys)"),
    "RMS epsilon 1e-6": (llama_error, LLAMA, "epsilon=config.rms_norm_eps", "epsilon=1e-6"),
    "layer norm for RMS norm": (
        llama_error,
        LLAMA,
        "nnx.RMSNorm(\n",
        "functools.partial(nnx.LayerNorm, use_bias=False)(\n",
    ),
    "no final norm": (llama_error, LLAMA, "return self.norm(x), seen", "return x, seen"),
    "GELU for SiLU": (llama_error, LLAMA, "jax.nn.silu", "jax.nn.gelu"),
    "gate and up swapped": (llama_error, LLAMA, "silu(self.gate(x)) * self.up(x)", "silu(self.up(x)) * self.gate(x)"),
    "one norm for both halves": (llama_error, LLAMA, "self.mlp(self.mlp_norm(x))", "self.mlp(self.attn_norm(x))"),
    "parallel halves": (
        llama_error,
        LLAMA,
        "x = x + self.attn(self.attn_norm(x), rotation, attend)\n        return x +",
        "return x + self.attn(self.attn_norm(x), rotation, attend) +",
    ),
    # the vision tower
    "vision epsilon 1e-5": (vision_error, VISION, "epsilon=config.layer_norm_eps", "epsilon=1e-5"),
    "vision GELU by tanh": (vision_error, VISION, '"gelu": gelu', '"gelu": jax.nn.gelu'),
    "no query bias": (vision_error, VISION, "q + self.q_bias.astype(q.dtype)", "q"),
    "no value bias": (vision_error, VISION, "v + self.v_bias.astype(v.dtype)", "v"),
    "biases swapped": (vision_error, VISION, "q + self.q_bias", "q + self.v_bias"),
    "no vision 1/sqrt(H)": (vision_error, ATTENTION, " * size**-0.5", ""),
    "no positions": (vision_error, VISION, " + self.position.astype(self.dtype)", ""),
    "CLS last": (
        vision_error,
        VISION,
        "jnp.concatenate([cls, patches], axis=1)",
        "jnp.concatenate([patches, cls], axis=1)",
    ),
    "post-norm blocks": (vision_error, VISION, "x + self.attn(self.attn_norm(x))", "self.attn_norm(x + self.attn(x))"),
    "a final norm": (
        vision_error,
        VISION,
        "        return x if config.has_cls",
        "        x = x / jnp.std(x, -1, keepdims=True)\n        return x if config.has_cls",
    ),
    "rows and columns of a patch swapped": (vision_error, VISION, 'p q c", p=side', 'q p c", p=side'),
    "patches by columns": (vision_error, VISION, "f (y x) p q c", "f (x y) p q c"),
    "no norm before CLIP's blocks": (
        clip_error,
        VISION,
        "x if self.pre_norm is None else self.pre_norm(x).astype(self.dtype)",
        "x",
    ),
    "CLIP epsilon 1e-6": (clip_error, VISION, "epsilon=config.layer_norm_eps", "epsilon=1e-6"),
    "GELU for CLIP's": (clip_error, VISION, '"quick_gelu": quick_gelu', '"quick_gelu": gelu'),
    "CLIP's query and key swapped": (clip_error, VISION, "self.q(x), self.k(x)", "self.k(x), self.q(x)"),
    "all of CLIP's blocks": (clip_error, VISION, "p[: config.blocks_used]", "p"),
    "a block of CLIP's too few": (clip_error, VISION, "config.blocks_used", "config.blocks_used - 1"),
    "CLIP's final norm": (
        clip_error,
        VISION,
        "        return x if config.has_cls",
        "        x = self.post_norm(x)\n        return x if config.has_cls",
    ),
    "the last patch dropped for CLIP's CLS": (clip_error, VISION, "x[:, 1:]", "x[:, :-1]"),
    # BERT
    "BERT without a causal mask": (bert_error, QFORMER, " & jnp.tri(len(text_ids), dtype=bool)", ""),
    "BERT's padding seen": (bert_error, QFORMER, "text_mask & jnp.tri", "jnp.tri"),
    "no type of BERT's tokens": (bert_error, QFORMER, " + self.token_type_embeddings(jnp.zeros_like(text_ids))", ""),
    "the second type of BERT's tokens": (bert_error, QFORMER, "jnp.zeros_like(text_ids)", "jnp.ones_like(text_ids)"),
    "BERT without cross-attention": (
        bert_error,
        QFORMER,
        "cross(x, memory, key=key_cross) if index == 0 else x",
        "x",
    ),
    "BERT reads the CLS token": (
        bert_frame_error,
        WHOLE,
        "patches if decoder.is_bert else features",
        "features",
    ),
    "BERT's padding does not ask": (bert_frame_error, WHOLE, "text_ids >= 0 if", "question[0] if"),
    "the CLS token kept out of cls_patch": (cls_patch_error, WHOLE, " and not visual_tokens.keeps_cls", ""),
    # the Q-Former
    "memory epsilon 1e-6": (qformer_error, QFORMER, "MEMORY_NORM_EPS = 1e-5", "MEMORY_NORM_EPS = 1e-6"),
    "memory epsilon 1e-12": (qformer_error, QFORMER, "MEMORY_NORM_EPS = 1e-5", "MEMORY_NORM_EPS = 1e-12"),
    "no memory norm": (qformer_error, QFORMER, "self.memory_norm(features)", "features"),
    "BERT epsilon 1e-5": (qformer_error, QFORMER, "config.layer_norm_eps", "1e-5"),
    "Q-Former GELU by tanh": (qformer_error, QFORMER, "gelu(self.fc1(x))", "jax.nn.gelu(self.fc1(x))"),
    "queries with positions": (
        qformer_error,
        QFORMER,
        "jnp.concatenate([self.query.astype(self.dtype), text])",
        "jnp.concatenate([self.query + self.position_embeddings(jnp.arange(len(self.query))), text])",
    ),
    "text positions behind the queries": (
        qformer_error,
        QFORMER,
        "jnp.arange(len(text_ids))",
        "jnp.arange(len(text_ids)) + len(self.query)",
    ),
    "no text positions": (qformer_error, QFORMER, " + self.position_embeddings(jnp.arange(len(text_ids)))", ""),
    "the text mask ignored": (
        qformer_error,
        QFORMER,
        "jnp.ones(number, bool), text_mask",
        "jnp.ones(number + len(text_ids), bool)",
    ),
    "queries not embedding-normed": (
        qformer_error,
        QFORMER,
        "self.embeddings_norm(x)",
        "jnp.concatenate([x[:number], self.embeddings_norm(x[number:])])",
    ),
    "cross-attention in odd layers": (qformer_error, QFORMER, "if index == 0:\n", "if index == 1:\n"),
    "cross-attention in every layer": (
        qformer_error,
        QFORMER,
        "if index == 0:\n",
        "if True:\n",
    ),
    "no cross-attention": (qformer_error, QFORMER, "if index == 0:\n", "if False:\n"),
    "cross-attention for the text too": (
        qformer_error,
        QFORMER,
        "queries = cross(queries, memory, key=key_cross)",
        "queries, text = (cross(part, memory) for part in (queries, text))",
    ),
    "the layers after the last whole group left out": (qformer_error, QFORMER, "if rest:", "if False:"),
    "one feed-forward for both": (qformer_error, QFORMER, "layer.text_mlp(text", "layer.query_mlp(text"),
    "feed-forwards swapped": (
        qformer_error,
        QFORMER,
        "layer.query_mlp(queries, key_query), layer.text_mlp(text, key_text)",
        "layer.text_mlp(queries, key_query), layer.query_mlp(text, key_text)",
    ),
    "pre-norm attention": (
        qformer_error,
        QFORMER,
        "self.norm(x + dropout(self.out(attended)",
        "x + self.norm(dropout(self.out(attended)",
    ),
    "the text comes out": (qformer_error, QFORMER, "else carry[0][:number]", "else carry[0][-number:]"),
    # the token generator, alone and behind the Q-Former
    "no sqrt(E)": (tokens_error, TOKENS, " / math.sqrt(k.shape[-1])", ""),
    "sqrt of the Q-Former's width": (tokens_error, TOKENS, "math.sqrt(k.shape[-1])", "math.sqrt(queries.shape[-1])"),
    "softmax over the queries": (
        tokens_error,
        TOKENS,
        "jax.nn.softmax(scores, axis=-1)",
        "jax.nn.softmax(scores, axis=0)",
    ),
    "the first query alone": (tokens_error, TOKENS, "return weights.mean(axis=0)", "return weights[0]"),
    "the sum over queries": (tokens_error, TOKENS, "return weights.mean(axis=0)", "return weights.sum(axis=0)"),
    "projected values": (
        tokens_error,
        TOKENS,
        "weights.astype(self.dtype), patches",
        "weights, self.key_projector(patches)",
    ),
    "content before context": (
        tokens_error,
        TOKENS,
        "jnp.concatenate(tokens)",
        "jnp.concatenate(tokens[::-1])",
    ),
    "pooling after the projection": (
        tokens_error,
        TOKENS,
        "content = pool_patches(patches, self.stride).astype(self.dtype)",
        "content = patches",
        "tokens.append(content)",
        "tokens.append(pool_patches(content, self.stride))",
    ),
    "maximum for mean": (tokens_error, TOKENS, '"mean", p=', '"max", p='),
    "projector GELU by tanh": (unpooled_error, TOKENS, "gelu(content)", "jax.nn.gelu(content)"),
    "GELU before the first layer": (tokens_error, TOKENS, "if index else content", "if True else content"),
    "the memory norm on the patches too": (
        frame_error,
        WHOLE,
        "features[1:] if has_cls and not visual_tokens.keeps_cls else features",
        "decoder.memory_norm(features[1:])",
    ),
    "the last patch dropped for the CLS token": (frame_error, WHOLE, "features[1:] if", "features[:-1] if"),
    "the Q-Former without the CLS token": (
        frame_error,
        WHOLE,
        "visual_tokens.memory(patches if decoder.is_bert else features)",
        "visual_tokens.memory(patches)",
    ),
}


@pytest.fixture(autouse=True)
def made_anew():
    """No cached model from before a bug is inserted, and none with the bug afterwards."""
    structure.cache_clear()
    yield
    structure.cache_clear()


def put_bug_in(monkeypatch: pytest.MonkeyPatch, name: str, *pieces: str) -> None:
    """Runs `llamavid_jax.name` with its source changed and replaces its definitions wherever they are used."""
    module = importlib.import_module(f"llamavid_jax.{name}")
    source = Path(module.__file__).read_text()
    for old, new in zip(pieces[::2], pieces[1::2], strict=True):
        assert old in source, f"{old!r} is not in {name} any more; write this bug anew"
        source = source.replace(old, new)
    changed = {"__name__": module.__name__}
    exec(compile(source, f"{module.__file__} with a bug", "exec"), changed)
    for user in [user for key, user in sys.modules.items() if key.startswith("llamavid_jax.")]:
        for attribute, value in list(vars(user).items()):
            if getattr(value, "__module__", None) == module.__name__ and attribute in changed:
                monkeypatch.setattr(user, attribute, changed[attribute])


@pytest.mark.parity
@pytest.mark.parametrize("bug", BUGS)
def test_bug_breaks_parity(bug, monkeypatch):
    error, name, *pieces = BUGS[bug]
    put_bug_in(monkeypatch, name, *pieces)
    errors = []
    while len(errors) < len(SCALES) and not (errors and errors[-1] > 10 * BAR):
        errors.append(error(SCALES[-1 - len(errors)]))
    print(f"{bug}: {', '.join(f'{value:.0e}' for value in errors)}")
    assert np.max(errors) > 10 * BAR


@pytest.mark.parity
def test_without_a_bug_the_changed_source_is_the_original(monkeypatch):
    """The machinery of this file alone changes nothing."""
    for name in (LLAMA, ROTARY, ATTENTION, VISION, QFORMER, TOKENS, WHOLE):
        put_bug_in(monkeypatch, name, "import jax", "import jax")
    for error in (llama_error, vision_error, qformer_error, tokens_error, frame_error):
        assert error(SCALES[-1]) < BAR
