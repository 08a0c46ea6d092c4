"""Every variant of the model goes to JAX and back to PyTorch, bit for bit, in the layouts that know it."""

import dataclasses
import json

import numpy as np
import pytest
import safetensors.torch
import torch
from converted import CONFIG, assert_bit_equal, back, convert, save_folder, tensors
from paths import GOLDEN

from conversion import jax_to_torch
from conversion.torch_config import documented_config, original_config
from llamavid_jax.config.schema import LLaMAVIDLlavaConfig
from llamavid_jax.errors import CheckpointError
from llamavid_jax.weights.files import weight_table

VISION, QFORMER, TEXT = CONFIG.vision_tower_config, CONFIG.qformer_config, CONFIG.text_config
CLIP = dataclasses.replace(VISION, kind="clip", hidden_act="quick_gelu", layer_norm_eps=1e-5, feature_layer=-2)
BERT = {"bert_type": "raw_bert", "qformer_config": dataclasses.replace(QFORMER, cross_attention_frequency=1)}
CLS_PATCH = dataclasses.replace(VISION, select_feature="cls_patch")
SHORT = dataclasses.replace(QFORMER, num_hidden_layers=3)
BOTH = {  # variants that the documented layout has, too
    "mean": {},
    "CLS among EVA's patches": {"vision_tower_config": CLS_PATCH, "compress_type": "none"},
    "another mean and std": {
        "vision_tower_config": dataclasses.replace(VISION, image_mean=(0.5, 0.4, 0.3), image_std=(0.2, 0.25, 0.5))
    },
    "three layers": {"qformer_config": SHORT},
    "tied embeddings": {"text_config": dataclasses.replace(TEXT, tie_word_embeddings=True)},
}
ORIGINAL_ALONE = {
    "CLIP": {"vision_tower_config": CLIP},
    "CLIP with a wider Q-Former": {
        "vision_tower_config": CLIP,
        "qformer_config": dataclasses.replace(QFORMER, encoder_hidden_size=40),
    },
    "CLIP with CLS": {"vision_tower_config": dataclasses.replace(CLIP, select_feature="cls_patch", feature_layer=0)},
    "CLIP and BERT": {"vision_tower_config": CLIP, **BERT},
    "BERT": BERT,
    "a BERT of two layers": BERT | {"qformer_config": dataclasses.replace(BERT["qformer_config"], num_hidden_layers=2)},
    "a Q-Former that is not pretrained": {"bert_type": "qformer"},
    "start and end tokens": {"mm_use_im_start_end": True},
    "patch token": {"mm_use_im_patch_token": True},
    "all three tokens": {"mm_use_im_start_end": True, "mm_use_im_patch_token": True},
    "identity": {
        "mm_projector_type": "identity",
        "vision_tower_config": dataclasses.replace(VISION, hidden_size=TEXT.hidden_size),
    },
    "linear": {"mm_projector_type": "linear"},
    "three linear layers": {"mm_projector_type": "mlp3x_gelu"},
}
RECORDED = sorted(path.parent.name for path in GOLDEN.glob("*/case.json"))


def drawn(config: LLaMAVIDLlavaConfig, layout: str) -> dict[str, torch.Tensor]:
    """A checkpoint of random weights; EVA's key bias, which a file may contain, is zero."""
    random, found = np.random.default_rng(0), {}
    for weight in weight_table(config, layout):
        value = random.standard_normal(weight.shape, np.float32)
        if weight.third is not None:
            value.reshape(3, -1)[1] = 0
        found[weight.name] = torch.from_numpy(value)
    if layout == "original" and config.text_config.tie_word_embeddings:
        found["lm_head.weight"] = found["model.embed_tokens.weight"]
    return found


@pytest.mark.parametrize("name", RECORDED)
def test_recordings_come_back(name, tmp_path):
    convert(GOLDEN / name, tmp_path / "jax")
    assert_bit_equal(back(tmp_path / "jax", tmp_path / "back", "original"), tensors(GOLDEN / name))
    read = [LLaMAVIDLlavaConfig.from_pretrained(path) for path in (GOLDEN / name, tmp_path / "jax", tmp_path / "back")]
    assert read[0] == read[1] == read[2]


@pytest.mark.parametrize("name", BOTH | ORIGINAL_ALONE)
def test_drawn_weights_come_back(name, tmp_path):
    """In the original's layout."""
    config = dataclasses.replace(CONFIG, **(BOTH | ORIGINAL_ALONE)[name])
    values = drawn(config, "original")
    source = save_folder(tmp_path / "source", values, original_config(config))
    convert(source, tmp_path / "jax")
    assert LLaMAVIDLlavaConfig.from_pretrained(tmp_path / "jax") == config
    assert_bit_equal(back(tmp_path / "jax", tmp_path / "back", "original"), values)
    assert LLaMAVIDLlavaConfig.from_pretrained(tmp_path / "back") == config


@pytest.mark.parametrize("name", BOTH)
def test_drawn_weights_come_back_in_the_documented_layout(name, tmp_path):
    config = dataclasses.replace(CONFIG, **BOTH[name])
    values = drawn(config, "documented")
    (tmp_path / "source").mkdir()
    safetensors.torch.save_file(values, tmp_path / "source" / "model.safetensors")
    (tmp_path / "source" / "config.json").write_text(json.dumps(documented_config(config)))
    convert(tmp_path / "source", tmp_path / "jax")
    assert LLaMAVIDLlavaConfig.from_pretrained(tmp_path / "jax") == config
    assert_bit_equal(back(tmp_path / "jax", tmp_path / "back", "documented"), values)
    assert LLaMAVIDLlavaConfig.from_pretrained(tmp_path / "back") == config


@pytest.mark.parametrize("name", ORIGINAL_ALONE)
def test_the_documented_layout_refuses_the_others(name, tmp_path):
    """The error comes before anything is written and names the field that the layout cannot express."""
    config = dataclasses.replace(CONFIG, **ORIGINAL_ALONE[name])
    config.save_pretrained(tmp_path / "jax")
    with pytest.raises(CheckpointError, match=r"the documented layout has .* alone; use --layout original"):
        jax_to_torch.convert(tmp_path / "jax", tmp_path / "back", layout="documented")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("layout", ["original", "documented"])
def test_one_kind_of_visual_token_is_not_pytorch_s(layout, tmp_path):
    dataclasses.replace(CONFIG, frame_tokens="context").save_pretrained(tmp_path / "jax")
    with pytest.raises(CheckpointError, match=r"frame_tokens is 'context', but .* 'both' alone"):
        jax_to_torch.convert(tmp_path / "jax", tmp_path / "back", layout=layout)
