"""The training loop: restore, step, log, save, evaluate; it stops when it is done, told to (SIGTERM) or going wrong.

    output/config.yaml  checkpoints/  metrics.jsonl  tensorboard/  skipped.jsonl     while it runs
    output/model/       a whole checkpoint, which infer.py and the next stage read   at its end
    output/adapter/     the trained parameters alone (T10), or LoRA's in PEFT's layout

A step's numbers are looked at one step later, so that the host never waits for the device with nothing queued.
"""

import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import yaml
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from rich.console import Console

from llamavid_jax.data.examples import ExampleReader
from llamavid_jax.data.loader import FrameLayout, Loader
from llamavid_jax.data.records import read_records
from llamavid_jax.data.sizes import read_sizes
from llamavid_jax.data.tokenizer_files import write_files
from llamavid_jax.training.checkpoint import RunCheckpoints
from llamavid_jax.training.config import TrainConfig
from llamavid_jax.training.journal import Journal, TrainingError, Upcoming
from llamavid_jax.training.loss import LossSums
from llamavid_jax.training.optimizer import lr_factors, make_optimizer
from llamavid_jax.training.preemption import Preemption
from llamavid_jax.training.start import Start, batch_sharding, check_rows, load_start, run_mesh, state_layout
from llamavid_jax.training.step import TrainState, make_evaluate_step, make_train_step

PREEMPTED = 143  # the exit code of a run that SIGTERM stopped: started again, it goes on


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
        check_same_data(loader)
        steps = loader.steps
        state = initial_state(config, start, mesh)
        with RunCheckpoints(output / "checkpoints", config.training.keep, report=console.print) as checkpoints:
            abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
            if checkpoints.steps():  # its arrays take the place of these
                jax.tree.map(lambda x: x.delete(), state)
            restored = checkpoints.restore(abstract)
            if restored is not None:
                check_same_run(config, restored.config, output)
                state = restored.arrays
                loader.set_state(restored.position)
                console.print(f"resuming {output} at step {restored.step} of {steps}")
            elif jax.process_index() == 0:
                write_files(
                    output, {"config.yaml": yaml.safe_dump(dataclasses.asdict(config), sort_keys=False).encode()}
                )
            journal = Journal(config, start, loader, console, first_step=int(state.step))
            evaluate_step = make_evaluate_step(start.structure)
            train_step = make_train_step(
                start.structure, config.optimizer, config.training, lr_factors(start.trained, config.optimizer), steps
            )
            batches = upcoming(loader, mesh, config.data.packing)
            following = next(batches, None)
            for step in range(int(state.step), steps):
                current = following
                if profile and step == journal.first_step + 2:
                    jax.profiler.start_trace(output / "profile")
                state, metrics = train_step(state, start.frozen, current.batch)
                following = next(batches, None) if step + 1 < steps else None
                journal.finished(step, metrics, current)
                if profile and step == journal.first_step + 4:
                    jax.block_until_ready(state)
                    jax.profiler.stop_trace()
                stop = preemption.requested()
                if stop or (step + 1) % config.training.save_every == 0 or step + 1 == steps:
                    journal.flush()
                    checkpoints.save(step + 1, state, current.position, dataclasses.asdict(config))
                if stop:
                    checkpoints.wait()
                    console.print(f"stopped by a signal after step {step + 1} of {steps}; the same command goes on")
                    return PREEMPTED
                every = config.training.evaluate_every
                if config.data.evaluation_path and every and ((step + 1) % every == 0 or step + 1 == steps):
                    journal.flush()
                    journal.metrics.log(step + 1, evaluate(evaluate_step, config, start, mesh, state.params))
        start.save(output, state.params)
        console.print(f"{output / 'model'}: the model after {steps} steps. {journal.summary()}")
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


def check_same_data(loader: Loader) -> None:
    """Raises TrainingError where a process sees other samples than the rest: each would run another program."""
    plans = multihost_utils.process_allgather(np.frombuffer(bytes.fromhex(loader.schedule.fingerprint()), np.uint8))
    if np.any(plans.reshape(jax.process_count(), -1) != plans.reshape(jax.process_count(), -1)[0]):
        raise TrainingError(
            "the processes see different data: a file is missing or unreadable on some of them; "
            "run `python -m llamavid_jax.data.validate` on each host"
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
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state_layout(config.optimizer, start.trained, mesh))
    init = jax.jit(make_optimizer(config.optimizer).init, out_shardings=shardings.optimizer)
    return TrainState(jax.device_put(np.int32(0), shardings.step), start.trained, init(start.trained))


def upcoming(loader: Loader, mesh: Mesh, packing: bool) -> Iterator[Upcoming]:
    """Batches on their way to the devices: the transfer runs while the step before computes.

    Rows of one sample need no segments: causality hides the padding behind it.
    """
    sharding = batch_sharding(mesh)
    batches = iter(loader)
    while True:
        began = time.perf_counter()
        loaded = next(batches, None)
        if loaded is None:
            return
        batch = loaded.batch if packing else loaded.batch._replace(segment_ids=None, positions=None)
        batch = jax.tree.map(lambda array: jax.make_array_from_process_local_data(sharding, array), batch)
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


def evaluate(
    evaluate_step: Any, config: TrainConfig, start: Start, mesh: Mesh, params: dict[str, jax.Array]
) -> dict[str, float]:
    """Loss and token accuracy over the held-out set."""
    loader = make_loader(config, start, mesh, held_out=True)
    sums = [evaluate_step(params, start.frozen, one.batch) for one in upcoming(loader, mesh, config.data.packing)]
    loss, correct, tokens = (float(sum(getattr(one, name) for one in sums)) for name in LossSums._fields)
    return {"evaluation_loss": loss / max(tokens, 1), "evaluation_token_accuracy": correct / max(tokens, 1)}
