"""The `config.json` of the original, of the documented layout and of a LLaMA alone → the fields of `config/schema.py`.

The released files have oddities: `mean_concat` means mean, `num_qformer` is `num_query`, sizes of the vision tower and
the Q-Former are absent, and dozens of keys have no effect.  Settings that this model does not support are refused by
name.
"""

import re
from collections.abc import Mapping
from typing import Any

from llamavid_jax.config.strict import require_divisible
from llamavid_jax.errors import ConfigError

NUMBER = (int, float)
# fields with the same name in both layouts and `schema.py`; sizes that a file lacks are the released models'
_VISION = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
_QFORMER = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
_QFORMER = (*_QFORMER, "max_position_embeddings", "layer_norm_eps", "cross_attention_frequency", "encoder_hidden_size")
_LLAMA = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "eos_token_id")
_LLAMA = (*_LLAMA, "max_position_embeddings", "rms_norm_eps", "rope_theta", "tie_word_embeddings", "rope_factor")
CLIP_L = {  # openai/clip-vit-large-patch14, whose folder the original reads
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "layer_norm_eps": 1e-5,
    "hidden_act": "quick_gelu",
}
INSTRUCT_BLIP = 1408  # width of the tower that the pretrained Q-Former was trained with


def _get(values: Mapping[str, Any], name: str, kind: type | tuple[type, ...], default: Any, section: str = "") -> Any:
    """The value under `name`, `default` where it is absent or null; ConfigError where it is not of `kind`."""
    value = values.get(name)
    if value is None:
        return default
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise ConfigError(
            f"{section}{name} is {value!r}; a value of type {' or '.join(k.__name__ for k in kinds)} is needed"
        )
    return value


