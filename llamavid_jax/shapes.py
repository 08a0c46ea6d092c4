"""Static shapes: the one place where lengths are rounded up, and rows and their visual tokens laid out.  NumPy only.

Every array that reaches a compiled function has a bucketed length, so that a new request seldom compiles anything.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

IMAGE_TOKEN = -200  # the placeholder id in `input_ids`; the original's IMAGE_TOKEN_INDEX
PATCH, START, END = "<im_patch>", "<im_start>", "<im_end>"  # tokens of some models; the first is used nowhere
IGNORE_LABEL = -100  # the label of positions without a loss; the original's IGNORE_INDEX
TEXT = -1  # in a visual index: this position holds a text token
FRAME_CHUNK = 32  # frames that go through the vision tower at a time


def bucket(length: int, smallest: int = 1) -> int:
    """The least of 1, 2, 3, 4, 6, 8, 12, 16, ... (powers of two and half-way steps) that is at least both numbers.

    From 256 on all are multiples of 128, which the TPU attention kernel needs.
    """
    size = 1
    while size < max(length, smallest):
        size = size * 3 // 2 if size & (size - 1) == 0 and size > 1 else -(-size * 4 // 3)
    return size


def chunk_size(frames: int) -> int:
    """Frames or pairs of one compiled step: 1 for an image, 8 for a few frames, FRAME_CHUNK for a video."""
    return next(size for size in (1, 8, FRAME_CHUNK) if frames <= size)


@dataclasses.dataclass(frozen=True)
class Row:
    """One conversation after merging: `T` positions of text or visual tokens."""

    token_ids: Int[np.ndarray, " T"]  # 0 where the position holds a visual token
    visual_index: Int[np.ndarray, " T"]  # index into the table of visual tokens, TEXT elsewhere
    labels: Int[np.ndarray, " T"] | None


def merge_row(
    input_ids: Int[np.ndarray, " t"],
    visuals: Sequence[Int[np.ndarray, " _"]],
    labels: Int[np.ndarray, " t"] | None = None,
) -> Row:
    """Lays one row out.  `visuals[i]` holds the table indices of one prompt's visual tokens, frame after frame.

    With one placeholder for each prompt, its whole block of visual tokens replaces it, with ignored labels.  With one
    for each visual token, and text between the frames, as in long videos, each becomes one slot and labels stay.
    `inference/request.py` has checked that the placeholders fit one of the two.
    """
    places = np.flatnonzero(input_ids == IMAGE_TOKEN)
    if len(places) != len(visuals) and len(places) == sum(map(len, visuals)):
        visual_index = np.full(len(input_ids), TEXT, np.int32)
        visual_index[places] = np.concatenate(visuals)
        return Row(_text_ids(input_ids), visual_index, labels)
    ids, index, kept_labels, start = [], [], [], 0
    for place, block in zip([*places, len(input_ids)], [*visuals, np.zeros(0, np.int32)], strict=True):
        text = input_ids[start:place]
        ids += [text, np.zeros(len(block), np.int64)]
        index += [np.full(len(text), TEXT, np.int32), block]
        if labels is not None:
            kept_labels += [labels[start:place], np.full(len(block), IGNORE_LABEL)]
        start = place + 1
    merged_labels = None if labels is None else np.concatenate(kept_labels)
    return Row(_text_ids(np.concatenate(ids)), np.concatenate(index).astype(np.int32), merged_labels)


def _text_ids(ids: np.ndarray) -> np.ndarray:
    return np.where(ids == IMAGE_TOKEN, 0, ids).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class RowShape:
    """One bucket of training rows: how many frames, pairs of a frame and a question, questions and tokens a row holds.

    `frames` 0 is a bucket for text alone.
    """

    frames: int
    pairs: int
    questions: int
    tokens: int


class Batch(NamedTuple):
    """Rows of one bucket, ready for a training step.  F, G, U, T: its frames, pairs, questions, tokens.

    A row holds one or more samples.  A pair is one frame read with one question; pair g gives the row-local visual
    tokens g·(n+1) to (g+1)·(n+1) - 1, which `visual_index` points into.
    """

    frames: Any  # uint8 [B, F, H, W, 3], or precomputed features [B, F, P, E] without CLS
    pair_frame: Any  # int32 [B, G]: which of the row's frames
    pair_question: Any  # int32 [B, G]: which of the row's questions
    question_ids: Any  # int32 [B, U, Q]
    question_mask: Any  # bool [B, U, Q], True on tokens
    token_ids: Any  # int32 [B, T]
    visual_index: Any  # int32 [B, T]: TEXT, or an index into the row's visual tokens
    labels: Any  # int32 [B, T], IGNORE_LABEL where there is no loss
    segment_ids: Any  # int32 [B, T]: 1, 2, ... for the row's samples, 0 for padding; None where each row is one sample
    positions: Any  # int32 [B, T], from 0 in each sample; None likewise


def pad_rows(rows: Sequence[Sequence[int] | np.ndarray], batch: int, length: int, value: int) -> Int[np.ndarray, "B T"]:
    """Stacks ragged rows as `[batch, length]`, padded on the right and below."""
    out = np.full((batch, length), value, np.int32)
    for row, values in zip(out, rows, strict=False):
        row[: len(values)] = values
    return out


def pad_to(array: np.ndarray, *sizes: int) -> np.ndarray:
    """Pads the first axes with zeros to `sizes`."""
    return np.pad(
        array,
        [(0, size - length) for size, length in zip(sizes, array.shape, strict=False)]
        + [(0, 0)] * (array.ndim - len(sizes)),
    )
