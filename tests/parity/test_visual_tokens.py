"""The token generator and the whole path of a frame, against the same arithmetic written in torch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from torch_models import (
    BAR,
    BERT,
    CLIP,
    CLIP_TOWER,
    CONFIG,
    SCALES,
    features_of,
    frame_error,
    ours,
    questions,
    reference,
    relative_error,
    tokens_error,
)

# Content tokens of a frame for sides 16 and 24; if n does not divide the side, they are not n².
COUNTS = {
    "none": (256, 576),
    "mean": (1, 1),
    "grid:2": (4, 4),
    "grid:3": (9, 9),
    "grid:4": (16, 16),
    "grid:5": (25, 36),
    "grid:6": (64, 36),
    "grid:7": (64, 64),
    "grid:12": (256, 144),
}


def configured(compress_type: str = "mean", side: int = 16, **changes):
    vision = dataclasses.replace(CONFIG.vision_tower_config, image_size=2 * side)
    return dataclasses.replace(CONFIG, vision_tower_config=vision, compress_type=compress_type, **changes)


@pytest.mark.parity
@pytest.mark.parametrize("side", [16, 24])
@pytest.mark.parametrize("compress_type", COUNTS)
def test_every_compress_type_equals_torch(compress_type, side):
    """Measured: at most 2e-7 at scale 0.02 and 4e-7 at 0.2."""
    config = configured(compress_type, side)
    assert config.tokens_per_frame == 1 + COUNTS[compress_type][side == 24]
    for scale in SCALES:
        assert tokens_error(scale, config) < BAR


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["linear", "mlp1x_gelu", "mlp2x_gelu", "mlp3x_gelu", "identity"])
def test_every_projector_equals_torch(kind):
    """Measured: as above."""
    text = dataclasses.replace(CONFIG.text_config, hidden_size=40)  # identity needs equal widths of vision and text
    for scale in SCALES:
        assert tokens_error(scale, configured("grid:2", mm_projector_type=kind, text_config=text)) < BAR


@pytest.mark.parity
@pytest.mark.parametrize(("compress_type", "has_cls"), [("mean", True), ("mean", False), ("none", True)])
def test_a_frame_equals_torch(compress_type, has_cls):
    """Q-Former and token generator, on the tower's features with CLS and on precomputed ones without; measured 1e-7."""
    for scale in SCALES:
        assert frame_error(scale, configured(compress_type), has_cls) < BAR


VARIANTS = {
    "BERT": BERT,
    "CLIP without CLS": CLIP,
    "CLIP, CLS among the patches": dataclasses.replace(
        CLIP, vision_tower_config=dataclasses.replace(CLIP_TOWER, select_feature="cls_patch"), compress_type="none"
    ),
    "EVA, CLS among the patches": dataclasses.replace(
        CONFIG, vision_tower_config=dataclasses.replace(CONFIG.vision_tower_config, select_feature="cls_patch")
    ),
    "CLIP and BERT": dataclasses.replace(BERT, vision_tower_config=CLIP_TOWER),
    "CLIP and a Q-Former that is not pretrained": dataclasses.replace(
        CONFIG, bert_type="qformer", vision_tower_config=CLIP_TOWER
    ),
}


@pytest.mark.parity
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_of_a_frame_equals_torch(variant):
    """The tower's own features, and precomputed ones without the CLS token; measured: at most 1e-7."""
    config = VARIANTS[variant]
    for has_cls in {config.vision_tower_config.has_cls, False}:
        for scale in SCALES:
            assert frame_error(scale, config, has_cls) < BAR


def test_the_context_token_comes_first():
    """With an identity projector the content tokens are the patches, unchanged."""
    text = dataclasses.replace(CONFIG.text_config, hidden_size=40)
    config = configured("none", mm_projector_type="identity", text_config=text)
    patches = jnp.asarray(features_of(config, 1.0, has_cls=False)[0])
    tokens = ours(config, 0.2).visual_tokens(patches, random_queries())
    assert np.array_equal(tokens[1:], patches)
    assert relative_error(tokens[0], patches.mean(0)) > 0.1


@pytest.mark.parametrize("compress_type", ["mean", "grid:2"])
def test_one_kind_of_token_alone_is_that_part_of_both(compress_type):
    patches = jnp.asarray(features_of(CONFIG, 1.0, has_cls=False)[0])
    both = ours(configured(compress_type), 0.2).visual_tokens(patches, random_queries())
    for kind, part in (("context", both[:1]), ("content", both[1:])):
        config = configured(compress_type, frame_tokens=kind)
        assert config.tokens_per_frame == len(part)
        np.testing.assert_array_equal(ours(config, 0.2).visual_tokens(patches, random_queries()), part)


def test_context_attention_is_what_the_context_token_saw():
    visual_tokens = ours(CONFIG, 0.2).visual_tokens
    patches = jnp.asarray(features_of(CONFIG, 1.0, has_cls=False)[0])
    weights = np.asarray(visual_tokens.context_attention(patches, random_queries()))
    token = visual_tokens(patches, random_queries())[0]
    value = reference(CONFIG, 0.2).vlm_att_val_projector
    assert np.isclose(weights.sum(), 1) and weights.min() >= 0
    assert relative_error(weights @ patches @ value.weight.numpy().T + value.bias.numpy(), token) < BAR


def test_frames_in_blocks_equal_all_at_once():
    """Long videos are processed in blocks: 8 blocks of 8 frames equal 64 frames at once."""
    features = np.random.default_rng(0).normal(size=(64, 256, 40)).astype(np.float32)
    ids, mask = (np.repeat(array[:1], 64, axis=0) for array in questions(CONFIG, 12))
    frames = jax.jit(functools.partial(ours(CONFIG, 0.2).frames_tokens, has_cls=False))
    blocks = [frames(*arrays) for arrays in zip(*(np.split(a, 8) for a in (features, ids, mask)), strict=True)]
    assert relative_error(np.concatenate(blocks), frames(features, ids, mask)) < BAR


def random_queries() -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=(8, 48)), jnp.float32)
