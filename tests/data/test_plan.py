"""The plan of an epoch: every sample once, in a bucket that holds it, the same everywhere, with little padding."""

import collections

import numpy as np
import pytest

from llamavid_jax.data.examples import SampleSize
from llamavid_jax.data.plan import Schedule, describe, fit, plan_epoch
from llamavid_jax.data.sizes import BROKEN, KINDS, Sizes
from llamavid_jax.errors import InputError
from llamavid_jax.shapes import RowShape

SHAPES = [
    RowShape(frames=300, pairs=300, questions=32, tokens=4096),  # unsorted on purpose: the cheapest that fits is used
    RowShape(frames=64, pairs=64, questions=16, tokens=2048),
]
TOKENS_PER_FRAME = 2


def mixed(samples: int, seed: int = 0, features: float = 0.1) -> Sizes:
    """A quarter texts of 50 to 1500 tokens; images, 257 tokens a turn; videos, 2 tokens a frame, some as features."""
    random = np.random.default_rng(seed)
    text = np.clip(np.exp(random.normal(5.3, 0.9, samples)) + 50, 50, 1500).astype(int)
    sizes = []
    for tokens, what in zip(text.tolist(), random.random(samples), strict=True):
        if what < 0.25:
            sizes.append(SampleSize("text", 0, 0, tokens))
        elif what < 0.7:
            turns = int(random.integers(1, 4))
            sizes.append(SampleSize("pixels", 1, turns, tokens + 257 * turns))
        else:
            frames = int(np.exp(random.normal(3.5, 0.8))) + 1
            kind = "features" if random.random() < features else "pixels"
            sizes.append(SampleSize(kind, frames, 1, tokens + frames * TOKENS_PER_FRAME))
    return Sizes.of(sizes)


def plan(sizes: Sizes, shapes=SHAPES, batch_size=8, seed=3, epoch=0, packing=True, shuffle=True, shares=1):
    return plan_epoch(sizes, shapes, batch_size, TOKENS_PER_FRAME, seed, epoch, packing, shuffle, shares)


def samples_of(batches) -> list[int]:
    return [sample for batch in batches for row in batch.rows for sample in row]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("batch_size", [1, 6])
def test_every_sample_is_in_one_row_that_holds_it(packing, batch_size):
    sizes = mixed(1500)
    _, need, _ = fit(sizes, SHAPES, TOKENS_PER_FRAME)
    batches = plan(sizes, packing=packing, batch_size=batch_size)
    assert sorted(samples_of(batches)) == list(range(1500))
    for batch in batches:
        shape = SHAPES[batch.shape_index]
        assert len(batch.rows) == batch_size
        for row in batch.rows:
            tokens, frames, pairs, questions = need[:, row].sum(1)
            assert tokens <= shape.tokens and frames <= shape.frames
            assert pairs <= shape.pairs and questions <= shape.questions
            assert {KINDS[kind] for kind in sizes.kind[row]} <= {"text", batch.kind}
            assert packing or len(row) <= 1


