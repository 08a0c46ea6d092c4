"""`config.json` in the two PyTorch forms: what `LLaMAVIDLlavaConfig` reads back as the same configuration."""

from typing import Any

from llamavid_jax.config.parts import LlamaConfig, LLaMAVIDLlavaVisionConfig
from llamavid_jax.config.schema import LLaMAVIDLlavaConfig
from llamavid_jax.errors import CheckpointError


def llama_values(text: LlamaConfig) -> dict[str, Any]:
    """LLaMA's configuration under transformers' names."""
    return {
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "num_hidden_layers": text.num_hidden_layers,
        "num_attention_heads": text.num_attention_heads,
        "num_key_value_heads": text.num_key_value_heads,
        "head_dim": text.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": text.max_position_embeddings,
        "rms_norm_eps": text.rms_norm_eps,
        "rope_theta": text.rope_theta,
        "rope_scaling": None if text.rope_factor == 1 else {"type": "linear", "factor": text.rope_factor},
        "tie_word_embeddings": text.tie_word_embeddings,
        "eos_token_id": text.eos_token_id,
    }


BERT_LAYERS = 12  # of BERT-base; the original drops those after N where `bert_type` says "layer:N"


def _vision_values(vision: LLaMAVIDLlavaVisionConfig) -> dict[str, Any]:
    kind = {"model_type": "clip_vision_model"} if vision.kind == "clip" else {"qkv_bias": True}
    return {
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.intermediate_size,
        "num_hidden_layers": vision.num_hidden_layers,
        "num_attention_heads": vision.num_attention_heads,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "layer_norm_eps": vision.layer_norm_eps,
        "hidden_act": vision.hidden_act,
        "image_mean": list(vision.image_mean),
        "image_std": list(vision.image_std),
        **kind,
    }


def _part_values(config: LLaMAVIDLlavaConfig) -> dict[str, Any]:
    """The sizes of the tower and the text decoder, which the original keeps in code.

    Raises CheckpointError for frames of one kind of token, which the PyTorch classes do not support.
    """
    if config.frame_tokens != "both":
        raise CheckpointError(
            f"frame_tokens is {config.frame_tokens!r}, but both PyTorch layouts have 'both' alone; such a model stays "
            "in this form"
        )
    vision, qformer = config.vision_tower_config, config.qformer_config
    layers = "" if qformer.num_hidden_layers == BERT_LAYERS else f"_layer:{qformer.num_hidden_layers}"
    return {
        "vision_tower_config": _vision_values(vision),
        "qformer_config": {
            "vocab_size": qformer.vocab_size,
            "hidden_size": qformer.hidden_size,
            "num_hidden_layers": qformer.num_hidden_layers,
            "num_attention_heads": qformer.num_attention_heads,
            "intermediate_size": qformer.intermediate_size,
            "max_position_embeddings": qformer.max_position_embeddings,
            "layer_norm_eps": qformer.layer_norm_eps,
            "cross_attention_frequency": qformer.cross_attention_frequency,
            "encoder_hidden_size": config.memory_width,
            "hidden_dropout_prob": qformer.dropout,
            "attention_probs_dropout_prob": qformer.dropout,
        },
        "bert_type": config.bert_type + layers,
        "num_query": config.num_query,
        "compress_type": None if config.compress_type == "none" else config.compress_type,
        "mm_hidden_size": vision.hidden_size,
        "hidden_size": config.text_config.hidden_size,
        "vocab_size": config.text_config.vocab_size,
    }


def original_config(config: LLaMAVIDLlavaConfig) -> dict[str, Any]:
    """The original's form: LLaMA's fields flat, LLaMA-VID's beside them.  Raises CheckpointError as `_part_values`."""
    vision = config.vision_tower_config
    is_clip, size = vision.kind == "clip", vision.image_size
    clip, layer = f"./model_zoo/OpenAI/clip-vit-large-patch14{'-336' * (size == 336)}", vision.feature_layer
    return {
        "model_type": "llava",
        "architectures": ["LlavaLlamaAttForCausalLM"],
        **llama_values(config.text_config),
        **_part_values(config),
        "max_token": config.text_config.max_length,
        "mm_vision_tower": clip if is_clip else "./model_zoo/LAVIS/eva_vit_g.pth",
        "image_processor": clip if is_clip else f"./llamavid/processor/clip-patch14-{size}",
        "mm_projector_type": config.mm_projector_type,
        "mm_use_im_start_end": config.mm_use_im_start_end,
        "mm_use_im_patch_token": config.mm_use_im_patch_token,
        "mm_vision_select_feature": vision.select_feature,
        "mm_vision_select_layer": layer if is_clip else -2,  # which EVA ignores
        "image_aspect_ratio": config.image_aspect_ratio,
        "use_mm_proj": True,
    }


def documented_config(config: LLaMAVIDLlavaConfig) -> dict[str, Any]:
    """The transformers port's form.  Raises CheckpointError for what it does not support."""
    vision = config.vision_tower_config
    for name, value, known in (
        ("mm_projector_type", config.mm_projector_type, "mlp2x_gelu"),
        ("bert_type", config.bert_type, "qformer_pretrain"),
        ("vision_tower_config.kind", vision.kind, "eva"),
        ("qformer_config.encoder_hidden_size", config.memory_width, config.tower_width),
        ("mm_use_im_start_end", config.mm_use_im_start_end, False),
        ("mm_use_im_patch_token", config.mm_use_im_patch_token, False),
    ):
        if value != known:
            raise CheckpointError(
                f"{name} is {value!r}, but the documented layout has {known!r} alone; use --layout original"
            )
    strategy = "full" if vision.select_feature == "cls_patch" else "default"
    return {
        "model_type": "llamavid",
        "architectures": ["LLaMAVIDLlavaForConditionalGeneration"],
        "text_config": {"model_type": "llama", **llama_values(config.text_config)},
        **_part_values(config),
        "bert_type": config.bert_type,
        "image_token_index": config.image_token_index,
        "image_aspect_ratio": config.image_aspect_ratio,
        "projector_hidden_act": "gelu",
        "ignore_index": -100,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": strategy,
    }
