"""Reads the `config.json` of the original, of the documented layout, and of a LLaMA alone.

The released files have oddities: `mean_concat` means mean, `num_qformer` is `num_query`, sizes of the vision tower and
the Q-Former are absent, and dozens of keys say nothing.  What this model cannot do is refused by name.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from llamavid_jax.config.schema import (
    LlamaConfig,
    LLaMAVIDLlavaConfig,
    LLaMAVIDLlavaQFormerConfig,
    LLaMAVIDLlavaVisionConfig,
)
from llamavid_jax.config.strict import require_divisible, strict
from llamavid_jax.errors import ConfigError

NUMBER = (int, float)


def _get(values: Mapping[str, Any], name: str, kind: type | tuple[type, ...], default: Any, section: str = "") -> Any:
    """The value under `name`, `default` where it is absent or null; ConfigError where it is not of `kind`."""
    value = values.get(name)
    if value is None:
        return default
    if not isinstance(value, kind) or isinstance(value, bool):
        kinds = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise ConfigError(f"{section}{name} is {value!r}; a value of type {kinds} is needed")
    return value


def _pick(cls, values: Any, section: str, **renamed: Any):
    """Builds `cls` from those keys of a foreign configuration that it knows; the rest keeps the released values."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{section} is {values!r}; a mapping of fields is needed")
    names = {field.name for field in dataclasses.fields(cls)}
    known = {name: value for name, value in values.items() if name in names and value is not None}
    return strict(cls, {**known, **renamed}, f"{section}.")


def _vision_config(values: Mapping[str, Any]) -> LLaMAVIDLlavaVisionConfig:
    section = values.get("vision_tower_config", {})
    if isinstance(section, Mapping) and section.get("hidden_act", "gelu") != "gelu":
        raise ConfigError(f"vision_tower_config.hidden_act is {section['hidden_act']!r}; the EVA tower has 'gelu'")
    image_size = {}
    if "vision_tower_config" not in values and "336" in str(values.get("image_processor", "")):
        image_size = {"image_size": 336}  # the original reads the size from its processor folder's name
    return _pick(LLaMAVIDLlavaVisionConfig, section, "vision_tower_config", **image_size)


def _qformer_config(values: Mapping[str, Any]) -> LLaMAVIDLlavaQFormerConfig:
    section = values.get("qformer_config", {})
    default = LLaMAVIDLlavaQFormerConfig.dropout
    dropout = _get(section, "hidden_dropout_prob", NUMBER, default) if isinstance(section, Mapping) else default
    return _pick(LLaMAVIDLlavaQFormerConfig, section, "qformer_config", dropout=dropout)


def llama_config(values: Any, section: str = "text_config") -> LlamaConfig:
    """Reads a LLaMA configuration: old (`rope_theta`, `rope_scaling`) and new (`rope_parameters`) forms."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{section} is {values!r}; a mapping of fields is needed")
    if values.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"{section}.hidden_act is {values['hidden_act']!r}; LLaMA has 'silu'")
    for name in ("attention_bias", "mlp_bias"):
        if values.get(name):
            raise ConfigError(f"{section}.{name} is true; LLaMA's projections have no bias")
    rope = {}
    for name in ("rope_parameters", "rope_scaling"):
        rope = _get(values, name, Mapping, {}, f"{section}.") or rope
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear"):
        raise ConfigError(f"{section}.rope_scaling is {rope!r}; only linear scaling is known")
    hidden = _get(values, "hidden_size", int, LlamaConfig.hidden_size, f"{section}.")
    heads = _get(values, "num_attention_heads", int, LlamaConfig.num_attention_heads, f"{section}.")
    theta = _get(values, "rope_theta", NUMBER, LlamaConfig.rope_theta, f"{section}.")
    require_divisible(section, "hidden_size", hidden, "num_attention_heads", heads)
    renamed = {
        "num_key_value_heads": values.get("num_key_value_heads") or heads,
        "head_dim": values.get("head_dim") or hidden // heads,
        "rope_factor": _get(rope, "factor", NUMBER, 1.0, f"{section}.rope_scaling.") if kind == "linear" else 1.0,
        "rope_theta": _get(rope, "rope_theta", NUMBER, theta, f"{section}.rope_parameters."),
    }
    eos = values.get("eos_token_id")
    if isinstance(eos, list) and eos:
        renamed["eos_token_id"] = eos[0]
    return _pick(LlamaConfig, values, section, **renamed)


def _compress_type(value: str | None) -> str:
    """The original looks for substrings, `grid:` first, so the released `mean_concat` is mean."""
    if value is None:
        return "none"
    if "grid" in value:
        return "grid:" + value.split("grid:")[-1]
    return "mean" if "mean" in value else value


def _check_bert_type(bert_type: str) -> None:
    """`bert_type` is a bag of substrings; `freeze` and `freeze_all` only say what was trained."""
    if "qformer" not in bert_type or "pretrain" not in bert_type or "layer" in bert_type:
        raise ConfigError(
            f"bert_type is {bert_type!r}; only the released kinds 'qformer_pretrain', 'qformer_pretrain_freeze' "
            "and 'qformer_pretrain_freeze_all' are supported"
        )


def _shared(values: Mapping[str, Any], text_config: LlamaConfig) -> dict[str, Any]:
    _check_bert_type(_get(values, "bert_type", str, "qformer_pretrain"))
    return {
        "vision_tower_config": _vision_config(values),
        "qformer_config": _qformer_config(values),
        "text_config": text_config,
        "num_query": _get(values, "num_query", int, _get(values, "num_qformer", int, 32)),
        "compress_type": _compress_type(_get(values, "compress_type", str, None)),
    }


def from_original(values: Mapping[str, Any]) -> LLaMAVIDLlavaConfig:
    tower = str(values.get("mm_vision_tower", "eva")).lower()
    if "eva" not in tower and "lavis" not in tower:  # as the original tells its towers apart, by the path
        raise ConfigError(f"mm_vision_tower is {values['mm_vision_tower']!r}; only the EVA ViT-g tower is supported")
    if values.get("mm_use_im_start_end"):
        raise ConfigError("mm_use_im_start_end is true; no released checkpoint uses it, and it is not supported")
    return LLaMAVIDLlavaConfig(
        **_shared(values, llama_config(values, "config")),
        mm_projector_type=_get(values, "mm_projector_type", str, "linear"),
        image_aspect_ratio="pad" if values.get("image_aspect_ratio") == "pad" else "crop",  # any other value crops
    )


def from_documented(values: Mapping[str, Any]) -> LLaMAVIDLlavaConfig:
    if values.get("projector_hidden_act", "gelu") != "gelu":
        raise ConfigError(f"projector_hidden_act is {values['projector_hidden_act']!r}; only 'gelu' is known")
    return LLaMAVIDLlavaConfig(
        **_shared({"compress_type": "mean", **values}, llama_config(values.get("text_config") or {})),
        mm_projector_type="mlp2x_gelu",
        image_aspect_ratio=_get(values, "image_aspect_ratio", str, "pad"),
        image_token_index=_get(values, "image_token_index", int, 32000),
    )
