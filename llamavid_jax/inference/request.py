"""A request as the host reads it: rows, visuals and prompts, checked against each other before anything is computed.

Encoding a long video takes minutes, so errors in a request are raised here, not afterwards.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np

from llamavid_jax.config.schema import LLaMAVIDLlavaConfig
from llamavid_jax.errors import InputError
from llamavid_jax.shapes import IGNORE_LABEL, IMAGE_TOKEN

Frames = Any  # [F, 3, H, W] pixels or [F, P, E] features: an array, or an iterable of frames
Sample = Frames | list[Frames] | None


class RequestError(InputError):
    """Rows, prompts, frames or settings that do not fit together: names the counts and the remedy."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to generate: temperature 0 is greedy, top_k 0 and top_p 1 are off.  RequestError for a wrong value."""

    max_new_tokens: Any = 512
    temperature: Any = 0.0
    top_p: Any = 1.0
    top_k: Any = 0
    seed: Any = 0
    stop: Any = ()

    def __post_init__(self):
        for name, kind, fits, needed in (
            ("max_new_tokens", Integral, lambda value: 1 <= value < 2**31, "a whole number of 1 or more"),
            ("temperature", Real, lambda value: 0 <= value < 1e6, "0 (greedy) or more"),
            ("top_p", Real, lambda value: 0 < value <= 1, "above 0 and at most 1"),
            ("top_k", Integral, lambda value: 0 <= value < 2**31, "0 (off) or a whole number above it"),
            ("seed", Integral, lambda value: 0 <= value < 2**32, "a whole number from 0 to 2**32 - 1"),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, kind) or not fits(value):
                raise RequestError(f"{name} is {value!r}; it must be {needed}")
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, (list, tuple)) or not all(isinstance(text, str) and text for text in stop):
            raise RequestError(f"stop is {self.stop!r}; give texts that are not empty")
        object.__setattr__(self, "stop", tuple(stop))


class Visual(NamedTuple):
    """One image or video: its frames and the questions about it, as indices in `Request.questions`.

    `frames` yields pixels `[3, H, W]`, or features `[P, E]` if `are_features`; `has_cls` says whether these, or the
    tower's, start with the CLS token.
    """

    frames: Iterable[np.ndarray]
    questions: list[int]
    are_features: bool
    has_cls: bool

    @property
    def num_frames(self) -> int | None:
        """None for an iterator, whose length is not known."""
        return len(self.frames) if hasattr(self.frames, "__len__") else None


@dataclasses.dataclass(frozen=True)
class Request:
    """The inputs of one call, without padding."""

    ids: list[np.ndarray]  # one for each row; IMAGE_TOKEN at the placeholders
    labels: list[np.ndarray | None]
    questions: list[str]  # of all samples
    visuals: list[Visual]
    blocks: list[list[tuple[int, int]]]  # for each row's prompts: (visual, which of its questions)
    tokens: list[list[np.ndarray]] | None = None  # given visual tokens: [n, D] for each of a row's placeholders


