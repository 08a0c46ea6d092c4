"""The training loop: restore, step, log, save, evaluate; it stops when it is done, told to (SIGTERM) or going wrong.

    output/config.yaml  checkpoints/  metrics.jsonl  tensorboard/  skipped.jsonl     while it runs
    output/model/       a whole checkpoint, which infer.py and the next stage read   at its end
    output/adapter/     the trained parameters alone (T10), or LoRA's in PEFT's layout

A step's numbers are looked at one step later, so that the host never waits for the device with nothing queued.
"""

import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import yaml
from jax.sharding import Mesh
from rich.console import Console

from llamavid_jax.data.batching import Batch
from llamavid_jax.data.examples import ExampleReader
from llamavid_jax.data.loader import FrameLayout, LoadedBatch, Loader
from llamavid_jax.data.plan import describe
from llamavid_jax.data.records import DataError, read_records
from llamavid_jax.data.sizes import read_sizes
from llamavid_jax.data.tokenizer_files import write_files
from llamavid_jax.errors import InputError
from llamavid_jax.training.checkpoint import RunCheckpoints
from llamavid_jax.training.config import TrainConfig
from llamavid_jax.training.flops import PARTS, flops_per_step
from llamavid_jax.training.loss import LossSums
from llamavid_jax.training.metrics import Metrics, Throughput
from llamavid_jax.training.optimizer import lr_factors, make_optimizer
from llamavid_jax.training.preemption import Preemption
from llamavid_jax.training.start import Start, batch_sharding, check_rows, load_start, run_mesh
from llamavid_jax.training.step import StepMetrics, TrainState, make_evaluate_step, make_train_step

PREEMPTED = 143  # the exit code of a run that SIGTERM stopped: started again, it goes on


class TrainingError(InputError):
    """A run that cannot go on: says at which step, why, and what to do."""


class Upcoming(NamedTuple):
    """A batch on the devices, what was loaded for it, and the data position behind it."""

    batch: Batch
    loaded: LoadedBatch
    position: dict[str, Any]
    wait: float  # seconds that the loader needed


def train(config: TrainConfig, console: Console, profile: bool = False) -> int:
    """Runs or resumes the run of `config.output`; returns the exit code, 0 at its end and PREEMPTED before.

    `profile` writes a trace of steps 3 to 5 to `output/profile`.  Raises InputErrors before the first step for
    whatever can be checked, TrainingError and DataError later.
    """
    mesh = run_mesh(config.mesh)
    check_rows(config, mesh)
    output = Path(config.output)
    if jax.process_index():
        console = Console(quiet=True)
    with jax.set_mesh(mesh), Preemption() as preemption:
        start = load_start(config, mesh)
        loader = make_loader(config, start, mesh)
        steps = loader.steps
        state = initial_state(config, start, mesh)
        with RunCheckpoints(output / "checkpoints", config.training.keep, report=console.print) as checkpoints:
            restored = checkpoints.restore(state)
            if restored is not None:
                check_same_run(config, restored.config, output)
                state = restored.arrays
                loader.set_state(restored.position)
                console.print(f"resuming {output} at step {restored.step} of {steps}")
            elif jax.process_index() == 0:
                write_files(output, {"config.yaml": yaml.safe_dump(dataclasses.asdict(config), sort_keys=False).encode()})
            run = Run(config, start, mesh, loader, console, first_step=int(state.step))
            train_step = make_train_step(
                start.structure, config.optimizer, config.training, lr_factors(start.trained, config.optimizer), steps
            )
            batches = upcoming(loader, mesh)
            following = next(batches, None)
            for step in range(int(state.step), steps):
                current = following
                if profile and step == run.first_step + 2:
                    jax.profiler.start_trace(output / "profile")
                state, metrics = train_step(state, start.frozen, current.batch)
                following = next(batches, None) if step + 1 < steps else None
                run.finished(step, metrics, current)
                if profile and step == run.first_step + 4:
                    jax.block_until_ready(state)
                    jax.profiler.stop_trace()
                stop = preemption.requested()
                if stop or (step + 1) % config.training.save_every == 0 or step + 1 == steps:
                    run.flush()
                    checkpoints.save(step + 1, state, current.position, dataclasses.asdict(config))
                if stop:
                    checkpoints.wait()
                    console.print(f"stopped by a signal after step {step + 1} of {steps}; the same command goes on")
                    return PREEMPTED
                every = config.training.evaluate_every
                if config.data.evaluation_path and every and ((step + 1) % every == 0 or step + 1 == steps):
                    run.evaluate(step + 1, state.params)
        start.save(output, state.params)
        console.print(f"{output / 'model'}: the model after {steps} steps. {run.summary()}")
    return 0


