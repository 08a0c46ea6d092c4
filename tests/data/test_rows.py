"""Laying samples out in a row: places, segments, and what is cut where there is no room."""

import numpy as np
import pytest
from training_cases import CONFIG, example, qformer_tokenizer

from llamavid_jax.data.examples import Example
from llamavid_jax.data.rows import lay_out_row
from llamavid_jax.shapes import TEXT, RowShape

SIDE = CONFIG.vision_tower_config.image_size


def row(examples, shape, question_tokens=16, frame_shape=(SIDE, SIDE, 3), frame_dtype=np.uint8, shares=1):
    return lay_out_row(examples, shape, 2, qformer_tokenizer(), question_tokens, frame_shape, frame_dtype, shares)


def test_two_clips_and_a_text_in_one_row():
    first, text, second = example(1, 2, 10, questions=2), example(2, 0, 7), example(3, 1, 9)
    batch, cut = row([first, text, second], RowShape(frames=4, pairs=6, questions=3, tokens=40))
    assert cut == [False] * 3
    np.testing.assert_array_equal(batch.frames[:2], first.frames)
    np.testing.assert_array_equal(batch.frames[2], second.frames[0])
    assert batch.pair_frame.tolist() == [0, 1, 0, 1, 2, 0] and batch.pair_question.tolist() == [0, 0, 1, 1, 2, 0]
    lengths = [10 - 2 + 2 * 2 * 2, 7, 9 - 1 + 2]  # a placeholder becomes the tokens of its question's pairs
    assert batch.segment_ids.tolist() == np.repeat([1, 2, 3, 0], [*lengths, 40 - sum(lengths)]).tolist()
    assert batch.positions[: lengths[0]].tolist() == list(range(lengths[0])) and batch.positions[lengths[0]] == 0
    visual = batch.visual_index[batch.visual_index != TEXT]
    assert visual.tolist() == list(range(10))
    assert (batch.labels[batch.visual_index != TEXT] == -100).all()
    start = lengths[0]
    np.testing.assert_array_equal(batch.token_ids[start : start + 7], text.input_ids)
    assert batch.question_mask.any(axis=1).tolist() == [True] * 3


def test_frames_that_several_chips_share():
    """The row's content is the same, each pair is on its frame's chip, and a sample's frames are split evenly."""
    samples = [example(1, 5, 10, questions=2), example(2, 0, 7), example(3, 6, 9), example(4, 1, 9)]
    shape = RowShape(frames=20, pairs=28, questions=4, tokens=80)
    (whole, _), (cut_up, cut) = row(samples, shape), row(samples, shape, shares=4)
    assert cut == [False] * 4
    for name in ("token_ids", "labels", "segment_ids", "positions", "question_ids"):
        np.testing.assert_array_equal(getattr(cut_up, name), getattr(whole, name))

    def seen(batch):  # frame, question and which of the pair's two tokens, at every visual position
        place = batch.visual_index[batch.visual_index != TEXT]
        pair = place // 2
        return batch.frames[batch.pair_frame[pair]], batch.pair_question[pair], place % 2

    for ours, wanted in zip(seen(cut_up), seen(whole), strict=True):
        np.testing.assert_array_equal(ours, wanted)
    np.testing.assert_array_equal(cut_up.pair_frame // 5, np.arange(28) // 7)
    assert cut_up.frames.reshape(4, 5, -1).any(axis=-1).sum(axis=1).tolist() == [5, 3, 2, 2]


def test_the_end_is_cut_where_tokens_do_not_fit():
    whole, _ = row([example(1, 2, 30)], RowShape(2, 2, 1, 64))
    short, cut = row([example(1, 2, 30)], RowShape(2, 2, 1, 20))
    assert cut == [True]
    for found, wanted in ((short.token_ids, whole.token_ids), (short.labels, whole.labels)):
        np.testing.assert_array_equal(found, wanted[:20])


def test_frames_are_thinned_evenly_to_their_room():
    clip = example(1, 9, 20)
    batch, cut = row([clip], RowShape(3, 3, 1, 64))
    assert cut == [True]
    np.testing.assert_array_equal(batch.frames, clip.frames[[0, 4, 8]])
    assert (batch.visual_index != TEXT).sum() == 3 * 2


def test_questions_without_room_are_cut_with_what_follows():
    clip = example(1, 1, 20, questions=3)
    batch, cut = row([clip], RowShape(1, 2, 2, 64))
    assert cut == [True]
    assert (batch.visual_index != TEXT).sum() == 2 * 2 and (batch.segment_ids > 0).sum() == 2 + 2 * 2


def test_a_movie_keeps_its_first_frames():
    """Each visual token has a placeholder; from the first frame without room on, the rest is cut."""
    ids = np.array([1, -200, -200, 7, -200, -200, 8, -200, -200, 9], np.int32)
    features = np.random.default_rng(0).normal(size=(3, 16, 64)).astype(np.float32)
    movie = Example("movie", ids, ids.copy(), ["what"], features)
    batch, cut = row([movie], RowShape(2, 2, 1, 16), frame_shape=(16, 64), frame_dtype=np.float32)
    assert cut == [True]
    np.testing.assert_array_equal(batch.frames, features[:2])
    assert batch.visual_index[:7].tolist() == [TEXT, 0, 1, TEXT, 2, 3, TEXT] and batch.segment_ids.sum() == 7


def test_a_sample_without_any_room_leaves_its_place_empty():
    batch, cut = row([example(1, 2, 9), example(2, 1, 9)], RowShape(2, 2, 2, 40))
    assert cut == [False, True] and set(batch.segment_ids.tolist()) == {0, 1}


def test_long_questions_lose_their_beginning():
    clip = example(1, 1, 9)
    batch, _ = row([clip], RowShape(1, 1, 1, 40), question_tokens=4)
    whole, _ = row([clip], RowShape(1, 1, 1, 40))
    ids = whole.question_ids[0][whole.question_mask[0]]
    assert len(ids) > 4 and batch.question_ids[0].tolist() == [ids[0], *ids[-3:]]


def test_no_sample_predicts_the_next_ones_first_token():
    text = example(1, 0, 9)
    labelled = Example("all", text.input_ids, text.input_ids.copy(), [], None)
    batch, _ = row([labelled, labelled], RowShape(1, 1, 1, 32))
    assert batch.labels[0] == batch.labels[9] == -100 and (batch.labels[:18] != -100).sum() == 16


@pytest.mark.parametrize("shares", [1, 4])
def test_where_a_row_has_one_question_pair_g_is_frame_g(shares):
    """The training step then need not gather frames by pair (`step.visual_table`)."""
    batch, cut = row([example(1, 3, 9), example(2, 2, 9)], RowShape(8, 8, 1, 40), shares=shares)
    used = np.unique(batch.visual_index[batch.visual_index != TEXT] // 2)
    assert cut == [False, True] and len(used) == 3
    np.testing.assert_array_equal(batch.pair_frame[used], used)
    assert not batch.pair_question.any()
