"""A training run as data: one YAML file, overridden on the command line by `section.key=value`.

    model: configs/models/llamavid_7b_224_video.yaml     start: {model: DIR, adapter: DIR}     output: DIR
    trainable: {PATTERN: true | false}                   data: ...   optimizer: ...   training: ...
    mesh: fsdp=8                                         lora: {rank: 64, ...}
    base: stage2_instruct.yaml                           a file beside this one, which it says the differences from

The original's scripts are these fields; its stages differ in nothing else.
"""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from llamavid_jax.config.recipe import load_yaml, read_recipe
from llamavid_jax.config.schema import LLaMAVIDLlavaConfig
from llamavid_jax.config.strict import check_fields, strict
from llamavid_jax.errors import ConfigError
from llamavid_jax.files import find
from llamavid_jax.models.lora import LoraConfig
from llamavid_jax.models.stack import REMAT
from llamavid_jax.parallel.chips import CHIPS
from llamavid_jax.parallel.mesh import parse_mesh
from llamavid_jax.shapes import RowShape
from llamavid_jax.text.conversation import template_named

LONGEST_ROW = 1 << 22  # frames, pairs, questions or tokens
TABLES = ("trainable", "optimizer.lr_factors")  # their keys are patterns, which have points of their own
BESIDE_OTHER_WORK = {
    f"xla_{option}_{kind}": True
    for option in ("enable_async", "tpu_enable_async_collective_fusion_fuse")
    for kind in ("all_gather", "all_reduce")
}
GATHERED_ONCE = {"xla_tpu_spmd_threshold_for_allgather_cse": 1_000_000}  # a kernel that a layer's gradient needs twice
COMPILER_OPTIONS = dict.fromkeys(("v5e", "v5p", "v6e"), BESIDE_OTHER_WORK | GATHERED_ONCE)