def _section(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = values.get(name)
    if section is not None and not isinstance(section, Mapping):
        raise ConfigError(f"{name} is {section!r}; a mapping of fields is needed")
    return section or {}


def _pick(values: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: values[name] for name in names if values.get(name) is not None}


def vision_config(values: Mapping[str, Any], kind: str, name: str = "vision_tower_config") -> dict[str, Any]:
    """The tower's section, in transformers' names."""
    act = _get(values, "hidden_act", str, "quick_gelu" if kind == "clip" else "gelu", f"{name}.")
    eps = {"clip": 1e-5}.get(kind, 1e-6)
    if not _get(values, "qkv_bias", bool, True, f"{name}."):
        raise ConfigError(f"{name}.qkv_bias is false; the towers here have biases")
    eps = _get(values, "layer_norm_eps", NUMBER, eps, f"{name}.")
    known = _pick(values, (*_VISION, "feature_layer", "select_feature", "image_mean", "image_std"))
    return {"kind": kind, **known, "hidden_act": act, "layer_norm_eps": eps}


def _tower(values: Mapping[str, Any]) -> dict[str, Any]:
    """The tower of an original checkpoint, known by the path in `mm_vision_tower`, and its features in use."""
    path = str(values.get("mm_vision_tower", "eva"))
    section = _section(values, "vision_tower_config")
    feature = _get(values, "mm_vision_select_feature", str, "patch")
    if "openai" in path.lower() or "laion" in path.lower():
        if not section and _get(values, "mm_hidden_size", int, 1024) != 1024:
            raise ConfigError(
                f"mm_vision_tower is {path!r} of width {values['mm_hidden_size']}, but no vision_tower_config says its "
                "sizes; put those of the tower's own config.json there"
            )
        size = {"image_size": 336} if "336" in path else {}
        layer = _get(values, "mm_vision_select_layer", int, -2)
        return vision_config(section or CLIP_L | size, "clip") | {"feature_layer": layer, "select_feature": feature}
    if "eva" not in path.lower() and "lavis" not in path.lower():
        raise ConfigError(f"mm_vision_tower is {path!r}; known are EVA ('eva', 'lavis') and CLIP ('openai', 'laion')")
    size = {"image_size": 336} if not section and "336" in str(values.get("image_processor", "")) else {}
    return vision_config(size | section, "eva") | {"select_feature": feature}


def qformer_config(values: Mapping[str, Any]) -> dict[str, Any]:
    dropout = _get(values, "hidden_dropout_prob", NUMBER, None, "qformer_config.")
    return _pick(values, _QFORMER) | ({} if dropout is None else {"dropout": dropout})


def llama_config(values: Any, section: str = "text_config") -> dict[str, Any]:
    """A LLaMA configuration: old (`rope_theta`, `rope_scaling`) and new (`rope_parameters`) forms."""
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
    hidden = _get(values, "hidden_size", int, 4096, f"{section}.")
    heads = _get(values, "num_attention_heads", int, 32, f"{section}.")
    require_divisible(section, "hidden_size", hidden, "num_attention_heads", heads)
    found = _pick(values, _LLAMA) | {
        "num_key_value_heads": values.get("num_key_value_heads") or heads,
        "head_dim": values.get("head_dim") or hidden // heads,
    }
    if kind == "linear":
        found["rope_factor"] = _get(rope, "factor", NUMBER, 1.0, f"{section}.rope_scaling.")
    if (theta := _get(rope, "rope_theta", NUMBER, None, f"{section}.rope_parameters.")) is not None:
        found["rope_theta"] = theta
    if isinstance(found.get("eos_token_id"), list) and found["eos_token_id"]:
        found["eos_token_id"] = found["eos_token_id"][0]
    return found


def compress_type(value: str | None) -> str:
    """The original looks for substrings, `grid:` first, so the released `mean_concat` is mean."""
    if value is None:
        return "none"
    if "grid" in value:
        return "grid:" + value.split("grid:")[-1]
    return "mean" if "mean" in value else value


def bert_type(name: str, vision: Mapping[str, Any], qformer: Mapping[str, Any]) -> dict[str, Any]:
    """The original searches `bert_type` for substrings: the decoder's kind, and the number of layers kept.

    `freeze` and `freeze_all` only say what was trained.
    """
    words, _, layers = name.partition("layer:")
    found, qformer = "qformer" if "qformer" in words else "raw_bert", dict(qformer)
    if layers and not re.fullmatch("[0-9]{1,4}", layers):
        raise ConfigError(f"bert_type is {name!r}; the number of its layers ends it, as in 'qformer_pretrain_layer:6'")
    if found == "qformer" and "pretrain" in words:
        found = "qformer_pretrain"
        qformer.setdefault("encoder_hidden_size", INSTRUCT_BLIP if vision["kind"] == "clip" else 0)
    elif found == "qformer":
        qformer["encoder_hidden_size"] = 0
    elif "raw" not in words or ("pretrain" in words and vision["kind"] != "eva"):
        raise ConfigError(
            f"bert_type is {name!r}; known are 'qformer_pretrain', 'qformer' and 'raw_bert', with '_freeze' or "
            "'_freeze_all', and '_layer:N' at the end"
        )
    else:
        qformer |= {"encoder_hidden_size": 0, "cross_attention_frequency": 1}
    if qformer.get("encoder_hidden_size") == vision.get("hidden_size", INSTRUCT_BLIP):
        qformer["encoder_hidden_size"] = 0
    if layers:
        qformer["num_hidden_layers"] = min(int(layers), _get(qformer, "num_hidden_layers", int, 12))
    return {"bert_type": found, "qformer_config": qformer}


def _shared(values: Mapping[str, Any], vision: dict[str, Any], text: dict[str, Any]) -> dict[str, Any]:
    qformer = qformer_config(_section(values, "qformer_config"))
    return {
        **bert_type(_get(values, "bert_type", str, "qformer_pretrain"), vision, qformer),
        "vision_tower_config": vision,
        "text_config": text,
        "num_query": _get(values, "num_query", int, _get(values, "num_qformer", int, 32)),
        "compress_type": compress_type(_get(values, "compress_type", str, None)),
    }


def from_original(values: Mapping[str, Any]) -> dict[str, Any]:
    tokens = {name: _get(values, name, bool, False) for name in ("mm_use_im_start_end", "mm_use_im_patch_token")}
    return {
        **_shared(values, _tower(values), llama_config(values, "config")),
        **tokens,
        "mm_projector_type": _get(values, "mm_projector_type", str, "linear"),
        "image_aspect_ratio": "pad" if values.get("image_aspect_ratio") == "pad" else "crop",  # any other value crops
    }


def from_documented(values: Mapping[str, Any]) -> dict[str, Any]:
    if values.get("projector_hidden_act", "gelu") != "gelu":
        raise ConfigError(f"projector_hidden_act is {values['projector_hidden_act']!r}; only 'gelu' is known")
    section = _section(values, "vision_tower_config")
    kind = "clip" if "clip" in str(section.get("model_type")) else "eva"
    strategy = _get(values, "vision_feature_select_strategy", str, "default")
    if strategy not in ("default", "full"):
        raise ConfigError(
            f"vision_feature_select_strategy is {strategy!r}; use 'default' (patches) or 'full' (and CLS)"
        )
    vision = vision_config(section, kind)
    vision.setdefault("select_feature", "cls_patch" if strategy == "full" else "patch")
    if kind == "clip":  # the documented layout's own tower ignores it, as the original's EVA does
        vision.setdefault("feature_layer", _get(values, "vision_feature_layer", int, -2))
    text = llama_config(_section(values, "text_config"))
    return {
        **_shared({"compress_type": "mean", **values}, vision, text),
        "mm_projector_type": _get(values, "mm_projector_type", str, "mlp2x_gelu"),
        "image_aspect_ratio": _get(values, "image_aspect_ratio", str, "pad"),
        "image_token_index": _get(values, "image_token_index", int, 32000),
    }
