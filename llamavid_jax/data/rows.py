"""Examples that share a row -> the arrays of one row of a `Batch`: packing with segment ids, static shapes.

Truncation follows one policy.  A video with more frames than fit in its row beside its text keeps evenly spaced frames
(`plan.fit` computes how many); if the text has a placeholder for every token, it keeps the first frames instead.  A
sample whose text alone is too long loses its end, after expansion.  The original cuts the text before expansion and
lets rows grow without limit.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import DTypeLike

from llamavid_jax.data.examples import Example
from llamavid_jax.shapes import IGNORE_LABEL, IMAGE_TOKEN, TEXT, Batch, RowShape, merge_row
from llamavid_jax.text.qformer_tokenizer import ABSENT, QFormerTokenizer, pad_questions


def lay_out_row(
    examples: Sequence[Example],
    shape: RowShape,
    tokens_per_frame: int,
    qformer_tokenizer: QFormerTokenizer,
    question_tokens: int,
    frame_shape: tuple[int, ...],
    frame_dtype: DTypeLike,
    shares: int = 1,
) -> tuple[Batch, list[bool]]:
    """One row, the arrays of `Batch` without their first axis, and for each example whether something was cut.

    `frame_shape` and `frame_dtype` are those of one frame, `(H, W, 3)` and uint8 or `(P, E)` and float.  Questions of
    more than `question_tokens` ids lose their beginning.  If `shares` chips hold the row's frames, each gets an even
    share of every sample's frames, and the pairs that use them, so that no chip needs another's frames.
    """
    frames = np.zeros((shape.frames, *frame_shape), frame_dtype)
    share_frames, share_pairs = shape.frames // shares, shape.pairs // shares
    pair_question = np.zeros(shape.pairs, np.int32)
    pair_frame = np.repeat(np.arange(shares, dtype=np.int32) * share_frames, share_pairs)  # unused: its share's first
    token_ids, segment_ids, positions = np.zeros((3, shape.tokens), np.int32)
    visual_index = np.full(shape.tokens, TEXT, np.int32)
    labels = np.full(shape.tokens, IGNORE_LABEL, np.int32)
    questions: list[str] = []
    counts_asked: list[int] = []  # of each example
    used_frames, used_pairs = np.zeros((2, shares), int)  # of each share
    used_tokens, cut = 0, []
    for segment, example in enumerate(examples, 1):
        own = 0 if example.frames is None else len(example.frames)
        input_ids, own_labels = example.input_ids, example.labels
        asked = min(len(example.questions), shape.questions - len(questions), share_pairs - used_pairs.max())
        if own and asked < len(example.questions):  # the text is cut at the first question without room
            end = np.flatnonzero(input_ids == IMAGE_TOKEN)[asked]
            input_ids, own_labels = input_ids[:end], own_labels[:end]
        room = min(share_frames - used_frames.max(), (share_pairs - used_pairs.max()) // max(asked, 1))
        kept = _kept_frames(example, int(room) * shares, tokens_per_frame)
        if own and not len(kept):
            cut.append(True)  # no room for a single frame: the place stays empty
            continue
        if own > len(kept) and _has_slots(example):
            places = np.flatnonzero(input_ids == IMAGE_TOKEN)
            end = places[len(kept) * tokens_per_frame]
            input_ids, own_labels = input_ids[:end], own_labels[:end]
        counts = len(kept) // shares + (np.arange(shares) < len(kept) % shares)
        share, within = np.repeat(np.arange(shares), counts), np.concatenate([np.arange(count) for count in counts])
        place, blocks = share * share_frames + used_frames[share] + within, []
        for question in range(asked if own else 0):
            pairs = share * share_pairs + used_pairs[share] + within
            pair_frame[pairs], pair_question[pairs] = place, len(questions) + question
            blocks.append((pairs[:, None] * tokens_per_frame + np.arange(tokens_per_frame, dtype=np.int32)).ravel())
            used_pairs += counts
        if own:
            frames[place] = example.frames[kept]
            used_frames += counts
            questions += example.questions[:asked]
            counts_asked.append(asked)
        row = merge_row(input_ids, blocks, own_labels)
        length = min(len(row.token_ids), shape.tokens - used_tokens)
        place = slice(used_tokens, used_tokens + length)
        token_ids[place], visual_index[place] = row.token_ids[:length], row.visual_index[:length]
        labels[place], segment_ids[place], positions[place] = row.labels[:length], segment, np.arange(length)
        labels[place.start : place.start + 1] = IGNORE_LABEL  # nothing before it predicts a sample's first token
        used_tokens = place.stop
        cut.append(length < len(row.token_ids) or len(kept) < own or asked < len(example.questions))
    question_ids = np.full((shape.questions, question_tokens), ABSENT, np.int32)
    question_mask = np.zeros(question_ids.shape, bool)
    if questions:
        read = qformer_tokenizer(questions, question_tokens)
        question_ids, question_mask = pad_questions(*read, counts_asked, shape.questions, question_tokens)
    return (
        Batch(
            frames,
            pair_frame,
            pair_question,
            question_ids,
            question_mask,
            token_ids,
            visual_index,
            labels,
            segment_ids,
            positions,
        ),
        cut,
    )


def _has_slots(example: Example) -> bool:
    """Whether each visual token has its own placeholder, rather than one per question."""
    return int((example.input_ids == IMAGE_TOKEN).sum()) != len(example.questions)


def _kept_frames(example: Example, room: int, tokens_per_frame: int) -> np.ndarray:
    own = 0 if example.frames is None else len(example.frames)
    if own <= room:
        return np.arange(own)
    return np.arange(room) if _has_slots(example) else np.linspace(0, own - 1, room).round().astype(int)