def read_request(
    config: LLaMAVIDLlavaConfig,
    input_ids: Any,
    *,
    pixel_values: Any = None,
    features: Any = None,
    prompts: Any = None,
    visual_tokens: Any = None,
    attention_mask: Any = None,
    labels: Any = None,
    features_have_cls: bool = False,
    max_new_tokens: int = 0,
) -> Request:
    """Reads the arguments of a model call.

    Raises RequestError if they do not fit together, or if a row and its new tokens exceed the model's positions; with
    an iterator of frames the length is known only after encoding.
    """
    rows = _entries("input_ids", input_ids, None)
    if not rows:
        raise RequestError("input_ids hold no rows; give at least one")
    vocabulary = config.text_config.vocab_size
    ids, kept_labels = [], []
    masks, all_labels = _entries("attention_mask", attention_mask, len(rows)), _entries("labels", labels, len(rows))
    for number, (row, mask, targets) in enumerate(zip(rows, masks, all_labels, strict=True)):
        row = _integers(f"row {number} of input_ids", row)
        kept = _kept(number, len(row), mask)
        row = np.where(row == config.image_token_index, IMAGE_TOKEN, row)[kept]
        _check_range(f"row {number} of input_ids", row, vocabulary, IMAGE_TOKEN, "for an image")
        ids.append(row)
        if targets is not None:
            targets = _integers(f"row {number} of labels", targets)
            if len(targets) != len(rows[number]):
                raise RequestError(f"row {number} of labels holds {len(targets)} values for {len(rows[number])} ids")
            targets = targets[kept]
            _check_range(f"row {number} of labels", targets, vocabulary, IGNORE_LABEL, "for no loss")
        kept_labels.append(targets)
    if visual_tokens is not None:
        if any(given is not None for given in (pixel_values, features, prompts)):
            raise RequestError("visual_tokens stand for pixel_values or features and their prompts; give one of them")
        samples = _entries("visual_tokens", visual_tokens, len(rows))
        tokens = [_ready_tokens(config, number, arrays) for number, arrays in enumerate(samples)]
        for number, (row, arrays) in enumerate(zip(ids, tokens, strict=True)):
            check_row(config, number, row, len(arrays), sum(map(len, arrays)), max_new_tokens)
        return Request(ids, kept_labels, [], [], [], tokens)
    questions, visuals, blocks = read_visuals(
        _entries("pixel_values", pixel_values, len(rows)),
        _entries("features", features, len(rows)),
        _entries("prompts", prompts, len(rows)),
        (config.vision_tower_config.has_cls, features_have_cls),
    )
    for number, row in enumerate(ids):
        shown = [visuals[visual] for visual, _ in blocks[number]]
        known = all(visual.num_frames is not None for visual in shown)
        tokens = sum(v.num_frames * config.tokens_of(v.has_cls) for v in shown) if known else None
        check_row(config, number, row, len(blocks[number]), tokens, max_new_tokens)
    return Request(ids, kept_labels, questions, visuals, blocks)


def read_visuals(
    pixel_values: Sequence[Sample], features: Sequence[Sample], prompts: Sequence[Any], have_cls: tuple[bool, bool]
) -> tuple[list[str], list[Visual], list[list[tuple[int, int]]]]:
    """Questions, visuals and blocks of a Request.

    `have_cls`: whether the tower's features, and given ones, begin with the CLS token.
    Raises RequestError if frames and prompts do not fit together.
    """
    questions: list[str] = []
    visuals: list[Visual] = []
    blocks: list[list[tuple[int, int]]] = []
    for number, (pixels, ready, asked) in enumerate(zip(pixel_values, features, prompts, strict=True)):
        if pixels is not None and ready is not None:
            raise RequestError(f"sample {number} has both pixel_values and features; give one of them")
        frames = pixels if ready is None else ready
        asked = () if asked is None else asked
        if not isinstance(asked, (list, tuple)) or not all(isinstance(prompt, str) for prompt in asked):
            raise RequestError(f"prompts of sample {number} are {asked!r}; give a list of texts")
        if (frames is None) != (not asked):
            raise RequestError(
                f"sample {number} has {'no frames' if frames is None else 'frames'} but {len(asked)} prompts; "
                "give frames and at least one prompt, or neither"
            )
        places = range(len(questions), len(questions) + len(asked))
        questions += asked
        kind = {"are_features": ready is not None, "has_cls": have_cls[ready is not None]}
        if _are_several(frames, frame_dimensions=3 if ready is None else 2):
            if len(frames) != len(asked):
                raise RequestError(
                    f"sample {number} has {len(frames)} videos but {len(asked)} prompts; give one prompt for each"
                )
            block, numbers = [], {}
            for one, place in zip(frames, places, strict=True):
                index = numbers.setdefault(id(one), len(visuals))  # frames that are given twice are encoded once
                if index == len(visuals):
                    visuals.append(Visual(_frames(number, one), [], **kind))
                block.append((index, len(visuals[index].questions)))
                visuals[index].questions.append(place)
            blocks.append(block)
        else:
            blocks.append([(len(visuals), i) for i in range(len(asked))])
            visuals += [] if frames is None else [Visual(_frames(number, frames), list(places), **kind)]
    return questions, visuals, blocks


