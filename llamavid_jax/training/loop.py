"""The training loop: restore, step, log, save, evaluate; it stops at its end, on SIGTERM, or when training goes wrong.

    output/config.yaml  checkpoints/  metrics.jsonl  goodput.jsonl  tensorboard/  skipped.jsonl     while it runs
    output/model/       a complete checkpoint, which infer.py and the next stage read   at its end
    output/adapter/     the trained parameters alone, or LoRA's in PEFT's layout

The metrics of a step are read one step later, so that the device always has a step queued.  Rows of long videos are the
exception, as two batches of them may not fit in memory.
"""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import yaml

from llamavid_jax import buckets, uploads
from llamavid_jax.data.plan import describe
from llamavid_jax.errors import ConfigError
from llamavid_jax.files import find, local, write_files
from llamavid_jax.models.loss import LossSums
from llamavid_jax.models.structure import Params
from llamavid_jax.parallel.mesh import row_shards
from llamavid_jax.parallel.sharding import specs
from llamavid_jax.training.batches import (
    Upcoming,
    check_same_data,
    make_loader,
    open_data,
    own_rows,
    room_ahead,
    upcoming,
)
from llamavid_jax.training.checkpoint import RunCheckpoints
from llamavid_jax.training.config import TrainConfig
from llamavid_jax.training.faults import Fault
from llamavid_jax.training.forecast import forecast
from llamavid_jax.training.goodput import Goodput
from llamavid_jax.training.identity import check_same_media, check_same_run, identity
from llamavid_jax.training.journal import Journal
from llamavid_jax.training.layout import check_rows, initial_state, on_mesh, run_mesh
from llamavid_jax.training.local_copies import LocalCopies
from llamavid_jax.training.optimizer import lr_factors
from llamavid_jax.training.owner import only_run
from llamavid_jax.training.preemption import Preemption
from llamavid_jax.training.result import save_result
from llamavid_jax.training.start import check_adapter, load_start
from llamavid_jax.training.step import make_evaluate_step, make_train_step
from llamavid_jax.training.trackers import check_tracker

PREEMPTED = 143  # the exit code of a run that SIGTERM stopped; restarted, it resumes