def make_loader(config: TrainConfig, start: Start, mesh: Mesh, held_out: bool = False) -> Loader:
    """The rows of this process, of the training data or of one pass over the held-out set."""
    data, vision = config.data, start.config.vision_tower_config
    reader = ExampleReader(
        start.tokenizer,
        data.template,
        vision.image_size,
        start.config.image_aspect_ratio,
        start.config.tokens_per_frame,
        data.fps,
        data.seed,
    )
    path = data.evaluation_path if held_out else data.path
    records = read_records(path, data.media)
    cache = Path(config.output) / ("sizes-evaluation.npz" if held_out else "sizes.npz")
    sizes = read_sizes(records, reader, path, cache, threads=max(data.threads, data.processes))
    dtype = jnp.dtype(config.training.dtype)
    group, groups = row_group(mesh, config.training.batch_size)
    return Loader(
        records,
        sizes,
        reader,
        start.qformer_tokenizer,
        data.shapes,
        {
            "pixels": FrameLayout((vision.image_size, vision.image_size, 3), np.uint8),
            "features": FrameLayout((vision.num_patches, vision.hidden_size), dtype),
        },
        batch_size=config.training.batch_size,
        question_tokens=data.question_tokens,
        seed=data.seed,
        packing=data.packing,
        shuffle=not held_out,
        epochs=1 if held_out else config.training.epochs,
        steps=0 if held_out else config.training.steps,
        threads=data.threads,
        processes=0 if held_out else data.processes,
        process_index=group,
        process_count=groups,
    )


def row_group(mesh: Mesh, batch_size: int) -> tuple[int, int]:
    """Which part of a batch's rows this process loads, and into how many parts it is cut.

    Processes whose devices hold the same rows, along `tensor` or `sequence`, load the same part.
    """
    places = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    starts, stops = zip(*(place[0].indices(batch_size)[:2] for place in places), strict=True)
    size = max(stops) - min(starts)
    return min(starts) // size, batch_size // size


def initial_state(config: TrainConfig, start: Start, mesh: Mesh) -> TrainState:
    """Step 0, the optimiser's state sharded as its parameters."""
    optimizer = make_optimizer(config.optimizer)
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    places = {path: value.sharding for path, value in start.trained.items()}

    def place(path: tuple, _: Any) -> jax.sharding.NamedSharding:
        return places.get(getattr(path[-1], "key", None), replicated)

    shardings = jax.tree.map_with_path(place, jax.eval_shape(optimizer.init, start.trained))
    step = jax.device_put(np.int32(0), replicated)
    return TrainState(step, start.trained, jax.jit(optimizer.init, out_shardings=shardings)(start.trained))


def upcoming(loader: Loader, mesh: Mesh) -> Iterator[Upcoming]:
    """Batches on their way to the devices: the transfer runs while the step before computes."""
    sharding = batch_sharding(mesh)
    batches = iter(loader)
    while True:
        began = time.perf_counter()
        loaded = next(batches, None)
        if loaded is None:
            return
        batch = Batch(*(jax.make_array_from_process_local_data(sharding, array) for array in loaded.batch))
        yield Upcoming(batch, loaded, loader.get_state(), time.perf_counter() - began)


def check_same_run(config: TrainConfig, before: dict[str, Any], output: Path) -> None:
    """Raises TrainingError where the data order or the optimiser would change in the middle of a run."""
    now = json.loads(json.dumps(dataclasses.asdict(config)))
    free = {"training": ("log_every", "save_every", "keep", "evaluate_every", "max_bad_steps", "remat"),
            "data": ("media", "evaluation_path", "max_broken", "threads", "processes")}  # fmt: skip
    for section in ("model", "start", "trainable", "data", "optimizer", "training", "lora"):
        if isinstance(now[section], dict) and isinstance(before[section], dict):
            names = [name for name in now[section].keys() | before[section].keys() if name not in free.get(section, ())]
            pairs = {f"{section}.{name}": (before[section].get(name), now[section].get(name)) for name in sorted(names)}
        else:
            pairs = {section: (before[section], now[section])}
        for name, (old, new) in pairs.items():
            if old != new:
                raise TrainingError(
                    f"{name} is {new!r}, but the run in {output} began with {old!r}; "
                    "set it back, or give another output folder"
                )