def check_row(
    config: LLaMAVIDLlavaConfig, number: int, row: np.ndarray, prompts: int, tokens: int | None, max_new_tokens: int
) -> None:
    """Raises RequestError unless the placeholders fit the prompts and the merged row fits the model.

    `tokens`: the number of the row's visual tokens, None while unknown.  The row holds one placeholder per prompt, or
    one per visual token.
    """
    placeholders = int((row == IMAGE_TOKEN).sum())
    if placeholders != prompts and not (0 < prompts < placeholders and tokens in (None, placeholders)):
        slots = f", or one for each of its {tokens} visual tokens" if prompts else ""
        raise RequestError(
            f"row {number} holds {placeholders} image placeholders and has {prompts} prompts; "
            f"give one placeholder for each prompt{slots}"
        )
    length, room = len(row) - placeholders + (tokens or 0), config.text_config.max_length
    if length + max_new_tokens > room:
        new = f", which with {max_new_tokens} new ones is" if max_new_tokens else ","
        raise RequestError(
            f"row {number} holds {length} tokens{new} more than the {room} positions of this model; sample fewer "
            "frames (a lower fps), ask for fewer new tokens, or use a long-video checkpoint"
        )


def _entries(name: str, values: Any, count: int | None) -> list[Any]:
    """One entry for each row; all None where `values` is None."""
    if values is None and count is not None:
        return [None] * count
    if (
        isinstance(values, (str, bytes, dict, set))
        or not hasattr(values, "__len__")
        or getattr(values, "shape", None) == ()
    ):
        raise RequestError(f"{name} is {values!r}; give a list with one entry for each row")
    if count is not None and len(values) != count:
        raise RequestError(f"input_ids hold {count} rows, but {name} {len(values)}; give one entry for each row")
    return list(values)


def _frames(number: int, frames: Any) -> Iterable[np.ndarray]:
    if hasattr(frames, "__array__"):
        frames = np.asarray(frames)  # copied from the device once, not frame by frame
    if (
        isinstance(frames, (str, bytes, dict))
        or not isinstance(frames, Iterable)
        or getattr(frames, "shape", None) == ()
    ):
        raise RequestError(
            f"frames of sample {number} are {frames!r}; give an array [F, 3, H, W], features [F, P, E], or an iterator"
        )
    if hasattr(frames, "__len__") and len(frames) == 0:
        raise RequestError(f"a video of sample {number} holds no frame; give at least one")
    return frames


def _ready_tokens(config: LLaMAVIDLlavaConfig, number: int, arrays: Any) -> list[np.ndarray]:
    arrays = [] if arrays is None else arrays
    width = config.text_config.hidden_size
    if not isinstance(arrays, (list, tuple)):
        raise RequestError(f"visual_tokens of sample {number} are {arrays!r}; give a list of arrays [n, {width}]")
    for array in arrays:
        if not isinstance(array, np.ndarray) or array.ndim != 2 or array.shape[1] != width or not len(array):
            raise RequestError(
                f"visual_tokens of sample {number} hold {getattr(array, 'shape', array)!r}; give an array [n, {width}] "
                "for each placeholder, as `visual_tokens` returns them"
            )
    return list(arrays)


def _are_several(frames: Sample, frame_dimensions: int) -> bool:
    """Whether a sample's list holds several visuals; a list of frames is one."""
    return isinstance(frames, (list, tuple)) and len(frames) > 0 and np.ndim(frames[0]) != frame_dimensions


def _integers(name: str, row: Any) -> np.ndarray:
    try:
        ids = np.asarray(row)
    except ValueError:  # a ragged list
        raise RequestError(f"{name} is {row!r}; give whole numbers in one row") from None
    if ids.ndim != 1 or len(ids) == 0 or not np.issubdtype(ids.dtype, np.integer):
        raise RequestError(f"{name} is {ids.dtype} of shape {ids.shape}; give a row of one or more whole numbers")
    return ids


def _check_range(name: str, values: np.ndarray, vocabulary: int, special: int, meaning: str) -> None:
    wrong = values[(values != special) & ((values < 0) | (values >= vocabulary))]
    if len(wrong):
        raise RequestError(f"{name} holds {wrong[0]}; ids are 0 to {vocabulary - 1}, or {special} {meaning}")


def _kept(number: int, length: int, mask: Any) -> np.ndarray:
    """Indices of a row's tokens, which are contiguous, with padding on either side."""
    if mask is None:
        return np.arange(length)
    mask = np.asarray(mask)
    kept = np.flatnonzero(mask) if mask.shape == (length,) and np.isin(mask, (0, 1)).all() else []
    if len(kept) == 0 or kept[-1] - kept[0] != len(kept) - 1:
        raise RequestError(
            f"row {number} of attention_mask is {mask.tolist()}; give 1 for each of its {length} ids that is a token "
            "and 0 for the padding before or behind them"
        )
    return kept
