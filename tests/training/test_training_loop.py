"""The loop around the steps, with stand-ins for them: what it waits for, holds, saves, counts and closes."""

import itertools
import json
import socket
import subprocess
import sys
import types
import weakref
from pathlib import Path
from unittest.mock import MagicMock, Mock

import jax.numpy as jnp
import numpy as np
import pytest
from paths import GOLDEN
from training_cases import CONFIG
from training_data import ROOT, environment

from llamavid_jax.checkpoints.tokenizers import check_tokenizers, load_tokenizers
from llamavid_jax.data.loader import LoadedBatch, Loader
from llamavid_jax.models.loss import LossSums
from llamavid_jax.models.structure import Structure
from llamavid_jax.parallel.mesh import make_mesh
from llamavid_jax.shapes import Batch
from llamavid_jax.training import journal as journal_module
from llamavid_jax.training import loop
from llamavid_jax.training.batches import FETCHED_AHEAD
from llamavid_jax.training.config import DataConfig, LoopConfig, TrainConfig, read_config
from llamavid_jax.training.goodput import Goodput
from llamavid_jax.training.journal import Journal
from llamavid_jax.training.start import Start
from llamavid_jax.training.step import StepMetrics, TrainState

BROKEN = {"id": "sample 7", "reason": "absent.png"}


class Events(list):
    """Events in order; checks that a used batch is freed when the next is loaded."""

    batch = staticmethod(lambda: None)

    def load(self, name: str) -> None:
        assert self.batch() is None
        self.append(name)

    def compute(self, name: str, batch: Batch) -> None:
        self.batch = weakref.ref(batch.token_ids)
        self.append(name)


class Rows(Loader):
    """Batches of two rows of ten tokens, five of them padding; each is recorded in `events`."""

    def __init__(self, steps: int, events: Events, name: str = "load", row_bytes: int = 0, broken=()):
        self.steps, self.rows, self.row_bytes, self.events, self.name = steps, range(2), row_bytes, events, name
        sizes = types.SimpleNamespace(kind=np.zeros(20), broken=list(broken))
        self.schedule = types.SimpleNamespace(sizes=sizes, epoch=lambda number: [], fingerprint=lambda: "00")
        self.skipped = []

    def __iter__(self):
        for _ in range(self.steps):
            self.events.load(self.name)
            tokens, pairs = np.ones((2, 10), np.int32), np.zeros((2, 0), np.int32)
            frames, questions = np.zeros((2, 0, 1, 1, 3), np.uint8), np.zeros((2, 0, 4), np.int32)
            batch = Batch(frames, pairs, pairs, questions, questions > 0, tokens, tokens, tokens, tokens, tokens)
            yield LoadedBatch(batch, [["a"], ["b"]], self.skipped, 1, 3, 0, 10, 20)

    def get_state(self):
        return {"step": 0}


class Run:
    """`train` with stand-ins; after `stop_after` checks for a signal it reports one."""

    def __init__(self, monkeypatch, folder: Path, steps=4, row_bytes=0, stop_after=None, held_out=None, mesh="fsdp=1"):
        self.events, self.saved, self.reports, self.folder, asked = Events(), [], [], folder, itertools.count()
        loaders = {False: Rows(steps, self.events, row_bytes=row_bytes), True: held_out and held_out(self.events)}
        self.config = TrainConfig(
            output=str(folder),
            model=str(ROOT / "configs/models/tiny.yaml"),
            data=DataConfig(path="data.json", buckets=[{"frames": 0, "pairs": 0, "questions": 0, "tokens": 4096}]),
            training=LoopConfig(batch_size=2, log_every=1, save_every=2),
            mesh=mesh,
        )
        start = Mock(spec=Start)
        start.config, start.frozen, start.structure = self.config.model_config(), {}, Mock(spec=Structure)
        start.trained = {"llama.layers.attn.q.lora.a": jnp.zeros(6), "llama.layers.attn.q.lora.b": jnp.zeros(4)}
        start.mesh = make_mesh(fsdp=1)
        checkpoints = MagicMock()
        checkpoints.__enter__.return_value = checkpoints
        checkpoints.steps.return_value, checkpoints.restore.return_value = [], None
        checkpoints.save = lambda step, *_: self.saved.append(step)
        preemption = MagicMock()
        preemption.__enter__.return_value.requested = lambda: stop_after is not None and next(asked) >= stop_after
        for name, stand_in in {
            "open_data": lambda data, report: ([], [] if held_out else None),
            "load_start": lambda config, mesh: start,
            "make_loader": lambda *_, held_out=False, resumed=False: loaders[held_out],
            "check_same_data": lambda *_: None,
            "identity": lambda *_: {},
            "save_result": lambda *_: None,
            "describe": lambda *_: "plan",
            "forecast": lambda *_: "forecast",
            "initial_state": lambda *_: TrainState(jnp.int32(0), {"a": jnp.zeros(1)}, None),
            "make_train_step": lambda *_, **__: self.step,
            "make_evaluate_step": lambda *_: self.evaluate_step,
            "RunCheckpoints": lambda *_, **__: checkpoints,
            "Preemption": lambda: preemption,
        }.items():
            monkeypatch.setattr(loop, name, stand_in)
        monkeypatch.setattr(loop.jax, "block_until_ready", lambda _: self.events.append("wait"))

    def step(self, state, frozen, batch):
        self.events.compute("step", batch)
        one = jnp.float32(1)
        return TrainState(state.step + 1, state.params, None), StepMetrics(one, one, one, one, one)

    def evaluate_step(self, params, frozen, batch):
        self.events.compute("evaluate", batch)
        return LossSums(jnp.float32(6), jnp.float32(1), jnp.float32(2))

    def __call__(self, profile=False) -> int:
        return loop.train(self.config, self.reports.append, profile)

    def metrics(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]