class Run:
    """What a run has seen: logs, counts, and the reasons to stop it."""

    def __init__(
        self, config: TrainConfig, start: Start, mesh: Mesh, loader: Loader, console: Console, first_step: int
    ):
        self.config, self.start, self.mesh, self.console = config, start, mesh, console
        self.steps, self.first_step, self.output = loader.steps, first_step, Path(config.output)
        sizes = loader.schedule.sizes
        self.allowed = config.data.max_broken * len(sizes.kind)
        self.metrics = Metrics(self.output, first_step + 1, report=console.print)
        self.throughput = Throughput()
        self.trains = {part: any(path.startswith(part) for path in start.trained) for part in PARTS}
        self.evaluate_step = make_evaluate_step(start.structure)
        self.pending: list[tuple[int, StepMetrics, Upcoming]] = []
        self.bad_steps = self.bad_in_a_row = self.skipped = self.truncated = self.samples = 0
        console.print(describe(loader.schedule.epoch(0), sizes, config.data.shapes, start.config.tokens_per_frame))
        self._note_skipped(sizes.broken if first_step == 0 else [])

    def finished(self, step: int, metrics: StepMetrics, current: Upcoming) -> None:
        """Takes in a step that was just sent to the device and looks at the one before it."""
        self.pending.append((step, metrics, current._replace(batch=None)))
        if len(self.pending) > 1:
            self._look(*self.pending.pop(0))

    def flush(self) -> None:
        """Looks at every step so far."""
        while self.pending:
            self._look(*self.pending.pop(0))

    def _look(self, step: int, metrics: StepMetrics, seen: Upcoming) -> None:
        values = {name: float(value) for name, value in metrics._asdict().items()}
        self.samples, self.truncated = self.samples + seen.loaded.samples, self.truncated + seen.loaded.truncated
        self._note_skipped(seen.loaded.skipped)
        if values.pop("finite"):
            self.bad_in_a_row = 0
        else:
            self._note_bad(step, values, seen.loaded.ids)
        self._count(seen)
        if (step + 1) % self.config.training.log_every == 0 or step + 1 == self.steps:
            values |= {"skipped_steps": self.bad_steps, "skipped_samples": self.skipped, "truncated": self.truncated}
            self.metrics.log(step + 1, values | self.throughput.read())

    def _count(self, seen: Upcoming) -> None:
        """Adds one step's work, over all processes."""
        batch, rows = seen.loaded.batch, self.config.training.batch_size
        share = rows // len(batch.token_ids)
        frames, pairs = (rows * shape[1] for shape in (batch.frames.shape, batch.pair_frame.shape))
        flops = flops_per_step(
            self.start.config,
            self.trains,
            frames=frames if batch.frames.ndim == 5 else 0,
            pairs=pairs,
            question_tokens=batch.question_ids.shape[2],
            rows=rows,
            row_tokens=batch.token_ids.shape[1],
        )
        self.throughput.add(seen.loaded.tokens * share, seen.loaded.frames * share, flops, seen.wait)

    def _note_skipped(self, skipped: Sequence[dict[str, str]]) -> None:
        if not skipped:
            return
        self.skipped += len(skipped)
        self._append("skipped", skipped)
        if self.skipped > self.allowed:
            raise DataError(
                f"{self.skipped} samples cannot be read, more than data.max_broken = {self.config.data.max_broken:g} of "
                f"them all; the last one is {skipped[-1]['id']}: {skipped[-1]['reason']}. All are named in "
                f"{self.output / 'skipped.jsonl'}; mend them, or raise data.max_broken"
            )

    def _note_bad(self, step: int, values: dict[str, float], ids: list[list[str]]) -> None:
        self.bad_steps, self.bad_in_a_row = self.bad_steps + 1, self.bad_in_a_row + 1
        names = [name for row in ids for name in row]
        self._append("not_finite", [{"step": step + 1, **values, "samples": names}])
        self.console.print(f"step {step + 1}: loss {values['loss']}, gradient norm {values['grad_norm']}: skipped; samples {names}")
        if self.bad_in_a_row >= self.config.training.max_bad_steps:
            raise TrainingError(
                f"{self.bad_in_a_row} steps in a row, up to step {step + 1}, had no finite loss or gradient; look at the "
                f"samples in {self.output / 'not_finite.jsonl'}, or lower optimizer.learning_rate"
            )

    def _append(self, name: str, rows: list[dict[str, Any]]) -> None:
        suffix = f"-{jax.process_index()}" if jax.process_count() > 1 else ""
        with open(self.output / f"{name}{suffix}.jsonl", "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def evaluate(self, step: int, params: dict[str, jax.Array]) -> None:
        """Loss and token accuracy over the held-out set."""
        self.flush()
        loader = make_loader(self.config, self.start, self.mesh, held_out=True)
        sums = [self.evaluate_step(params, self.start.frozen, one.batch) for one in upcoming(loader, self.mesh)]
        loss, correct, tokens = (float(sum(getattr(one, name) for one in sums)) for name in LossSums._fields)
        self.metrics.log(step, {"evaluation_loss": loss / max(tokens, 1), "evaluation_token_accuracy": correct / max(tokens, 1)})

    def summary(self) -> str:
        """What was left out or cut, in a sentence."""
        return (
            f"{self.samples} samples; {self.skipped} unreadable ones skipped, {self.truncated} cut to fit their row, "
            f"{self.bad_steps} steps without a finite loss"
        )