@dataclasses.dataclass(frozen=True)
class StartConfig:
    """Where the weights come from: a checkpoint folder (converted, or an earlier run's `model`), random if empty.

    `adapter` is an earlier run's `adapter`, put over it: after stage 1, its projectors over the same base; after a run
    with LoRA, the updates that this one trains on.
    """

    model: str = ""
    adapter: str = ""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """`path`: LLaVA-format .json or .jsonl, or a folder of shards; `media`: what its files are relative to.

    `media` empty is the folder of `path`.  `tokenizer`: a folder with the two tokenizers, empty for those of
    `start.model`.  `buckets`: the row shapes, mappings of RowShape's fields.  `max_broken`: the part of the samples
    that may be unreadable before the run stops.  `threads` and `processes` read ahead.  `image_aspect_ratio`: "pad" or
    "crop" for stills, empty for the model's; the model that the run leaves holds it.
    """

    path: str = ""
    media: str = ""
    evaluation_path: str = ""
    tokenizer: str = ""
    template: str = "imgsp_v1"
    image_aspect_ratio: str = ""
    fps: float = 1.0
    buckets: list = dataclasses.field(
        default_factory=lambda: [{"frames": 8, "pairs": 8, "questions": 4, "tokens": 512}]
    )
    question_tokens: int = 64
    packing: bool = True
    seed: int = 0
    max_broken: float = 0.01
    threads: int = 2
    processes: int = 0

    def __post_init__(self):
        check_fields(self, "data.", from_zero=["seed", "max_broken", "processes"])
        if self.max_broken > 1:
            raise ConfigError(f"data.max_broken is {self.max_broken}; give a part of the samples, from 0 to 1")

    @property
    def shapes(self) -> list[RowShape]:
        names = {field.name for field in dataclasses.fields(RowShape)}
        for number, bucket in enumerate(self.buckets):
            missing = sorted(names.difference(bucket)) if isinstance(bucket, dict) else []
            if missing:
                raise ConfigError(
                    f"data.buckets[{number}] has no {missing[0]}; give frames, pairs, questions and tokens"
                )
        return [strict(RowShape, bucket, f"data.buckets[{number}].") for number, bucket in enumerate(self.buckets)]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW; linear warm-up over `warmup` of the steps, cosine to zero.

    Biases and norms do not decay.  `lr_factors` multiply the rate of the parameters that match a pattern, the
    original's `lr_multi`.
    """

    learning_rate: float = 2e-5
    warmup: float = 0.03
    betas: list = dataclasses.field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    lr_factors: dict = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        check_fields(self, "optimizer.", from_zero=["weight_decay"], own_range=["warmup"])
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"optimizer.warmup is {self.warmup}; give the part of the steps, from 0 to below 1")
        if len(self.betas) != 2 or not all(type(beta) in (int, float) and 0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optimizer.betas is {self.betas}; give two numbers from 0 to below 1")
        for pattern, factor in self.lr_factors.items():
            if type(factor) not in (int, float) or not 0 <= factor < math.inf:
                raise ConfigError(f"optimizer.lr_factors: {pattern!r} has {factor!r}; give a number of 0 or more")


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """`steps` 0 runs `epochs` complete epochs.  `batch_size` counts rows over all devices and hosts.

    A step adds up `micro_batches` gradients; `loss_weighting` "tokens" gives each labelled token the same weight,
    "micro_batch" is the original's mean of means.  `dtype` is that of matmuls and of frozen parameters;
    trained ones are float32.  `remat`: what a layer keeps for the gradient.  A step whose loss or gradient is not
    finite is skipped; `max_bad_steps` in a row end the run, as do `hang_after` seconds without a step (`pace.py`).
    `compiler_options` are what the compiler of a TPU generation is told beside its own defaults (docs/tpu.md).
    """

    epochs: int = 1
    steps: int = 0
    batch_size: int = 128
    micro_batches: int = 1
    loss_weighting: str = "tokens"
    dtype: str = "bfloat16"
    remat: str = "full"
    seed: int = 0
    log_every: int = 10
    save_every: int = 500
    keep: int = 2
    evaluate_every: int = 0
    max_bad_steps: int = 10
    hang_after: float = 600.0
    compiler_options: dict = dataclasses.field(default_factory=COMPILER_OPTIONS.copy)

    def __post_init__(self):
        check_fields(self, "training.", from_zero=["steps", "evaluate_every", "seed"])
        for generation, options in self.compiler_options.items():
            _choice("a generation in training.compiler_options", generation, tuple(CHIPS))
            if not isinstance(options, dict):
                raise ConfigError(f"training.compiler_options.{generation} is {options!r}; give {{OPTION: VALUE}}")
        _choice("training.loss_weighting", self.loss_weighting, ("tokens", "micro_batch"))
        _choice("training.dtype", self.dtype, ("float32", "bfloat16"))
        _choice("training.remat", self.remat, tuple(REMAT))
        if self.keep < 2:
            raise ConfigError(
                f"training.keep is {self.keep}; use 2 or more, so that one is left when the newest is damaged"
            )
        if self.batch_size % self.micro_batches:
            raise ConfigError(
                f"training.batch_size is {self.batch_size}, no multiple of micro_batches = {self.micro_batches}"
            )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A recipe.  `model` is one of `configs/models/`; empty takes the `config.json` of `start.model`."""

    output: str = "runs/train"
    model: str = ""
    start: StartConfig = StartConfig()
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
        """The model's configuration with the run's aspect, and a rotary factor for rows longer than its positions."""
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
    """Reads the YAML file and puts `section.key=value` over it, values written as in YAML.

    Raises ConfigError that names the file or the override, the field and what it may be.
    """
    values = read_recipe(path, whole=TABLES)
    for override in overrides:
        _put(values, override)
    try:
        return from_dict(_local(values))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _local(values: Any) -> Any:
    """`~/chat.json` as a full path: a shell expands it at the beginning of a word only, not after `data.path=`.

    Raises ConfigError for a URL: as a path, gs://bucket would be a folder `gs:` on the machine's own disk.
    """
    if isinstance(values, dict):
        return {key: _local(value) for key, value in values.items()}
    if isinstance(values, str) and "://" in values:
        raise ConfigError(f"{values} is a URL; give a path: mount a bucket with gcsfuse (docs/tpu-pod.md)")
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
    """YAML 1.1 reads 2e-5 as text: it becomes a number where the field is one, and in tables and lists."""
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


def _choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} is {value!r}; use {' or '.join(choices)}")
