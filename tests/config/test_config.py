"""Configurations: the shipped YAML files, the three forms of `config.json`, and what is refused."""

import json

import numpy as np
import pytest
import yaml
from paths import ROOT

from llamavid_jax.checkpoints.weights import abstract_params
from llamavid_jax.config.parts import CLIP_MEAN
from llamavid_jax.config.schema import LLaMAVIDLlavaConfig, grid_stride, projector_depth
from llamavid_jax.errors import ConfigError, InputError
from llamavid_jax.media.image_processor import LLaMAVIDLlavaImageProcessor
from llamavid_jax.weights import inventory

MODELS = ROOT / "configs" / "models"
ORIGINAL = {"model_type": "llava", "mm_hidden_size": 1408, "mm_vision_tower": "model_zoo/LAVIS/eva_vit_g.pth"}
LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}


def count(config: LLaMAVIDLlavaConfig, part: str = "") -> int:
    paths = abstract_params(config)
    return sum(int(np.prod(leaf.shape)) for path, leaf in paths.items() if path.startswith(part))


@pytest.mark.parametrize("file", sorted(MODELS.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_model_builds(file):
    """Every shipped configuration builds abstractly, and the sharding table has exactly its parameters."""
    config = LLaMAVIDLlavaConfig.from_yaml(file)
    paths = abstract_params(config)
    assert set(inventory.axes(config, {path: leaf.shape for path, leaf in paths.items()})) == set(paths)
    if "7b" in file.stem:
        billions = {"bert": 7.894, "clip": 7.256, "qformer": 7.807}.get(file.stem.rpartition("_")[2], 7.94)
        assert count(config) / 1e9 == pytest.approx(billions, abs=0.005)  # 7.94 is published


def test_13b_is_the_sum_of_its_parts():
    """Vicuna 13B has 13,015,864,320 parameters (published); vision and Q-Former are those of the 7B models."""
    small = LLaMAVIDLlavaConfig.from_yaml(MODELS / "llamavid_7b_224_video.yaml")
    large = LLaMAVIDLlavaConfig.from_yaml(MODELS / "llamavid_13b_224_video.yaml")
    assert count(large, "llama.") == 13_015_864_320
    assert count(small, "llama.") == 6_738_415_616
    assert count(large, "vision.") == count(small, "vision.")
    assert count(large, "qformer.") == count(small, "qformer.")
    projectors = (768 + 1) * 1408 + (1408 + 1) * 1408 + 2 * (1408 + 1) * 5120 + (5120 + 1) * 5120
    assert count(large, "visual_tokens.") == projectors
    assert count(large) == 13_015_864_320 + count(small, "vision.") + count(small, "qformer.") + projectors


@pytest.mark.parametrize(
    "name, tokens, length",
    [
        ("llamavid_7b_224_image", 257, 4096),
        ("llamavid_7b_336_image", 577, 4096),
        ("llamavid_13b_336_image", 577, 4096),
        ("llamavid_7b_224_video", 2, 4096),
        ("llamavid_13b_224_video", 2, 4096),
        ("llamavid_7b_224_long_video", 2, 65536),
    ],
)
def test_tokens_per_frame_and_positions(name, tokens, length):
    config = LLaMAVIDLlavaConfig.from_yaml(MODELS / f"{name}.yaml")
    assert (config.tokens_per_frame, config.text_config.max_length) == (tokens, length)


def test_released_long_video_config():
    """The published long-video file: mean_concat, num_qformer, qformer_pretrain_freeze, rope_scaling (1.11)."""
    config = LLaMAVIDLlavaConfig.from_dict(
        {
            **ORIGINAL,
            **LLAMA_7B,
            "bert_type": "qformer_pretrain_freeze",
            "compress_type": "mean_concat",
            "num_qformer": 32,
            "cross_att_freq": 2,
            "fusion_type": "attention_concat_all_query",
            "rope_scaling": {"type": "linear", "factor": 16.0},
            "max_position_embeddings": 4096,
            "max_token": 65536,
            "mm_projector_type": "mlp2x_gelu",
            "image_processor": "./model_zoo/OpenAI/clip-vit-large-patch14",
            "image_aspect_ratio": "pad",
            "rms_norm_eps": 1e-5,
        }
    )
    assert config == LLaMAVIDLlavaConfig.from_yaml(MODELS / "llamavid_7b_224_long_video.yaml")


def test_released_336_config():
    """Sizes that the original hard-codes default to the released ones; 336 px comes from the processor's name."""
    config = LLaMAVIDLlavaConfig.from_dict(
        {
            **ORIGINAL,
            **LLAMA_7B,
            "bert_type": "qformer_pretrain",
            "compress_type": None,
            "mm_projector_type": "mlp2x_gelu",
            "image_processor": "./llamavid/processor/clip-patch14-336",
            "image_aspect_ratio": "pad",
        }
    )
    assert config == LLaMAVIDLlavaConfig.from_yaml(MODELS / "llamavid_7b_336_image.yaml")


@pytest.mark.parametrize(
    "written, read", [("grid:4", "grid:4"), ("mean_concat", "mean"), ("x_grid:2", "grid:2"), (None, "none")]
)
def test_compress_type_by_substring(written, read):
    assert LLaMAVIDLlavaConfig.from_dict({**ORIGINAL, "compress_type": written}).compress_type == read


def test_grouped_heads_and_new_rope_form():
    """A newer LLaMA base: grouped-query heads, `rope_parameters`, tied embeddings, a list of end tokens."""
    config = LLaMAVIDLlavaConfig.from_dict(
        {
            **ORIGINAL,
            **LLAMA_7B,
            "vocab_size": 128256,
            "num_key_value_heads": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
            "tie_word_embeddings": True,
            "eos_token_id": [128001, 128009],
        }
    ).text_config
    assert (config.num_key_value_heads, config.rope_theta, config.tie_word_embeddings) == (8, 500000.0, True)
    assert config.eos_token_id == 128001


def test_save_and_load(tmp_path):
    config = LLaMAVIDLlavaConfig.from_yaml(MODELS / "tiny.yaml")
    config.save_pretrained(tmp_path)
    assert LLaMAVIDLlavaConfig.from_pretrained(tmp_path) == config
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_parts_are_saved_and_loaded_by_themselves(tmp_path):
    config = LLaMAVIDLlavaConfig.from_yaml(MODELS / "tiny.yaml")
    config.save_pretrained(tmp_path / "whole")
    for part in (config.vision_tower_config, config.qformer_config, config.text_config):
        assert type(part).from_pretrained(tmp_path / "whole") == part
        part.save_pretrained(tmp_path / "part")
        assert type(part).from_pretrained(tmp_path / "part") == part


@pytest.mark.parametrize(
    "side, kind, tokens",
    [(16, "grid:2", 4), (16, "grid:6", 64), (16, "grid:7", 64), (16, "grid:12", 256), (24, "grid:5", 36)],
)
def test_grid_counts(side, kind, tokens):
    """A grid whose number does not divide the side has another count of tokens than its square."""
    assert (side // grid_stride(kind, side)) ** 2 == tokens


def test_projector_depths():
    kinds = ["identity", "linear", "mlp1x_gelu", "mlp2x_gelu", "mlp12x_gelu"]
    assert [projector_depth(kind) for kind in kinds] == [0, 1, 1, 2, 12]


OWN = {"model_type": "llamavid_jax"}
BAD = {
    "unknown field compres_type": {**OWN, "compres_type": "mean"},
    "unknown field text_config.layers": {**OWN, "text_config": {"layers": 2}},
    "vision_tower_config.hidden_size is '64'": {**OWN, "vision_tower_config": {"hidden_size": "64"}},
    "num_query is 8.5": {**OWN, "num_query": 8.5},
    "text_config.tie_word_embeddings is 1": {**OWN, "text_config": {"tie_word_embeddings": 1}},
    "text_config is 3; a mapping": {**OWN, "text_config": 3},
    "compress_type is 'median'": {**OWN, "compress_type": "median"},
    "frame_tokens is 'none'": {**OWN, "frame_tokens": "none"},
    "compress_type is 'grid:1'": {**OWN, "compress_type": "grid:1"},
    "compress_type is 'grid:17'": {**OWN, "compress_type": "grid:17"},
    "mm_projector_type is 'mlp0x_gelu'": {**OWN, "mm_projector_type": "mlp0x_gelu"},
    "mm_projector_type is 'resampler'": {**OWN, "mm_projector_type": "resampler"},
    "'identity' needs vision and text of one width": {**OWN, "mm_projector_type": "identity"},
    "image_aspect_ratio is 'square'": {**OWN, "image_aspect_ratio": "square"},
    "text_config.rope_factor is 0.5": {**OWN, "text_config": {"rope_factor": 0.5}},
    "image_size is 225, which is not a positive multiple of patch_size": {
        **OWN,
        "vision_tower_config": {"image_size": 225},
    },
    "num_attention_heads is 32, which is not a positive multiple of num_key_value_heads = 5": {
        **OWN,
        "text_config": {"num_key_value_heads": 5},
    },
    "num_query is -1; a number above 0": {**OWN, "num_query": -1},
    "num_query is True": {**OWN, "num_query": True},
    "text_config is None": {**OWN, "text_config": None},
    "mm_projector_type is None": {**OWN, "mm_projector_type": None},
    "compress_type is 'grid:²'": {**OWN, "compress_type": "grid:²"},
    "mm_projector_type is 'mlp²x_gelu'": {**OWN, "mm_projector_type": "mlp²x_gelu"},
    "vision_tower_config.num_hidden_layers is -1": {**OWN, "vision_tower_config": {"num_hidden_layers": -1}},
    "vision_tower_config.layer_norm_eps is nan": {**OWN, "vision_tower_config": {"layer_norm_eps": float("nan")}},
    "qformer_config.cross_attention_frequency is 0": {**OWN, "qformer_config": {"cross_attention_frequency": 0}},
    "qformer_config.dropout is 2.0; use": {**OWN, "qformer_config": {"dropout": 2}},
    "text_config.vocab_size is 0": {**OWN, "text_config": {"vocab_size": 0}},
    "text_config.hidden_size is -1": {**OWN, "text_config": {"hidden_size": -1}},
    "text_config.head_dim is 15, which is not": {**OWN, "text_config": {"head_dim": 15}},
    "text_config.rope_theta is 0.0": {**OWN, "text_config": {"rope_theta": 0}},
    "text_config.rope_factor is inf": {**OWN, "text_config": {"rope_factor": float("inf")}},
    "text_config.rope_factor is 1000": {**OWN, "text_config": {"rope_factor": 10**400}},
    "text_config.max_position_embeddings is -5": {**OWN, "text_config": {"max_position_embeddings": -5}},
    "text_config.eos_token_id is 32000; vocab_size allows 0 to 31999": {**OWN, "text_config": {"eos_token_id": 32000}},
    "text_config.eos_token_id is -1": {**OWN, "text_config": {"eos_token_id": -1}},
    "config.rope_parameters is [1]": {**ORIGINAL, "rope_parameters": [1]},
    "model_type is 'llama': a language model alone": {"model_type": "llama", "hidden_size": 8},
    "model_type is 'qwen2'": {"model_type": "qwen2"},
    "model_type is None": {},
    "known are EVA ('eva', 'lavis') and CLIP": {**ORIGINAL, "mm_vision_tower": "google/siglip"},
    "of width 1408, but no vision_tower_config says its sizes": {
        **ORIGINAL,
        "mm_vision_tower": "openai/clip-vit-large-patch14",
    },
    "bert_type is 'bert'; known are": {**ORIGINAL, "bert_type": "bert"},
    "bert_type is 'qformer_layer:6_pretrain'; the number": {**ORIGINAL, "bert_type": "qformer_layer:6_pretrain"},
    "mm_use_im_start_end is 'yes'": {**ORIGINAL, "mm_use_im_start_end": "yes"},
    "select_feature is 'cls'; use 'patch' or 'cls_patch'": {**ORIGINAL, "mm_vision_select_feature": "cls"},
    "no place in a grid": {**ORIGINAL, "mm_vision_select_feature": "cls_patch", "compress_type": "grid:2"},
    "feature_layer is -26; this tower has -25 to 24": {
        "mm_vision_tower": "openai/clip-vit-large-patch14",
        "mm_vision_select_layer": -26,
    },
    "feature_layer is -2; this tower has -1, its last": {**OWN, "vision_tower_config": {"feature_layer": -2}},
    "image_mean is (0.5,); three numbers": {**OWN, "vision_tower_config": {"image_mean": [0.5]}},
    "image_std is (1.0, 1.0, 0.0)": {**OWN, "vision_tower_config": {"image_std": [1.0, 1.0, 0.0]}},
    "cross_attention_frequency is 2, but every layer": {**OWN, "bert_type": "raw_bert", "qformer_config": {}},
    "only linear scaling is known": {**ORIGINAL, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "hidden_act is 'gelu'": {**ORIGINAL, "hidden_act": "gelu"},
    "attention_bias is true": {**ORIGINAL, "attention_bias": True},
    "compress_type is 3": {**ORIGINAL, "compress_type": 3},
    "bert_type is ['qformer']": {**ORIGINAL, "bert_type": ["qformer"]},
    "config.hidden_size is '4096'": {**ORIGINAL, "hidden_size": "4096"},
    "config.rope_scaling is 16": {**ORIGINAL, "rope_scaling": 16},
    "config.rope_scaling.factor is 'x'": {**ORIGINAL, "rope_scaling": {"type": "linear", "factor": "x"}},
    "config.num_hidden_layers is 2.0": {**ORIGINAL, "num_hidden_layers": 2.0},
    "text_config is [1]": {"model_type": "llamavid", "text_config": [1]},
    "projector_hidden_act is 'relu'": {"model_type": "llamavid", "projector_hidden_act": "relu"},
}


@pytest.mark.parametrize("message", BAD)
def test_refused(message, tmp_path):
    """Each error names the file, the field and the value."""
    (tmp_path / "config.json").write_text(json.dumps(BAD[message]))
    with pytest.raises(ConfigError) as error:
        LLaMAVIDLlavaConfig.from_pretrained(tmp_path)
    assert message in str(error.value)
    assert str(tmp_path / "config.json") in str(error.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"3", b"null", b"[" * 10**5, b"9" * 5000])
def test_not_a_configuration(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config.json"):
        LLaMAVIDLlavaConfig.from_pretrained(tmp_path)


def test_a_python_value_out_of_range():
    with pytest.raises(ConfigError, match="num_query is 0; a number above 0"):
        LLaMAVIDLlavaConfig(num_query=0)


def test_a_path_that_is_no_path(tmp_path):
    with pytest.raises(ConfigError, match="not readable JSON"):
        LLaMAVIDLlavaConfig.from_pretrained("a\0b")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file cannot be written to .*; give a folder"):
        LLaMAVIDLlavaConfig().save_pretrained(tmp_path / "file")


def test_two_files_that_contradict_each_other(tmp_path):
    """Refused, as nobody can tell which of the two the model was trained with."""
    config = LLaMAVIDLlavaConfig.from_dict(OWN)
    config.save_pretrained(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps({"image_mean": list(CLIP_MEAN), "image_std": [0.5, 0.5, 0.5]}))
    said = r"preprocessor_config.json: image_std is \[0.5, 0.5, 0.5\], but config.json beside it says \[0.26862954, "
    for read in (LLaMAVIDLlavaConfig, LLaMAVIDLlavaImageProcessor):
        with pytest.raises(ConfigError, match=said):
            read.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=said):
        config.with_pixels_of(tmp_path)


def test_missing_configuration(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        LLaMAVIDLlavaConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["compress_type: [", "3", "compress_tipe: mean"])
def test_bad_yaml(text, tmp_path):
    file = tmp_path / "model.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"model\.yaml: "):
        LLaMAVIDLlavaConfig.from_yaml(file)


def test_yaml_names_are_fields():
    assert yaml.safe_load((MODELS / "tiny.yaml").read_text())["text_config"]["head_dim"] == 16