def train(
    config: TrainConfig, report: Callable[[str], None], profile: bool = False, faults: Sequence[Fault] = ()
) -> int:
    """Runs or resumes the run of `config.output`; returns the exit code, 0 at its end and PREEMPTED before.

    `report` gets the messages, one line each.  `profile` writes a trace of this process's third to fifth step to
    `output/profile`; `faults` are simulated (`faults.py`).  Raises InputErrors before the first step for whatever can
    be checked, TrainingError and DataError later.
    """
    output, data, loop = local(config.output), config.data, config.training
    report = report if jax.process_index() == 0 else _nobody
    with contextlib.ExitStack() as exits:
        # 1. Whatever can be checked is checked before the weights are read, which takes minutes.
        mesh = run_mesh(config.mesh)
        if mesh.size < jax.device_count():
            report(f"mesh={config.mesh} leaves {jax.device_count() - mesh.size} devices idle")
        recipe, loop = config, on_mesh(loop, mesh)
        config = dataclasses.replace(config, training=loop)
        check_rows(data.shapes, loop.batch_size, loop.micro_batches, mesh)
        rows = own_rows(mesh, loop.batch_size)
        records, held_out_records = open_data(data, report)
        check_adapter(config.start.adapter)
        check_tracker(loop.tracker)
        make_output(output)
        taken = exits.enter_context(only_run(output))
        send_logs = exits.enter_context(uploads.sending(output, _is_own, report, taken))
        goodput = Goodput(output, report)
        exits.enter_context(jax.set_mesh(mesh))
        preemption = exits.enter_context(Preemption())
        checkpoints = exits.enter_context(RunCheckpoints(output / "checkpoints", loop.keep, report, taken))
        copies = None
        if loop.local_copies:
            copies = exits.enter_context(LocalCopies(loop.local_copies, checkpoints.directory, mesh, report))
        resumed = bool(checkpoints.steps() or (copies and copies.steps()))

        # 2. The model: its weights on the mesh, its tokenizers.
        start = load_start(config, mesh)
        text = start.config.text_config
        if text.rope_factor > 1:
            report(
                f"rotary positions are divided by {text.rope_factor:g}: the largest bucket has "
                f"{config.max_tokens} tokens, the model {text.max_position_embeddings} positions"
            )

        # 3. The data: which samples share a row, in which order.
        loader = make_loader(records, output, start, data, loop, rows, resumed=resumed)
        held_out = None
        if held_out_records is not None:
            held_out = make_loader(held_out_records, output, start, data, loop, rows, held_out=True)
        made_of = identity(config, start)
        check_same_data(made_of, loader, held_out)
        schedule, tokens_per_frame = loader.schedule, start.config.tokens_per_frame
        report(describe(schedule.epoch(0), schedule.sizes, data.shapes, tokens_per_frame, row_shards(mesh)))

        # 4. The state: that of step 0, or of where the run stopped.
        state = initial_state(config.optimizer, start.trained, mesh)
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        if resumed:  # the restored arrays need their memory
            jax.tree.map(lambda x: x.delete(), state)
        with goodput.of("restore"):
            restored = copies and copies.restore(abstract, at_least=max(checkpoints.steps(), default=0))
            restored = restored or checkpoints.restore(abstract)
        if restored is not None:
            check_same_run(made_of, restored.config, output)
        check_same_media(records, output, restored is not None, data.threads, report)
        if restored is not None:
            state = restored.arrays
            loader.set_state(restored.position)
            report(f"resuming {output} at step {restored.step} of {loader.steps}")
        elif jax.process_index() == 0:
            write_files(output, {"config.yaml": yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False).encode()})
        report(forecast(config, start, state, loader))
        journal = Journal(output, start, loader, loop, data.max_broken, int(state.step), report, goodput)
        exits.enter_context(journal)
        if held_out is not None:
            journal.note_held_out(held_out.schedule.sizes.broken)

        # 5. The compiled steps.
        factors = lr_factors(start.trained, config.optimizer)
        places = specs(start.trained)
        train_step = make_train_step(start.structure, config.optimizer, loop, factors, loader.steps, specs=places)
        evaluate_step = make_evaluate_step(start.structure, loop.micro_batches)

        # 6. The steps; the next batch is transferred while the current one is computed with.
        ahead = room_ahead(loader, mesh, loop.batch_size)
        batches, following = upcoming(loader, mesh, loop.batch_size, data.packing), None
        tracing = exits.enter_context(contextlib.ExitStack())
        for step in range(journal.first_step, loader.steps):
            current = following or next(batches)
            if profile and step == journal.first_step + 2:
                tracing.enter_context(jax.profiler.trace(output / "profile"))
            frozen = start.frozen
            for fault in faults:
                frozen = fault.strike(step + 1, frozen)
            journal.pace.begin(current.batch, current.wait)
            state, metrics = train_step(state, frozen, current.batch)
            journal.pace.sent(metrics.loss)
            current, following = current._replace(batch=None), None  # only the step holds the batch now
            if ahead:
                following = next(batches, None)
            else:
                jax.block_until_ready(metrics)
            journal.finished(step, metrics, current)
            if profile and step == journal.first_step + 4:
                jax.block_until_ready(state)
                tracing.close()

            done, last, stop = step + 1, step + 1 == loader.steps, preemption.requested()
            due = stop or last or done % loop.save_every == 0
            if due or (copies and done % loop.local_every == 0):
                with journal.pause("save"):
                    if copies:  # two saves at a time would hold the state twice in the host's memory
                        copies.wait()
                    if due:
                        send_logs()  # the logs up to this step
                        checkpoints.save(done, state, current.position, made_of)
                    elif not checkpoints.busy():
                        copies.save(done, state, current.position, made_of)
            if held_out is not None and not stop and (last or done % (loop.evaluate_every or loader.steps) == 0):
                with journal.pause("evaluation"):
                    once = upcoming(held_out, mesh, loop.batch_size, data.packing)
                    values = evaluate(evaluate_step, state.params, start.frozen, once, journal, preemption.requested)
                    if values is None:
                        stop = True
                        checkpoints.save(done, state, current.position, made_of)
                    else:
                        journal.metrics.log(done, values)
            if stop:
                with journal.pause("save"):
                    checkpoints.wait()
                report(f"stopped by a signal after step {done} of {loader.steps}; the same command goes on")
                return PREEMPTED

        # 7. The model.
        with journal.pause("save"):
            checkpoints.wait()
            save_result(output, start, state.params, loop.dtype, config.lora, config.start, data.fps)
        goodput.write(loader.steps)
        report(f"{output / 'model'}: the model after {loader.steps} steps. {journal.summary()}")
    return 0


def make_output(output: Path) -> None:
    """Raises InputError, now and not at the first save, for a folder that cannot be made or written to."""
    try:
        str(output.absolute()).encode()
    except UnicodeEncodeError:
        raise ConfigError(f"output is {output}, a name that UTF-8 cannot hold; give another") from None
    if (buckets.url(output) or "gs:").startswith("s3:"):
        raise ConfigError(f"output is {output}, where checkpoints would be renamed by copying; give gs:// or a folder")
    find(output)  # fetches the logs of the run so far, if they are in a bucket
    write_files(output, {})


def evaluate(
    evaluate_step: Callable[..., LossSums],
    params: Params,
    frozen: Params,
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


def _is_own(name: str) -> bool:
    """Whether this process writes the log `name`: process 0 writes all but those that end in another's number."""
    number = re.search(r"-(\d+)\.jsonl$", name)
    return int(number[1] if number else 0) == jax.process_index()


def _nobody(text: str) -> None:
    """Drops the messages of all processes but the first."""
