"""Rows that join and leave a running batch: each answers as it does alone."""

import math
import queue

import jax
import numpy as np
import pytest

from llamavid_jax.inference.model import LLaMAVIDLlavaForConditionalGeneration
from llamavid_jax.inference.request import Settings
from llamavid_jax.inference.stopping import RowText
from llamavid_jax.parallel.mesh import make_mesh
from llamavid_jax.serving import engine as module
from llamavid_jax.serving.jobs import Job, Running
from llamavid_jax.shapes import TEXT, Row


def row(seed: int, length: int, visuals: int, width: int) -> tuple[Row, np.ndarray]:
    """`length` positions, of which the `visuals` in the middle hold visual tokens."""
    random = np.random.default_rng(seed)
    ids, index = random.integers(3, 400, length).astype(np.int32), np.full(length, TEXT, np.int32)
    index[(length - visuals) // 2 :][:visuals] = random.permutation(visuals)
    ids[index != TEXT] = 0
    return Row(ids, index, None), random.normal(size=(max(visuals, 1), width)).astype(np.float32)


def alone(model, own: Row, table: np.ndarray, **settings) -> str:
    ids = own.token_ids.copy()
    blocks = [table[own.visual_index[own.visual_index != TEXT]]] if (own.visual_index != TEXT).any() else []
    places = np.flatnonzero(own.visual_index != TEXT)
    ids = np.concatenate([ids[: places[0]], [-200], ids[places[-1] + 1 :]]) if len(places) else ids
    return model.generate([ids], visual_tokens=[blocks], **settings).texts[0]


class Asked:
    """A job that collects its pieces as they come."""

    def __init__(self, own: Row, table: np.ndarray, **settings):
        self.pieces: queue.Queue = queue.Queue()
        self.job = Job(own, table, Settings(**settings), self.pieces.put)

    def text(self) -> str:
        text = ""
        while True:
            piece = self.pieces.get(timeout=120)
            text += piece.text
            if piece.finish:
                self.finish, self.tokens = piece.finish, piece.tokens
                return text


SHAPES = [(5, 0), (130, 9), (700, 300), (40, 4), (513, 0), (128, 100), (9, 1), (1100, 40)]


def test_rows_answer_as_alone_whenever_they_join(tiny_model, engine):
    """More than twice as many rows as slots, short and long, some sampled: each joins when another has left, in the
    middle of the others' answers."""
    asked, expected = [], []
    for number, (length, visuals) in enumerate(SHAPES):
        settings = {"max_new_tokens": 10 + 5 * number}
        settings |= {"temperature": 0.9, "top_p": 0.8, "seed": number} if number % 3 == 2 else {}
        own, table = row(number, length, visuals, tiny_model.config.text_config.hidden_size)
        expected.append(alone(tiny_model, own, table, **settings))
        asked.append(Asked(own, table, **settings))
    for one in asked:
        engine.submit(one.job)
    assert [one.text() for one in asked] == expected
    assert len(set(expected)) == len(expected) and all(one.finish in ("stop", "length") for one in asked)
    assert engine.counts == {"waiting": 0, "prefilling": 0, "running": 0}


def test_the_ring_goes_round_many_times(tiny_model, engine):
    """One row after another, with more steps in all than the ring of answer positions has slots."""
    own, table = row(50, 30, 3, tiny_model.config.text_config.hidden_size)
    expected = alone(tiny_model, own, table, max_new_tokens=48)
    before = engine.steps
    while engine.steps - before < 3 * engine.room:
        asked = Asked(own, table, max_new_tokens=48)
        engine.submit(asked.job)
        assert asked.text() == expected


def test_a_cancelled_job_frees_its_slot(tiny_model, engine):
    """Long answers of departed clients hold all slots: the next request still gets its turn."""
    own, table = row(3, 20, 0, tiny_model.config.text_config.hidden_size)
    left = [Asked(own, table, max_new_tokens=48) for _ in range(5)]
    for one in left:
        engine.submit(one.job)
    left[0].pieces.get(timeout=120)
    for one in left:
        one.job.cancelled = True
    wanted = Asked(own, table, max_new_tokens=5)
    engine.submit(wanted.job)
    assert wanted.text() == alone(tiny_model, own, table, max_new_tokens=5)
    assert wanted.finish == "length" and wanted.tokens == 5


def test_a_long_prompt_does_not_stop_others(tiny_model, engine, monkeypatch):
    """A running row gets a decoding block between two chunks of the prompt."""
    monkeypatch.setattr(module, "PREFILL_POSITIONS", 1)
    order = []
    short, long = (row(8, length, 0, tiny_model.config.text_config.hidden_size) for length in (10, 1800))
    first = Asked(*short, max_new_tokens=48)
    first.job.on_piece = lambda piece: (order.append("block"), first.pieces.put(piece))
    chunk = engine._chunk
    monkeypatch.setattr(engine, "_chunk", lambda one: (order.append("chunk"), chunk(one))[1])
    second = Asked(*long, max_new_tokens=3)
    engine.submit(first.job)
    engine.submit(second.job)
    assert first.text() == alone(tiny_model, *short, max_new_tokens=48)
    assert second.text() == alone(tiny_model, *long, max_new_tokens=3)
    assert "chunk chunk chunk" not in " ".join(order)


def test_stop_strings(tiny_model, engine):
    own, table = row(1, 60, 0, tiny_model.config.text_config.hidden_size)
    whole = alone(tiny_model, own, table, max_new_tokens=30)
    stop = whole[len(whole) // 2 :][:3]
    asked = Asked(own, table, max_new_tokens=30, stop=[stop])
    engine.submit(asked.job)
    assert asked.text() == whole[: whole.index(stop)] and asked.finish == "stop"


def test_a_stop_string_in_what_was_held_back(tiny_model, engine):
    """A last token of half a character may complete a stop string: the answer ends before it, and says "stop"."""
    (half,) = tiny_model.tokenizer.encode("😀", add_bos=False)[-4:-3]
    own, table = row(1, 9, 0, tiny_model.config.text_config.hidden_size)
    for stop, text, finish in ((["\ufffd"], "", "stop"), ([], "\ufffd", "length")):
        asked = Asked(own, table, max_new_tokens=1, stop=stop)
        engine._tell(Running(asked.job, 0, RowText(tiny_model.tokenizer, stop), 512), [half], 2)
        assert asked.text() == text and asked.finish == finish


@pytest.mark.parametrize("name", ["decode_block", "extend", "empty_row", "join"])
def test_an_error_loses_no_later_answer(tiny_model, engine, monkeypatch, capsys, name):
    own, table = row(2, 20, 0, tiny_model.config.text_config.hidden_size)

    def fail(*_, **__):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(module, name, fail)
        lost = Asked(own, table, max_new_tokens=5)
        engine.submit(lost.job)
        assert lost.text() == "" and lost.finish == "error"
    asked = Asked(own, table, max_new_tokens=5)
    engine.submit(asked.job)
    assert asked.text() == alone(tiny_model, own, table, max_new_tokens=5)


def test_nothing_compiles_once_it_is_warm(tiny_model, engine):
    programs = [module.decode_block, module.extend, module.join, module.resized, module.empty_row]
    before = [program._cache_size() for program in programs]
    for seed, (length, temperature) in enumerate([(3, 0), (900, 1), (1500, 0), (129, 0.5)]):
        own, table = row(seed, length, 1, tiny_model.config.text_config.hidden_size)
        asked = Asked(own, table, max_new_tokens=20, temperature=temperature)
        engine.submit(asked.job)
        asked.text()
    assert [program._cache_size() for program in programs] == before


@pytest.mark.parametrize("axes", [{}, pytest.param({"data": 2, "tensor": 2}, marks=pytest.mark.sharding)], ids=str)
def test_every_program_is_made_at_the_start(checkpoint, axes):
    """Otherwise the first row that needs one waits for its compilation, and all others too: minutes with a large model.

    The model is read from disk, which commits its arrays to their devices: programs differ by that, and by the sharding
    of their arguments' rows.
    """
    mesh = make_mesh(jax.devices()[: math.prod(axes.values())], **axes) if axes else None
    model = LLaMAVIDLlavaForConditionalGeneration.from_pretrained(checkpoint, mesh=mesh)
    engine, made = module.Engine(model, slots=4, max_new_tokens=16), []
    engine.start()

    def heard(name, *_, **about):
        if name.endswith("backend_compile_duration"):
            made.append(about)

    jax.monitoring.register_event_duration_secs_listener(heard)
    try:
        for number, (length, visuals) in enumerate([*SHAPES, (20, 0), *SHAPES[::-1]]):
            settings = {"temperature": number % 3 / 2, "seed": number, "max_new_tokens": 16}
            own, table = row(number, length, visuals, model.config.text_config.hidden_size)
            asked = [Asked(own, table, **settings) for _ in range(1 + number % 2)]
            for one in asked:
                one.job.evidence = one.job.scores = number % 2 == 0
                engine.submit(one.job)
            if number % 4 != 1:  # otherwise the next one joins while it runs
                for one in asked:
                    one.text()
        assert not made
    finally:
        jax.monitoring.unregister_event_duration_listener(heard)
        engine.stop()
