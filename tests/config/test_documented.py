"""The documented constructors: their fields, transformers' own configurations, and what does not apply."""

import dataclasses

import pytest
import transformers

from llamavid_jax import LLaMAVIDLlavaConfig, LLaMAVIDLlavaQFormerConfig, LLaMAVIDLlavaVisionConfig
from llamavid_jax.errors import ConfigError

SMALL = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}


@pytest.mark.parametrize("make", [dict, transformers.LlamaConfig])
def test_text_config(make):
    text = LLaMAVIDLlavaConfig(text_config=make(**SMALL, vocab_size=320)).text_config
    assert (text.hidden_size, text.num_key_value_heads, text.head_dim, text.vocab_size) == (64, 2, 16, 320)


@pytest.mark.parametrize("name", ["vision_config", "vision_tower_config"])
@pytest.mark.parametrize("make", [dict, LLaMAVIDLlavaVisionConfig])
def test_vision_config(name, make):
    config = LLaMAVIDLlavaConfig(**{name: make(hidden_size=64, num_attention_heads=4, qkv_bias=True)})
    assert (config.vision_tower_config.hidden_size, config.vision_tower_config.kind) == (64, "eva")


def test_a_clip_tower():
    """transformers' own CLIP; the pretrained Q-Former reads width 1408, through a projection."""
    clip = transformers.CLIPVisionConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=5)
    config = LLaMAVIDLlavaConfig(vision_config=clip, vision_feature_layer=-3, vision_feature_select_strategy="full")
    vision = config.vision_tower_config
    assert (vision.kind, vision.hidden_act, vision.blocks_used, vision.select_feature) == (
        "clip", "quick_gelu", 3, "cls_patch",
    )  # fmt: skip
    assert LLaMAVIDLlavaConfig(vision_config=clip, bert_type="qformer_pretrain").memory_width == 1408
    large = LLaMAVIDLlavaVisionConfig(model_type="clip_vision_model")
    assert (large.hidden_size, large.num_hidden_layers, large.layer_norm_eps) == (1024, 24, 1e-5)


@pytest.mark.parametrize(
    ("bert_type", "read", "layers", "every"),
    [
        ("qformer_pretrain_freeze_all", "qformer_pretrain", 12, 2),
        ("qformer_freeze", "qformer", 12, 2),
        ("raw_bert", "raw_bert", 12, 1),
        ("raw_bert_layer:3", "raw_bert", 3, 1),
        ("qformer_pretrain_layer:6", "qformer_pretrain", 6, 2),
        ("qformer_pretrain_layer:20", "qformer_pretrain", 12, 2),
    ],
)
def test_bert_type(bert_type, read, layers, every):
    config = LLaMAVIDLlavaConfig(bert_type=bert_type)
    qformer = config.qformer_config
    assert (config.bert_type, qformer.num_hidden_layers, qformer.cross_attention_frequency) == (read, layers, every)


def test_other_fields():
    qformer = LLaMAVIDLlavaQFormerConfig(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2, hidden_act="gelu")
    config = LLaMAVIDLlavaConfig(
        qformer_config=qformer, num_query=8, compress_type=None, mm_hidden_size=1408, hidden_size=4096,
        ignore_index=-100, projector_hidden_act="gelu", image_token_index=32000,
    )  # fmt: skip
    assert (config.qformer_config.dropout, config.compress_type, config.num_query) == (0.2, "none", 8)
    assert LLaMAVIDLlavaConfig(compress_type="mean_concat").compress_type == "mean"


def test_a_configuration_made_again_is_itself():
    """`dataclasses.replace` and `from_dict` of `to_dict` use the same constructor and return an equal configuration."""
    clip = dataclasses.replace(LLaMAVIDLlavaConfig().vision_tower_config, kind="clip")
    for config in (LLaMAVIDLlavaConfig(bert_type="raw_bert"), LLaMAVIDLlavaConfig(vision_tower_config=clip)):
        assert dataclasses.replace(config) == config
        assert LLaMAVIDLlavaConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("message", "make"),
    [
        ("attention_dropout is 0.1, which", lambda: LLaMAVIDLlavaVisionConfig(attention_dropout=0.1)),
        ("vision_tower_config.qkv_bias is False", lambda: LLaMAVIDLlavaConfig(vision_config={"qkv_bias": False})),
        ("unknown field vision_tower_config.depth", lambda: LLaMAVIDLlavaVisionConfig(depth=3)),
        ("qformer_config.position_embedding_type is", lambda: LLaMAVIDLlavaQFormerConfig(position_embedding_type="x")),
        ("dropout rates of", lambda: LLaMAVIDLlavaQFormerConfig(hidden_dropout_prob=0, attention_probs_dropout_prob=1)),
        ("unknown field layers", lambda: LLaMAVIDLlavaConfig(layers=3)),
        ("mm_hidden_size is not 1408", lambda: LLaMAVIDLlavaConfig(mm_hidden_size=1024)),
        ("ignore_index is -1, which", lambda: LLaMAVIDLlavaConfig(ignore_index=-1)),
        ("projector_hidden_act is 'relu'", lambda: LLaMAVIDLlavaConfig(projector_hidden_act="relu")),
        ("text_config is of type int", lambda: LLaMAVIDLlavaConfig(text_config=3)),
        ("another hidden_size", lambda: LLaMAVIDLlavaConfig(vision_config={"hidden_size": 64}, vision_tower_config={})),
        ("bert_type is 'bert'", lambda: LLaMAVIDLlavaConfig(bert_type="bert")),
        ("vision_feature_select_strategy is 'cls'", lambda: LLaMAVIDLlavaConfig(vision_feature_select_strategy="cls")),
    ],
)  # fmt: skip
def test_what_does_not_apply_is_named(message, make):
    with pytest.raises(ConfigError, match=message):
        make()