def test_every_chip_that_shares_a_row_holds_its_part_of_every_sample():
    sizes, shares = mixed(1500), 4
    _, (_, frames, _, questions), _ = fit(sizes, SHAPES, TOKENS_PER_FRAME, shares)
    crowded = 0
    for batch in plan(sizes, shares=shares):
        shape = SHAPES[batch.shape_index]
        for row in batch.rows:
            share = -(-frames[row] // shares)
            assert share.sum() <= shape.frames // shares
            assert (share * questions[row]).sum() <= shape.pairs // shares
            crowded += len(row) > 6
    assert crowded >= 10  # rows of many samples, where rounding up matters


@pytest.mark.parametrize("packing", [True, False])
def test_a_row_that_chips_share_has_room_for_all_questions(packing):
    """An image is on one chip, whose share of the pairs must have room for all questions about it."""
    shapes = [RowShape(4, 8, 8, 512), RowShape(4, 32, 8, 1024)]
    sizes = Sizes.of([SampleSize("pixels", 1, 3, 100)] * 4)
    for shares, bucket in ((1, 0), (4, 1)):
        batches = plan(sizes, shapes, batch_size=4, packing=packing, shares=shares)
        assert {batch.shape_index for batch in batches} == {bucket}
        schedule = Schedule(sizes, shapes, 4, TOKENS_PER_FRAME, 0, packing, shares=shares)
        assert {batch.shape_index for batch in schedule.epoch(0)} == {bucket}


def test_a_run_of_rows_of_one_sample_may_go_on_where_chips_share_them_alike():
    def fingerprint(shares: int, questions: int, packing: bool = False) -> str:
        sizes = Sizes.of([SampleSize("features", 8, questions, 100)] * 4)
        return Schedule(sizes, [RowShape(8, 16, 4, 512)], 4, 2, 0, packing, shares=shares).fingerprint()

    assert fingerprint(1, 1) == fingerprint(4, 1)
    assert fingerprint(1, 1, packing=True) != fingerprint(4, 1, packing=True)
    assert fingerprint(1, 3) != fingerprint(8, 3)  # each chip has room for two pairs, its frame three questions


def test_padding_of_a_mixed_set_is_under_ten_percent():
    sizes = mixed(6000)
    batches = plan(sizes)
    _, need, _ = fit(sizes, SHAPES, TOKENS_PER_FRAME)
    slots = sum(len(batch.rows) * SHAPES[batch.shape_index].tokens for batch in batches)
    padding = 1 - need[0].sum() / slots
    assert padding < 0.1
    table = describe(batches, sizes, SHAPES, TOKENS_PER_FRAME).splitlines()
    assert f"{100 * padding:.1f} %" in table[-1] and " 6000 " in table[-1]
    unpacked = plan(sizes, packing=False)
    assert len(unpacked) > 2 * len(batches)


def test_smallest_bucket_that_holds_a_sample():
    shapes = [RowShape(8, 8, 4, 4096), RowShape(0, 1, 1, 1024), RowShape(8, 8, 4, 512), RowShape(2, 8, 4, 512)]
    sizes = [
        SampleSize("text", 0, 0, 500),
        SampleSize("text", 0, 0, 1000),
        SampleSize("text", 0, 0, 1025),
        SampleSize("text", 0, 0, 9999),
        SampleSize("pixels", 2, 4, 512),
        SampleSize("pixels", 3, 2, 512),
        SampleSize("pixels", 3, 3, 512),  # nine pairs
        SampleSize("features", 1, 1, 513),
    ]
    home, need, cut = fit(Sizes.of(sizes), shapes, TOKENS_PER_FRAME)
    assert home.tolist() == [3, 1, 0, 0, 3, 2, 3, 0]
    assert cut.tolist() == [0, 0, 0, 1, 0, 0, 1, 0]
    assert need[:, 3].tolist() == [4096, 0, 0, 0]
    assert need[:, 6].tolist() == [512 - 3 * TOKENS_PER_FRAME, 2, 6, 3]


def test_a_sample_larger_than_every_bucket():
    """It goes into the bucket that keeps most of it, and frames are cut before text."""
    shapes = [RowShape(1, 32, 32, 2048), RowShape(320, 320, 8, 2048)]
    turns, film, clip = (
        SampleSize("pixels", 1, 40, 1500),  # an image with forty questions
        SampleSize("features", 1200, 1, 1200 * TOKENS_PER_FRAME + 500),
        SampleSize("pixels", 100, 1, 100 * TOKENS_PER_FRAME + 2100),  # its text alone is too long
    )
    home, need, cut = fit(Sizes.of([turns, film, clip]), shapes, TOKENS_PER_FRAME)
    assert home.tolist() == [0, 1, 1] and cut.tolist() == [1, 1, 1]
    assert need[1:, 0].tolist() == [1, 32, 32]
    shorter = [RowShape(1000, 1000, 8, 2048)]
    _, need, _ = fit(Sizes.of([film]), shorter, TOKENS_PER_FRAME)
    frames = (2048 - 500) // TOKENS_PER_FRAME
    assert need[:, 0].tolist() == [500 + frames * TOKENS_PER_FRAME, frames, frames, 1]
    _, need, cut = fit(Sizes.of([SampleSize("pixels", 2, 6, 200)]), [RowShape(4, 4, 8, 512)], TOKENS_PER_FRAME)
    assert need[1:, 0].tolist() == [1, 4, 4] and cut.tolist() == [1]


def test_a_bucket_with_room_for_the_text_goes_before_one_with_room_for_more_frames():
    shapes = [RowShape(320, 320, 8, 512), RowShape(64, 64, 8, 1024)]
    home, need, cut = fit(Sizes.of([SampleSize("features", 200, 1, 400 + 600)]), shapes, 2)
    assert home.tolist() == [1] and need[:, 0].tolist() == [600 + 64 * 2, 64, 64, 1] and cut.tolist() == [1]


def test_frames_that_do_not_fit_take_their_times_along():
    size = SampleSize("features", 100, 1, 200 + 900 + 50, marks=900)  # two visual tokens a frame, and nine of text
    _, need, cut = fit(Sizes.of([size]), [RowShape(128, 128, 1, 512)], 2)
    frames = (512 - 50) // 11
    assert need[:, 0].tolist() == [50 + frames * 11, frames, frames, 1] and cut.tolist() == [1]


def test_frames_need_a_bucket():
    with pytest.raises(InputError, match="1 samples have pixels"):
        plan(Sizes.of([SampleSize("pixels", 1, 1, 20)]), shapes=[RowShape(0, 1, 1, 64)])


def test_order_depends_on_seed_and_epoch_alone():
    sizes = mixed(400)
    first = plan(sizes)
    assert first == plan(sizes)
    assert samples_of(first) != samples_of(plan(sizes, epoch=1))
    assert samples_of(first) != samples_of(plan(sizes, seed=4))
    in_order = samples_of(plan(Sizes.of([SampleSize("text", 0, 0, 60)] * 50), packing=False, shuffle=False))
    assert in_order == list(range(50))


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("kind", ["text", "pixels", "features"])
def test_one_modality_alone(kind, packing):
    """The original's sampler crashes if a data set has no text or no image."""
    sizes = Sizes.of([SampleSize(kind, int(kind != "text"), int(kind != "text"), 100 + i) for i in range(30)])
    batches = plan(sizes, packing=packing)
    assert sorted(samples_of(batches)) == list(range(30))
    assert {batch.kind for batch in batches} == {"pixels" if kind == "text" else kind}


def test_texts_fill_the_room_that_videos_leave():
    sizes = [SampleSize("pixels", 60, 1, 1500)] * 8 + [SampleSize("text", 0, 0, 500)] * 8
    (batch,) = plan(Sizes.of(sizes))
    assert all(len(row) == 2 for row in batch.rows)


def test_remainders_of_small_buckets_fill_the_last_batch_of_a_larger_one():
    sizes = [SampleSize("pixels", 60, 1, 1500)] * 3 + [SampleSize("pixels", 200, 1, 3000)] * 4
    (batch,) = plan(Sizes.of(sizes), packing=False)
    assert SHAPES[batch.shape_index].tokens == 4096
    assert [len(row) for row in batch.rows].count(0) == 1


def test_broken_samples_are_not_planned():
    sizes = mixed(100)
    sizes.kind[[5, 50]] = BROKEN
    assert sorted(samples_of(plan(sizes))) == [i for i in range(100) if i not in (5, 50)]
    sizes.kind[:] = BROKEN
    with pytest.raises(InputError, match="none of the 100 samples"):
        Schedule(sizes, SHAPES, 8, TOKENS_PER_FRAME, 0, True)


def test_windows_lose_nothing(monkeypatch):
    """Neither rows that stay open from one window to the next nor rows closed half empty lose a sample."""
    monkeypatch.setattr("llamavid_jax.data.plan.WINDOW", 16)
    counts = []
    for carried in (1, 8):
        monkeypatch.setattr("llamavid_jax.data.plan.CARRIED", carried)
        batches = plan(mixed(1000), batch_size=1)
        assert sorted(samples_of(batches)) == list(range(1000))
        counts.append(len(batches))
    assert counts[0] > counts[1]


def test_schedule_runs_through_the_epochs(monkeypatch):
    sizes = mixed(200)
    schedule = Schedule(sizes, SHAPES, 8, TOKENS_PER_FRAME, 3, True)
    epochs = [plan(sizes, epoch=epoch) for epoch in range(4)]
    steps = sum(map(len, epochs))
    assert schedule.steps(4) == steps
    order = np.random.default_rng(0).permutation(steps).tolist()  # batches may be read in any order
    batches = [batch for epoch in epochs for batch in epoch]
    assert all(schedule[step] == batches[step] for step in order)
    planned = []
    monkeypatch.setattr(
        "llamavid_jax.data.plan.plan_epoch", lambda *_, epoch, **__: planned.append(epoch) or epochs[epoch]
    )
    boundary = len(epochs[0])
    for step in [boundary - 1, boundary, boundary - 2, boundary + 1, boundary - 1, boundary]:
        assert schedule[step] == batches[step]  # reads across an epoch's end reuse its plan
    assert len(planned) <= 2
    assert collections.Counter(sample for step in range(steps) for row in schedule[step].rows for sample in row) == (
        dict.fromkeys(range(200), 4)
    )


def test_fingerprint_follows_data_and_settings():
    sizes = mixed(50)
    base = Schedule(sizes, SHAPES, 8, TOKENS_PER_FRAME, 3, True)
    others = [
        Schedule(mixed(50, seed=1), SHAPES, 8, TOKENS_PER_FRAME, 3, True),
        Schedule(sizes, SHAPES[:1], 8, TOKENS_PER_FRAME, 3, True),
        Schedule(sizes, SHAPES, 4, TOKENS_PER_FRAME, 3, True),
        Schedule(sizes, SHAPES, 8, 3, 3, True),
        Schedule(sizes, SHAPES, 8, TOKENS_PER_FRAME, 4, True),
        Schedule(sizes, SHAPES, 8, TOKENS_PER_FRAME, 3, False),
    ]
    assert base.fingerprint() == Schedule(mixed(50), SHAPES, 8, TOKENS_PER_FRAME, 3, True).fingerprint()
    assert len({base.fingerprint(), *(other.fingerprint() for other in others)}) == 7
