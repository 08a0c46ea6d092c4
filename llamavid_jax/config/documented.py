"""The constructors as documented for transformers: `LLaMAVIDLlavaConfig(text_config={...}, vision_config=..., ...)`.

Their arguments are read as the fields of `config/schema.py`.  Arguments that have no effect here may have any value;
those that ask for something unsupported are refused by name.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from llamavid_jax.config import foreign
from llamavid_jax.errors import ConfigError

ANY = ("initializer_range", "pad_token_id", "projection_dim", "dtype", "torch_dtype", "transformers_version")
VISION = {"qkv_bias": (True,), "attention_dropout": (0,), "dropout": (0,), "num_channels": (3,)}
QFORMER = {"hidden_act": ("gelu",), "position_embedding_type": ("absolute",), "model_type": None}
KINDS = ("qformer_pretrain", "qformer", "raw_bert")
MODEL = {"ignore_index": (-100,), "projector_hidden_act": ("gelu",), "model_type": ("llamavid", "llamavid_jax")}


def documented(read: Callable[[type, dict[str, Any]], dict[str, Any]]) -> Callable[[type], type]:
    """Decorates a dataclass: `read` turns its constructor's keywords into its fields."""

    def decorate(cls: type) -> type:
        plain = cls.__init__

        @functools.wraps(plain)
        def construct(self, *args, **fields):
            plain(self, *args, **read(cls, fields))

        cls.__init__ = construct
        return cls

    return decorate


def vision_fields(cls: type, fields: dict[str, Any]) -> dict[str, Any]:
    if "clip" in str(fields.get("model_type")) and "kind" not in fields:
        fields = foreign.CLIP_L | {"kind": "clip", "feature_layer": -2} | fields
    return _known(cls, fields, VISION | {"model_type": None}, "vision_tower_config.")


def qformer_fields(cls: type, fields: dict[str, Any]) -> dict[str, Any]:
    rates = {fields[name] for name in ("hidden_dropout_prob", "attention_probs_dropout_prob") if name in fields}
    if len(rates) > 1:
        raise ConfigError(f"qformer_config has dropout rates of {sorted(rates)}; one rate for both is known")
    fields = {name: value for name, value in fields.items() if not name.endswith("_dropout_prob")}
    return _known(cls, fields | ({"dropout": rates.pop()} if rates else {}), QFORMER, "qformer_config.")


def model_fields(cls: type, fields: dict[str, Any]) -> dict[str, Any]:
    parts = {field.name: field.type for field in dataclasses.fields(cls) if dataclasses.is_dataclass(field.type)}
    fields = dict(fields)
    stub = fields.pop("vision_config", None)
    if stub is not None:
        fields.setdefault("vision_tower_config", stub)
    for name, kind in parts.items():
        if name in fields:
            fields[name] = _part(kind, fields[name], name)
    vision = fields.get("vision_tower_config", parts["vision_tower_config"]())
    if stub is not None and _part(type(vision), stub, "vision_config").hidden_size != vision.hidden_size:
        raise ConfigError(f"vision_config has another hidden_size than vision_tower_config, {vision.hidden_size}")
    if "vision_feature_select_strategy" in fields or "vision_feature_layer" in fields:
        vision = fields["vision_tower_config"] = _features(
            vision, fields.pop("vision_feature_select_strategy", None), fields.pop("vision_feature_layer", None)
        )
    if isinstance(fields.get("compress_type", 0), str | None):
        fields["compress_type"] = foreign.compress_type(fields["compress_type"])
    if isinstance(fields.get("bert_type"), str) and not (fields["bert_type"] in KINDS and "qformer_config" in fields):
        given = fields.get("qformer_config", parts["qformer_config"]())
        stated = {name: value for name, value in dataclasses.asdict(given).items() if value != 0}
        read = foreign.bert_type(fields["bert_type"], dataclasses.asdict(vision), stated)
        fields |= read | {"qformer_config": dataclasses.replace(given, **read["qformer_config"])}
    text = fields.get("text_config", parts["text_config"]())
    own = {"mm_hidden_size": vision.hidden_size, "hidden_size": text.hidden_size, "vocab_size": text.vocab_size}
    for name, value in own.items():
        if fields.pop(name, value) != value:
            raise ConfigError(f"{name} is not {value}, which its part of the configuration says; leave it out")
    return _known(cls, fields, MODEL, "")


def _features(vision: Any, strategy: Any, layer: Any) -> Any:
    if strategy not in ("default", "full", None):
        raise ConfigError(
            f"vision_feature_select_strategy is {strategy!r}; use 'default' (patches) or 'full' (and CLS)"
        )
    changed = {"select_feature": "cls_patch" if strategy == "full" else "patch"} if strategy else {}
    changed |= {"feature_layer": layer} if layer is not None and vision.kind != "eva" else {}  # EVA ignores it
    return dataclasses.replace(vision, **changed)


def _part(kind: type, given: Any, name: str) -> Any:
    """A part of the configuration, from a mapping or a transformers configuration."""
    if isinstance(given, kind) or given is None:
        return kind() if given is None else given
    if hasattr(given, "to_dict"):
        values = given.to_dict()
        if name == "text_config":
            return kind.from_transformers(values)
        own = {field.name for field in dataclasses.fields(kind)} | {"model_type", "hidden_dropout_prob"}
        return kind(**{key: value for key, value in values.items() if key in own})
    if isinstance(given, Mapping):
        return kind.from_transformers(given) if name == "text_config" else kind(**given)
    raise ConfigError(f"{name} is of type {type(given).__name__}; give a mapping of fields or a {kind.__name__}")


def _known(cls: type, fields: dict[str, Any], others: Mapping[str, tuple | None], section: str) -> dict[str, Any]:
    """The fields of `cls`, without those of `others`, which may only have the values given there (None: any)."""
    own = {field.name: field.type for field in dataclasses.fields(cls)}
    for name, value in fields.items():
        if name not in own and name not in others and name not in ANY:
            raise ConfigError(f"unknown field {section}{name}; the fields here are {', '.join(own)}")
        if name not in own and others.get(name) is not None and value not in others[name]:
            raise ConfigError(f"{section}{name} is {value!r}, which is not done here; {others[name][0]!r} is known")
    known = {name: value for name, value in fields.items() if name in own}
    known |= {name: float(value) for name, value in known.items() if own[name] is float and type(value) is int}
    return known | {name: tuple(value) for name, value in known.items() if own[name] is tuple and type(value) is list}
