"""A request as the host reads it: rows, visuals and prompts, checked against each other before anything is computed.

Encoding a long video takes minutes, so whatever can be wrong with a request is said here, not after it.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from llamavid_jax.config import IMAGE_TOKEN, LLaMAVIDLlavaConfig
from llamavid_jax.errors import InputError

Frames = Any  # [F, 3, H, W] pixels or [F, P, E] features: an array, or an iterable of frames
Sample = Frames | list[Frames] | None


class RequestError(InputError):
    """Rows, prompts, frames or settings that do not fit together: names the counts and the remedy."""


class Visual(NamedTuple):
    """One image or video: its frames and the questions asked of it, as places in `Request.questions`.

    `frames` yields pixels `[3, H, W]`, or features `[P, E]` where `are_features`; `has_cls` says whether those start
    with the CLS token (P1).
    """

    frames: Iterable[np.ndarray]
    questions: Sequence[int]
    are_features: bool = False
    has_cls: bool = True

    @property
    def num_frames(self) -> int | None:
        """None for an iterator, whose end is not known."""
        return len(self.frames) if hasattr(self.frames, "__len__") else None


@dataclasses.dataclass(frozen=True)
class Request:
    """What one call is about, without padding."""

    ids: list[np.ndarray]  # a row each; IMAGE_TOKEN at the placeholders
    labels: list[np.ndarray] | None
    questions: list[str]  # of all samples
    visuals: list[Visual]
    blocks: list[list[tuple[int, int]]]  # of each row's prompts: (visual, which of its questions)


def read_request(
    config: LLaMAVIDLlavaConfig,
    input_ids: Any,
    *,
    pixel_values: Sequence[Sample] | None = None,
    features: Sequence[Sample] | None = None,
    prompts: Sequence[Sequence[str]] | None = None,
    attention_mask: Any = None,
    labels: Any = None,
    features_have_cls: bool = False,
    max_new_tokens: int = 0,
) -> Request:
    """Reads the arguments of a model call.

    Raises RequestError where they do not fit together, or where a row and its new tokens are longer than the model's
    positions; with an iterator of frames that is known only once they are encoded.
    """
    count = len(input_ids)
    if count == 0:
        raise RequestError("input_ids hold no rows; give at least one")
    given = {
        "pixel_values": pixel_values, "features": features, "prompts": prompts,
        "attention_mask": attention_mask, "labels": labels,
    }  # fmt: skip
    for name, values in given.items():
        if values is not None and len(values) != count:
            raise RequestError(f"input_ids hold {count} rows, but {name} {len(values)}; give one entry for each row")
    kept = [_kept(number, row, attention_mask) for number, row in enumerate(input_ids)]
    ids = [
        _row(config, number, np.asarray(row)[k]) for number, (row, k) in enumerate(zip(input_ids, kept, strict=True))
    ]
    questions, visuals, blocks = read_visuals(
        pixel_values or [None] * count, features or [None] * count, prompts or [()] * count, features_have_cls
    )
    request = Request(
        ids,
        None if labels is None else [np.asarray(row)[k] for row, k in zip(labels, kept, strict=True)],
        questions,
        visuals,
        blocks,
    )
    for number, row in enumerate(ids):
        _check_placeholders(config, request, number, row, max_new_tokens)
    return request


def read_visuals(
    pixel_values: Sequence[Sample],
    features: Sequence[Sample],
    prompts: Sequence[Sequence[str]],
    features_have_cls: bool,
) -> tuple[list[str], list[Visual], list[list[tuple[int, int]]]]:
    """Questions, visuals and blocks of a Request.  Raises RequestError where frames and prompts do not fit together."""
    questions: list[str] = []
    visuals: list[Visual] = []
    blocks: list[list[tuple[int, int]]] = []
    for number, (pixels, ready, asked) in enumerate(zip(pixel_values, features, prompts, strict=True)):
        if pixels is not None and ready is not None:
            raise RequestError(f"sample {number} has both pixel_values and features; give one of them")
        frames = pixels if ready is None else ready
        if (frames is None) != (not asked):
            raise RequestError(
                f"sample {number} has {'no frames' if frames is None else 'frames'} but {len(asked)} prompts; "
                "give frames and at least one prompt, or neither"
            )
        if isinstance(asked, str) or not all(isinstance(prompt, str) for prompt in asked):
            raise RequestError(f"prompts of sample {number} are {asked!r}; give a list of texts")
        places = range(len(questions), len(questions) + len(asked))
        questions += asked
        kind = {"are_features": ready is not None, "has_cls": ready is None or features_have_cls}
        if _are_several(frames, frame_dimensions=3 if ready is None else 2):
            if len(frames) != len(asked):
                raise RequestError(
                    f"sample {number} has {len(frames)} videos but {len(asked)} prompts; give one prompt for each"
                )
            blocks.append([(len(visuals) + i, 0) for i in range(len(frames))])
            visuals += [Visual(one, [place], **kind) for one, place in zip(frames, places, strict=True)]
        else:
            blocks.append([(len(visuals), i) for i in range(len(asked))])
            visuals += [] if frames is None else [Visual(frames, places, **kind)]
    if any(visual.num_frames == 0 for visual in visuals):
        raise RequestError("a video holds no frame; give at least one")
    return questions, visuals, blocks


def check_length(config: LLaMAVIDLlavaConfig, number: int, length: int, max_new_tokens: int) -> None:
    """Raises RequestError where a merged row and its new tokens have more positions than the model."""
    room = config.text_config.max_length
    if max_new_tokens and length + max_new_tokens > room:
        raise RequestError(
            f"row {number} holds {length} tokens, which with {max_new_tokens} new ones is more than the {room} "
            "positions of this model; sample fewer frames (a lower fps), ask for fewer new tokens, or use a long-video "
            "checkpoint"
        )


def _are_several(frames: Sample, frame_dimensions: int) -> bool:
    """Whether a sample's list holds several visuals; a list of frames is one."""
    return isinstance(frames, (list, tuple)) and len(frames) > 0 and np.ndim(frames[0]) != frame_dimensions


