"""The sections of a recipe (`config.py`): fields, their defaults, and their allowed values."""

import dataclasses
import math
from collections.abc import Sequence

from llamavid_jax.config.strict import check_fields, strict
from llamavid_jax.errors import ConfigError
from llamavid_jax.models.stack import REMAT
from llamavid_jax.parallel.chips import CHIPS
from llamavid_jax.shapes import RowShape

TRACKERS = "tensorboard", "wandb", "mlflow"
BESIDE_OTHER_WORK = {
    f"xla_{option}_{kind}": True
    for option in ("enable_async", "tpu_enable_async_collective_fusion_fuse")
    for kind in ("all_gather", "all_reduce")
}
GATHERED_ONCE = {"xla_tpu_spmd_threshold_for_allgather_cse": 1_000_000}  # a kernel that the backward pass needs twice
COMPILER_OPTIONS = dict.fromkeys(("v5e", "v5p", "v6e"), BESIDE_OTHER_WORK | GATHERED_ONCE)


@dataclasses.dataclass(frozen=True)
class StartConfig:
    """Where the weights come from: a checkpoint folder (converted, or an earlier run's `model`), random if empty.

    `adapter` is an earlier run's `adapter`, loaded over these weights: after stage 1, its projectors for the same base;
    after a run with LoRA, the updates, which this run trains further.
    """

    model: str = ""
    adapter: str = ""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """`path`: LLaVA-format .json or .jsonl, or a folder of shards; `media`: the folder that its paths are relative to.

    `media` defaults to the folder of `path`.  `tokenizer`: a folder with the two tokenizers, by default that of
    `start.model`.  `buckets`: the row shapes, mappings of RowShape's fields.  `max_broken`: the fraction of samples
    that may be unreadable before the run stops.  `threads` and `processes` read ahead.  `image_aspect_ratio`: "pad" or
    "crop" for images, by default the model's; it is saved with the trained model.
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
    """AdamW; linear warm-up over the fraction `warmup` of the steps, then cosine decay to zero.

    Biases and LayerNorms have no weight decay; LLaMA's RMSNorms do.  `lr_factors` multiply the learning rate of the
    parameters that match a pattern, like the original's `lr_multi`.
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

    A step sums the gradients of `micro_batches`.  If `device_rows` is given, it sets their number instead: the smallest
    that gives a device at most so many rows at a time.  `loss_weighting` "tokens" weights all labelled tokens equally,
    "micro_batch" is the original's mean of means.  `dtype` is that of matmuls and frozen parameters; trained ones are
    float32.  `remat`: what a layer keeps for the backward pass.  A step with a non-finite loss or gradient is skipped;
    `max_bad_steps` in a row end the run, as do `hang_after` seconds without a step (`pace.py`).  `tracker` gets the
    metrics too, beside metrics.jsonl (`trackers.py`).  `local_copies` is a folder on each host that gets a copy of the
    state every `local_every` steps, between checkpoints (`local_copies.py`).  `compiler_options` maps a TPU generation
    to XLA options beyond the defaults (docs/tpu.md).
    """

    epochs: int = 1
    steps: int = 0
    batch_size: int = 128
    micro_batches: int = 1
    device_rows: int = 0
    loss_weighting: str = "tokens"
    dtype: str = "bfloat16"
    remat: str = "full"
    seed: int = 0
    log_every: int = 10
    tracker: str = "tensorboard"
    save_every: int = 500
    keep: int = 2
    local_copies: str = ""
    local_every: int = 50
    evaluate_every: int = 0
    max_bad_steps: int = 10
    hang_after: float = 600.0
    compiler_options: dict = dataclasses.field(default_factory=COMPILER_OPTIONS.copy)

    def __post_init__(self):
        check_fields(self, "training.", from_zero=["steps", "device_rows", "evaluate_every", "seed"])
        for generation, options in self.compiler_options.items():
            _choice("a generation in training.compiler_options", generation, tuple(CHIPS))
            if not isinstance(options, dict):
                raise ConfigError(f"training.compiler_options.{generation} is {options!r}; give {{OPTION: VALUE}}")
        _choice("training.loss_weighting", self.loss_weighting, ("tokens", "micro_batch"))
        _choice("training.tracker", self.tracker, TRACKERS)
        _choice("training.dtype", self.dtype, ("float32", "bfloat16"))
        _choice("training.remat", self.remat, tuple(REMAT))
        if self.keep < 2:
            raise ConfigError(
                f"training.keep is {self.keep}; use 2 or more, so that one is left when the newest is damaged"
            )
        if self.device_rows and self.loss_weighting != "tokens":
            raise ConfigError(
                f"training.device_rows is {self.device_rows}, but training.loss_weighting is {self.loss_weighting!r}, "
                "a loss that would change with the devices; use tokens, or give micro_batches"
            )
        if self.steps and self.epochs > 1:
            raise ConfigError(
                f"training.epochs is {self.epochs}, but training.steps is {self.steps}, which goes before it; "
                "set training.steps=0, or leave the epochs at 1"
            )
        if self.batch_size % self.micro_batches:
            raise ConfigError(
                f"training.batch_size is {self.batch_size}, no multiple of micro_batches = {self.micro_batches}"
            )


def _choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} is {value!r}; use {' or '.join(choices)}")