def test_the_next_batch_is_fetched_during_a_step(tmp_path, monkeypatch):
    run = Run(monkeypatch, tmp_path)
    assert run() == 0 and run.saved == [2, 4]
    assert run.events == ["load", *["step", "load"] * 3, "step"]


def test_batches_of_long_videos_are_on_the_devices_one_at_a_time(tmp_path, monkeypatch):
    run = Run(monkeypatch, tmp_path, row_bytes=FETCHED_AHEAD)
    assert run() == 0
    assert run.events == ["load", "step", "wait"] * 4


def test_evaluation_holds_one_batch(tmp_path, monkeypatch):
    run = Run(monkeypatch, tmp_path, steps=1, held_out=lambda events: Rows(3, events, "held out"))
    assert run() == 0
    assert run.events == ["load", "step", *["held out", "evaluate"] * 3]
    assert run.metrics()[-1] == {"step": 1, "evaluation_loss": 3.0, "evaluation_token_accuracy": 0.5}


def test_a_signal_during_evaluation_saves_at_once(tmp_path, monkeypatch):
    """The second of three held-out batches is not computed, no figure is logged, and no further step runs."""
    run = Run(monkeypatch, tmp_path, stop_after=2, held_out=lambda events: Rows(3, events, "held out"))
    object.__setattr__(run.config.training, "evaluate_every", 1)
    object.__setattr__(run.config.data, "evaluation_path", "held_out.json")
    assert run() == loop.PREEMPTED
    assert run.events == ["load", "step", "load", "held out", "evaluate", "held out"] and run.saved == [1]
    assert not any("evaluation_loss" in line for line in run.metrics())


@pytest.mark.parametrize("steps,stop_after,stops", [(4, None, 1), (6, 3, 1), (6, None, 1), (2, None, 0)])
def test_a_trace_is_ended_however_the_run_ends(tmp_path, monkeypatch, steps, stop_after, stops):
    from jax._src import profiler

    calls = []
    monkeypatch.setattr(profiler, "start_trace", lambda *_, **__: calls.append("start"))
    monkeypatch.setattr(profiler, "stop_trace", lambda: calls.append("stop"))
    Run(monkeypatch, tmp_path, steps, stop_after=stop_after)(profile=True)
    assert calls == ["start", "stop"] * stops


def test_what_a_run_tells(tmp_path, monkeypatch):
    closed = []
    monkeypatch.setattr(journal_module.Metrics, "close", lambda self: closed.append(self))
    run = Run(monkeypatch, tmp_path, held_out=lambda events: Rows(1, events, "held out", broken=[BROKEN]))
    run()
    text = "\n".join(run.reports)
    assert "leaves 7 devices idle" in text
    assert "divided by 2: the largest bucket has 4096 tokens, the model 2048 positions" in text
    assert len(closed) == 1
    assert all(line["padding"] == 0.5 for line in run.metrics() if "loss" in line)
    assert [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()] == [
        BROKEN | {"set": "evaluation"}
    ]


def make_journal(run: Run, first_step: int = 1) -> Journal:
    start, training = loop.load_start(None, None), run.config.training
    data = run.config.data
    told = run.reports.append
    rows, goodput = Rows(4, Events()), Goodput(run.folder, told)
    return Journal(run.folder, start, rows, training, data.max_broken, first_step, told, goodput)