def _kept(number: int, row: Any, attention_mask: Any) -> np.ndarray:
    """Places of a row that hold tokens."""
    ids = np.asarray(row)
    if ids.ndim != 1 or len(ids) == 0 or not np.issubdtype(ids.dtype, np.integer):
        raise RequestError(
            f"row {number} of input_ids is {ids.dtype} of shape {ids.shape}; give a row of one or more whole numbers"
        )
    if attention_mask is None:
        return np.arange(len(ids))
    mask = np.asarray(attention_mask[number])
    if mask.shape != ids.shape or not mask.any():
        raise RequestError(
            f"row {number} of attention_mask is {mask.tolist()}; give one value for each id, and keep at least one"
        )
    return np.flatnonzero(mask)


def _row(config: LLaMAVIDLlavaConfig, number: int, ids: np.ndarray) -> np.ndarray:
    ids = np.where(ids == config.image_token_index, IMAGE_TOKEN, ids)
    wrong = ids[(ids != IMAGE_TOKEN) & ((ids < 0) | (ids >= config.text_config.vocab_size))]
    if len(wrong):
        raise RequestError(
            f"row {number} of input_ids holds the id {wrong[0]}; ids are 0 to {config.text_config.vocab_size - 1}, "
            f"or {IMAGE_TOKEN} for an image"
        )
    return ids


def _check_placeholders(
    config: LLaMAVIDLlavaConfig, request: Request, number: int, row: np.ndarray, max_new_tokens: int
) -> None:
    """One placeholder a prompt, or, for a single prompt, one a visual token (M2, M4); and room for the new tokens."""
    blocks, placeholders = request.blocks[number], int((row == IMAGE_TOKEN).sum())
    frames = [request.visuals[visual].num_frames for visual, _ in blocks]
    tokens = None if None in frames else sum(frames) * config.tokens_per_frame
    if placeholders != len(blocks) and not (len(blocks) == 1 and placeholders > 1 and tokens in (None, placeholders)):
        slots = f", or one for each of its {tokens} visual tokens" if len(blocks) == 1 else ""
        raise RequestError(
            f"row {number} holds {placeholders} image placeholders and has {len(blocks)} prompts; "
            f"give one placeholder for each prompt{slots}"
        )
    check_length(config, number, len(row) - placeholders + (tokens or 0), max_new_tokens)
