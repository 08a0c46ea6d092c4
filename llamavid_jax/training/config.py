"""A training run as data: one YAML file, overridden on the command line by `section.key=value`.

    model: configs/models/llamavid_7b_224_video.yaml     start: {model: DIR, adapter: DIR}     output: DIR
    trainable: {PATTERN: true | false}                   data: ...   optimizer: ...   training: ...
    mesh: fsdp=8                                         lora: {rank: 64, ...}
    base: stage2_instruct.yaml                           a file in the same folder, which this one modifies

The original's training scripts set these fields; its stages differ in nothing else.
"""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from llamavid_jax.buckets import is_address
from llamavid_jax.config.recipe import load_yaml, read_recipe
from llamavid_jax.config.schema import LLaMAVIDLlavaConfig
from llamavid_jax.config.strict import strict
from llamavid_jax.errors import ConfigError
from llamavid_jax.files import find
from llamavid_jax.models.lora import LoraConfig
from llamavid_jax.parallel.mesh import parse_mesh
from llamavid_jax.text.conversation import template_named
from llamavid_jax.training.sections import DataConfig, LoopConfig, OptimizerConfig, StartConfig

LONGEST_ROW = 1 << 22  # frames, pairs, questions or tokens
TABLES = ("trainable", "optimizer.lr_factors")  # their keys are patterns, which contain dots


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A recipe.  `model` is one of `configs/models/`; if empty, the `config.json` of `start.model` is read."""

    output: str = "runs/train"
    model: str = ""
    start: StartConfig = dataclasses.field(default_factory=StartConfig)
    trainable: dict = dataclasses.field(default_factory=dict)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    training: LoopConfig = dataclasses.field(default_factory=LoopConfig)
    mesh: str = ""
    lora: LoraConfig | None = None

    def __post_init__(self):
        if not self.model and not self.start.model:
            raise ConfigError(
                "model and start.model are both empty; give model=configs/models/NAME.yaml, or start.model=DIR"
            )
        if self.lora and self.lora.base != "float" and not self.start.model:
            raise ConfigError(
                f"lora.base is {self.lora.base!r}, but start.model is empty; give start.model=DIR, whose full kernels "
                "take the updates at the end, or lora.base=float"
            )
        if self.training.evaluate_every and not self.data.evaluation_path:
            raise ConfigError(
                "training.evaluate_every is set, but data.evaluation_path is empty; give the held-out set"
            )
        parse_mesh(self.mesh)
        template_named(self.data.template)
        for number, shape in enumerate(self.data.shapes):
            for name in ("frames", "pairs", "questions"):
                if getattr(shape, name) < 0 or (getattr(shape, name) == 0) != (shape.frames == 0):
                    raise ConfigError(
                        f"data.buckets[{number}].{name} is {getattr(shape, name)}; all three are 0 or none"
                    )
            if shape.tokens < 2 or shape.pairs < shape.frames:
                raise ConfigError(f"data.buckets[{number}] is {shape}; a row needs 2 tokens, and a pair for each frame")
            if max(dataclasses.astuple(shape)) > LONGEST_ROW:
                raise ConfigError(f"data.buckets[{number}] is {shape}; a row holds at most {LONGEST_ROW} of anything")
        if not self.data.shapes:
            raise ConfigError("data.buckets is empty; give at least one {frames, pairs, questions, tokens}")

    @property
    def max_tokens(self) -> int:
        return max(shape.tokens for shape in self.data.shapes)

    def model_config(self) -> LLaMAVIDLlavaConfig:
        """The model's configuration with the run's image aspect ratio, and a rotary factor if rows need it."""
        if self.model:
            config = LLaMAVIDLlavaConfig.from_yaml(self.model)
            config = config.with_pixels_of(find(self.start.model)) if self.start.model else config
        else:
            config = LLaMAVIDLlavaConfig.from_pretrained(self.start.model)
        if self.data.image_aspect_ratio:
            config = dataclasses.replace(config, image_aspect_ratio=self.data.image_aspect_ratio)
        text = config.require_whole(self.model or self.start.model).text_config
        if self.max_tokens > text.max_length:
            factor = float(math.ceil(self.max_tokens / text.max_position_embeddings))
            config = dataclasses.replace(config, text_config=dataclasses.replace(text, rope_factor=factor))
        return config


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Reads the YAML file and applies overrides `section.key=value`, with values written as in YAML.

    Raises ConfigError that names the file or the override, the field and its allowed values.
    """
    values = read_recipe(path, whole=TABLES)
    for override in overrides:
        _put(values, override)
    try:
        return from_dict(_local(values))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _local(values: Any) -> Any:
    """Expands `~` in `~/chat.json`: a shell does so only at the beginning of a word, not after `data.path=`.

    Raises ConfigError for a URL that is not a bucket's: it would be taken for a folder on the local disk.
    """
    if isinstance(values, dict):
        return {key: _local(value) for key, value in values.items()}
    if isinstance(values, str) and "://" in values and not is_address(values):
        raise ConfigError(f"{values} is a URL; give a path, or a bucket's as gs://BUCKET/FOLDER (docs/tpu-pod.md)")
    return os.path.expanduser(values) if isinstance(values, str) else values


def from_dict(values: Mapping[str, Any]) -> TrainConfig:
    """A TrainConfig from nested mappings; strict, as every configuration here."""
    values = dict(values)
    lora = values.pop("lora", None)
    config = strict(TrainConfig, _with_floats(values, TrainConfig), "")
    if lora is None:
        return config
    return dataclasses.replace(config, lora=strict(LoraConfig, _with_floats(lora, LoraConfig), "lora."))


def _put(values: dict, override: str) -> None:
    name, sign, text = override.partition("=")
    table = next((table for table in TABLES if name.startswith(f"{table}.")), None)
    *sections, key = [*table.split("."), name[len(table) + 1 :]] if table else name.split(".")
    if not sign or not all([*sections, key]):
        raise ConfigError(f"{override!r} is no override; write section.key=value, such as data.path=chat.json")
    for section in sections:
        if values.get(section) is None:  # absent, or null
            values[section] = {}
        values = values[section]
        if not isinstance(values, dict):
            raise ConfigError(f"{override!r}: {section} has no fields below it")
    try:
        values[key] = load_yaml(text)
    except yaml.YAMLError:
        values[key] = text
    if values[key] is None and text.strip() not in ("null", "~"):
        values[key] = ""


def _with_floats(values: Any, kind: Any) -> Any:
    """Converts strings to floats in float fields, tables and lists: YAML 1.1 reads 2e-5 as a string."""
    if isinstance(values, dict):
        fields = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()
        kinds = {field.name: field.type for field in fields}
        return {key: _with_floats(value, kinds.get(key, kind)) for key, value in values.items()}
    if isinstance(values, list):
        return [_with_floats(value, kind) for value in values]
    if isinstance(values, str) and kind in (float, list, dict):
        try:
            return float(values)
        except ValueError:
            return values
    return values