def test_held_out_samples_stop_no_run_and_are_named_once(tmp_path, monkeypatch):
    run = Run(monkeypatch, tmp_path)
    many = [BROKEN | {"id": f"sample {number}"} for number in range(20)]
    for _ in range(2):
        journal = make_journal(run)
        journal.note_held_out(many)
        journal.note_held_out(many)
        assert journal.unreadable == set() and len((tmp_path / "skipped.jsonl").read_text().splitlines()) == 20


def test_half_a_line_in_the_log_of_broken_samples(tmp_path, monkeypatch):
    """A killed run leaves half a line, even half a character, and the next run appends to it."""
    whole = json.dumps(BROKEN, ensure_ascii=False)
    lines = [whole, whole[:9] + whole, json.dumps(BROKEN | {"reason": "a\u2028b"}, ensure_ascii=False), '{"id": "ä']
    (tmp_path / "skipped.jsonl").write_bytes("\n".join(lines).encode()[:-1])
    run = Run(monkeypatch, tmp_path)
    object.__setattr__(run.config.data, "max_broken", 1.0)
    assert make_journal(run).unreadable == {("sample 7", "absent.png"), ("sample 7", "a\u2028b")}


def test_counts_are_those_of_all_processes(tmp_path, monkeypatch):
    """Four processes, of which each two read the same rows."""
    run = Run(monkeypatch, tmp_path)
    journal = make_journal(run)
    journal.rows, journal.samples, journal.truncated = 1, 10, 3
    monkeypatch.setattr(
        journal_module.multihost_utils,
        "process_allgather",
        lambda own: np.stack([own, own + np.array([2, 4, 0, 0])] * 2),
    )
    assert "22 samples; 0 unreadable ones skipped, 10 cut" in journal.summary()


def test_kernels_below_lora_do_not_train(tmp_path, monkeypatch):
    journal = make_journal(Run(monkeypatch, tmp_path))
    assert journal.updates == 10 and not any(journal.trains.values())


def test_the_tiny_recipes_have_tokenizers():
    """Those shipped with the repository, and those of the recorded cases."""
    for path in sorted((ROOT / "configs/tiny").iterdir()):
        config = read_config(path)
        tokenizers = load_tokenizers(ROOT / config.data.tokenizer)
        assert None not in tokenizers
        check_tokenizers(config.model_config(), *tokenizers, "")
    check_tokenizers(CONFIG, load_tokenizers(GOLDEN / "text")[0], load_tokenizers(GOLDEN / "short_video_mean")[1], "")


TWO_PROCESSES = """
import sys
import jax, numpy as np
jax.distributed.initialize(f"localhost:{sys.argv[1]}", 2, int(sys.argv[2]))
from types import SimpleNamespace as Some
from llamavid_jax.shapes import Batch
from llamavid_jax.parallel.mesh import MESH_AXES, ShardingError
from llamavid_jax.training.batches import own_rows, upcoming

def mesh(*order, sequence=1):
    return jax.sharding.Mesh(np.array(jax.devices())[list(order)].reshape(1, -1, 1, sequence), MESH_AXES)

crossed = mesh(0, 4, 1, 5, 6, 2, 7, 3)
rows = own_rows(crossed, 16)
assert rows == [[0, 1, 4, 5, 10, 11, 14, 15], [2, 3, 6, 7, 8, 9, 12, 13]][jax.process_index()], rows
class Loader(list):
    get_state = dict
shared = mesh(0, 4, 1, 5, 6, 2, 7, 3, sequence=2)  # each process holds a half of every row's frames
assert own_rows(shared, 16) == list(range(16))
for here in (crossed, shared):
    rows = np.array(own_rows(here, 16))[:, None]
    loaded = Some(batch=Batch(*[rows] * len(Batch._fields))._replace(frames=100 * rows + np.arange(4)))
    (one,) = upcoming(Loader([loaded]), here, 16, packing=True)
    assert one.batch.frames.shape == (16, 4) and one.batch.labels.shape == (16, 1)
    every = np.arange(16)[:, None]
    for array, whole in ((one.batch.frames, 100 * every + np.arange(4)), (one.batch.labels, every)):
        for shard in array.addressable_shards:
            assert (np.asarray(shard.data) == whole[shard.index]).all()
try:
    own_rows(mesh(0, 1, 2, 3), 16)
except ShardingError as error:
    print(error)
"""


@pytest.mark.sharding
def test_rows_follow_the_mesh():
    """Two processes with alternating devices: each loads its own rows, and all are where one process has them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    env = environment(4) | {"PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, port, str(number)],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number in range(2)
    ]  # fmt: skip
    for process in processes:
        out, errors = process.communicate(timeout=1200)
        assert out.strip() == "a mesh of 4 devices leaves process 1 without one; use all 8", errors[-3000:]
