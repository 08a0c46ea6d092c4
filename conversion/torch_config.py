"""`config.json` in the two PyTorch forms: what `LLaMAVIDLlavaConfig` reads back as the same configuration."""

from typing import Any

from llamavid_jax.config.schema import LlamaConfig, LLaMAVIDLlavaConfig
from llamavid_jax.errors import CheckpointError


def llama_values(text: LlamaConfig) -> dict[str, Any]:
    """transformers' names."""
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


def _part_values(config: LLaMAVIDLlavaConfig) -> dict[str, Any]:
    """The sizes of the tower and the Q-Former, which the original keeps in code."""
    vision, qformer = config.vision_tower_config, config.qformer_config
    return {
        "vision_tower_config": {
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.intermediate_size,
            "num_hidden_layers": vision.num_hidden_layers,
            "num_attention_heads": vision.num_attention_heads,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "layer_norm_eps": vision.layer_norm_eps,
            "hidden_act": "gelu",
            "qkv_bias": True,
        },
        "qformer_config": {
            "vocab_size": qformer.vocab_size,
            "hidden_size": qformer.hidden_size,
            "num_hidden_layers": qformer.num_hidden_layers,
            "num_attention_heads": qformer.num_attention_heads,
            "intermediate_size": qformer.intermediate_size,
            "max_position_embeddings": qformer.max_position_embeddings,
            "layer_norm_eps": qformer.layer_norm_eps,
            "cross_attention_frequency": qformer.cross_attention_frequency,
            "encoder_hidden_size": vision.hidden_size,
            "hidden_dropout_prob": qformer.dropout,
            "attention_probs_dropout_prob": qformer.dropout,
        },
        "bert_type": "qformer_pretrain",
        "num_query": config.num_query,
        "compress_type": None if config.compress_type == "none" else config.compress_type,
        "mm_hidden_size": vision.hidden_size,
        "hidden_size": config.text_config.hidden_size,
        "vocab_size": config.text_config.vocab_size,
    }


def original_config(config: LLaMAVIDLlavaConfig) -> dict[str, Any]:
    """The original's form: LLaMA's fields flat, LLaMA-VID's beside them."""
    size = config.vision_tower_config.image_size
    return {
        "model_type": "llava",
        "architectures": ["LlavaLlamaAttForCausalLM"],
        **llama_values(config.text_config),
        **_part_values(config),
        "max_token": config.text_config.max_length,
        "mm_vision_tower": "./model_zoo/LAVIS/eva_vit_g.pth",
        "image_processor": f"./llamavid/processor/clip-patch14-{size}",
        "mm_projector_type": config.mm_projector_type,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "image_aspect_ratio": config.image_aspect_ratio,
        "use_mm_proj": True,
    }


def documented_config(config: LLaMAVIDLlavaConfig) -> dict[str, Any]:
    """The transformers port's form.  Raises CheckpointError for a content projector that it does not know."""
    if config.mm_projector_type != "mlp2x_gelu":
        raise CheckpointError(
            f"mm_projector_type is {config.mm_projector_type!r}, but the documented layout has two layers only "
            "(mlp2x_gelu); use --layout original"
        )
    return {
        "model_type": "llamavid",
        "architectures": ["LLaMAVIDLlavaForConditionalGeneration"],
        "text_config": {"model_type": "llama", **llama_values(config.text_config)},
        **_part_values(config),
        "image_token_index": config.image_token_index,
        "image_aspect_ratio": config.image_aspect_ratio,
        "projector_hidden_act": "gelu",
        "ignore_index": -100,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }
