"""The training loop: restore, step, log, save, evaluate; it stops when it is done, told to (SIGTERM) or going wrong.

    output/config.yaml  checkpoints/  metrics.jsonl  tensorboard/  skipped.jsonl     while it runs
    output/model/       a whole checkpoint, which infer.py and the next stage read   at its end
    output/adapter/     the trained parameters alone, or LoRA's in PEFT's layout

A step's numbers are looked at one step later, so that the host never waits for the device with nothing queued; rows of
long videos are the exception, as two batches of them may not fit.
"""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
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
from llamavid_jax.data.record import DataError
from llamavid_jax.data.records import read_records
from llamavid_jax.data.sizes import read_sizes
from llamavid_jax.errors import ConfigError
from llamavid_jax.files import write_files
from llamavid_jax.models.loss import LossSums
from llamavid_jax.parallel.sharding import ShardingError
from llamavid_jax.shapes import Batch
from llamavid_jax.training.checkpoint import RunCheckpoints
from llamavid_jax.training.config import TrainConfig
from llamavid_jax.training.journal import Journal, TrainingError, Upcoming
from llamavid_jax.training.optimizer import lr_factors, make_optimizer
from llamavid_jax.training.preemption import Preemption
from llamavid_jax.training.start import Start, batch_sharding, check_rows, load_start, run_mesh, state_layout
from llamavid_jax.training.step import TrainState, make_evaluate_step, make_train_step

FETCHED_AHEAD = 2**30  # bytes of frames a device: larger batches wait on the host until the step before is done
PREEMPTED = 143  # the exit code of a run that SIGTERM stopped: started again, it goes on


def train(config: TrainConfig, console: Console, profile: bool = False) -> int:
    """Runs or resumes the run of `config.output`; returns the exit code, 0 at its end and PREEMPTED before.

    `profile` writes a trace of steps 3 to 5 to `output/profile`.  Raises InputErrors before the first step for
    whatever can be checked, TrainingError and DataError later.
    """
    mesh = run_mesh(config.mesh)
    check_rows(config, mesh)
    rows, output = own_rows(mesh, config.training.batch_size), Path(config.output)
    if jax.process_index():
        console = Console(quiet=True)
    if mesh.size < jax.device_count():
        console.print(f"mesh={config.mesh} leaves {jax.device_count() - mesh.size} devices idle")
    records, held_out_data = open_data(config)  # before the weights, which take minutes
    with contextlib.ExitStack() as exits:
        exits.enter_context(jax.set_mesh(mesh))
        preemption = exits.enter_context(Preemption())
        start = load_start(config, mesh)
        checkpoints = RunCheckpoints(output / "checkpoints", config.training.keep, report=console.print)
        exits.enter_context(checkpoints)
        loader = make_loader(records, config, start, rows, resumed=bool(checkpoints.steps()))
        held_out = None if held_out_data is None else make_loader(held_out_data, config, start, rows, held_out=True)
        check_same_data(loader, held_out)
        steps = loader.steps
        text = start.config.text_config
        if text.rope_factor > 1:
            console.print(
                f"rotary positions are divided by {text.rope_factor:g}: the largest bucket has "
                f"{config.max_tokens} tokens, the model {text.max_position_embeddings} positions"
            )
        state = initial_state(config, start, mesh)
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
            write_files(output, {"config.yaml": yaml.safe_dump(dataclasses.asdict(config), sort_keys=False).encode()})
        journal = exits.enter_context(Journal(config, start, loader, console, first_step=int(state.step)))
        if held_out is not None:
            journal.note_held_out(held_out.schedule.sizes.broken)
        evaluate_step = make_evaluate_step(start.structure, config.training.micro_batches)
        train_step = make_train_step(
            start.structure, config.optimizer, config.training, lr_factors(start.trained, config.optimizer), steps
        )

        def save(step: int, position: dict[str, Any]) -> None:
            journal.flush()
            with journal.throughput.pause():
                checkpoints.save(step, state, position, dataclasses.asdict(config))

        tracing = exits.enter_context(contextlib.ExitStack())
        device_rows = batch_sharding(mesh).shard_shape((config.training.batch_size,))[0]
        ahead = loader.row_bytes * device_rows // mesh.shape["sequence"] <= FETCHED_AHEAD
        every = config.training.evaluate_every or steps
        batches, following = upcoming(loader, mesh, config), None
        for step in range(journal.first_step, steps):
            current = following or next(batches)
            if profile and step == journal.first_step + 2:
                tracing.enter_context(jax.profiler.trace(output / "profile"))
            state, metrics = train_step(state, start.frozen, current.batch)
            current, following = current._replace(batch=None), None  # the step alone holds it now
            if not ahead:
                jax.block_until_ready(metrics)
            elif step + 1 < steps:
                following = next(batches)
            journal.finished(step, metrics, current)
            if profile and step == journal.first_step + 4:
                jax.block_until_ready(state)
                tracing.close()
            stop, last = preemption.requested(), step + 1 == steps
            if stop or last or (step + 1) % config.training.save_every == 0:
                save(step + 1, current.position)
            if held_out is not None and not stop and (last or (step + 1) % every == 0):
                journal.flush()
                once = upcoming(held_out, mesh, config)
                with journal.throughput.pause():
                    values = evaluate(evaluate_step, state.params, start.frozen, once, journal, preemption.requested)
                if values is not None:
                    journal.metrics.log(step + 1, values)
                else:
                    stop = True
                    save(step + 1, current.position)
            if stop:
                checkpoints.wait()
                console.print(f"stopped by a signal after step {step + 1} of {steps}; the same command goes on")
                return PREEMPTED
        checkpoints.wait()
        start.save(output, state.params)
        console.print(f"{output / 'model'}: the model after {steps} steps. {journal.summary()}")
    return 0


def own_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """The rows of a batch that this process's devices hold, in order.

    They need not be neighbours: meshes follow the chips' wiring.  Along `tensor` and `sequence` several processes may
    hold the same.  Raises ShardingError, on all processes, where one has no device in the mesh.
    """
    idle = set(range(jax.process_count())) - {device.process_index for device in mesh.devices.flat}
    if idle:
        raise ShardingError(
            f"a mesh of {mesh.size} devices leaves process {min(idle)} without one; use all {jax.device_count()}"
        )
    places = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for place in places for row in range(*place[0].indices(batch_size))})


def open_data(config: TrainConfig) -> tuple[Sequence, Sequence | None]:
    """The records to train on and the held-out ones.  Raises ConfigError or DataError for a path that is wrong."""
    if not config.data.path:
        raise ConfigError("data.path is empty; give a LLaVA-format .json or .jsonl, or a folder of shards")
    opened = []
    for name in ("path", "evaluation_path"):
        path = getattr(config.data, name)
        try:
            opened.append(read_records(path, config.data.media) if path else None)
        except DataError as error:
            raise DataError(f"data.{name}: {error}") from None
    return tuple(opened)


def make_loader(
    records: Sequence,
    config: TrainConfig,
    start: Start,
    rows: Sequence[int],
    held_out: bool = False,
    resumed: bool = False,
) -> Loader:
    """The batches of the training data or of one pass over the held-out set, this process's `rows` of them."""
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
    cache = Path(config.output) / ("sizes-evaluation.npz" if held_out else "sizes.npz")
    sizes = read_sizes(records, reader, path, cache, max(data.threads, data.processes), retry=not resumed)
    dtype = jnp.dtype(config.training.dtype)
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
        rows=rows,
        shares=start.mesh.shape["sequence"],
    )


def check_same_data(*loaders: Loader | None) -> None:
    """Raises TrainingError where a process sees other samples than the rest: each would run another program."""
    plan = b"".join(bytes.fromhex(loader.schedule.fingerprint()) for loader in loaders if loader is not None)
    plans = multihost_utils.process_allgather(np.frombuffer(plan, np.uint8))
    if np.any(plans.reshape(jax.process_count(), -1) != plans.reshape(jax.process_count(), -1)[0]):
        raise TrainingError(
            "the processes see different data: a file is missing or unreadable on some of them; "
            "run `python -m llamavid_jax.data.validate` on each host"
        )


def initial_state(config: TrainConfig, start: Start, mesh: Mesh) -> TrainState:
    """Step 0, the optimiser's state sharded as its parameters."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state_layout(config.optimizer, start.trained, mesh))
    init = jax.jit(make_optimizer(config.optimizer).init, out_shardings=shardings.optimizer)
    return TrainState(jax.device_put(np.int32(0), shardings.step), start.trained, init(start.trained))


def upcoming(loader: Loader, mesh: Mesh, config: TrainConfig) -> Iterator[Upcoming]:
    """Batches on their way to the devices, from each process its own rows.

    Rows of one sample need no segments: causality hides the padding behind it.
    """

    def place(field: str, array: np.ndarray) -> jax.Array:
        whole = (config.training.batch_size, *array.shape[1:])
        return jax.make_array_from_process_local_data(batch_sharding(mesh, field), array, whole)

    batches, unused = iter(loader), () if config.data.packing else ("segment_ids", "positions")
    while True:
        began = time.perf_counter()
        loaded = next(batches, None)
        if loaded is None:
            return
        fields = loaded.batch._replace(**dict.fromkeys(unused))._asdict()
        placed = (None if array is None else place(field, array) for field, array in fields.items())
        yield Upcoming(Batch(*placed), loaded, loader.get_state(), time.perf_counter() - began)


def check_same_run(config: TrainConfig, before: dict[str, Any], output: Path) -> None:
    """Raises TrainingError where the data order or the optimiser would change in the middle of a run."""
    now = json.loads(json.dumps(dataclasses.asdict(config)))
    free = {
        "training": (
            "log_every", "save_every", "keep", "evaluate_every", "max_bad_steps", "remat", "compiler_options",
        ),
        "data": ("media", "evaluation_path", "max_broken", "threads", "processes"),
    }  # fmt: skip
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
    evaluate_step: Callable[..., LossSums],
    params: dict[str, jax.Array],
    frozen: dict[str, jax.Array],
    batches: Iterator[Upcoming],
    journal: Journal,
    stopped: Callable[[], bool],
) -> dict[str, float] | None:
    """Loss and token accuracy over the held-out set, one batch on the devices at a time; None once `stopped()`."""
    sums = []
    for one in batches:
        if stopped():
            return None
        journal.note_held_out(one.loaded.skipped)
        sums.append(jax.device_get(evaluate_step(params, frozen, one.batch)))
        del one
    loss, correct, tokens = (float(sum(getattr(one, name) for one in sums)) for name in LossSums._fields)
    return {"evaluation_loss": loss / max(tokens, 1), "evaluation_token_accuracy": correct / max(tokens, 1)}
