"""Frames → a table of visual tokens `[N, D]`, chunk by chunk: only the tokens of a video are kept.

Frames come from arrays or from iterators (a video that is still being decoded); consecutive visuals share chunks of
`FRAME_CHUNK` frames.  The vision tower sees each frame once, the Q-Former each pair of a frame and a question once.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llamavid_jax.config.schema import LLaMAVIDLlavaConfig
from llamavid_jax.inference.request import RequestError, Visual
from llamavid_jax.models.llama_vid import compress_frames, encode_frames
from llamavid_jax.models.structure import Params, Structure
from llamavid_jax.shapes import FRAME_CHUNK, bucket, chunk_size, pad_to

SMALLEST_TABLE = 128  # visual tokens
UNKNOWN_FRAMES = 64  # assumed for a video whose number of frames is not known yet
SMALLEST_QUESTIONS, SMALLEST_QUESTION = 8, 32  # smallest buckets of their number and of the tokens of one


def frame_features(
    structure: Structure, params: Params, frames: Iterable[np.ndarray], config: LLaMAVIDLlavaConfig
) -> Iterator[np.ndarray]:
    """Yields features `[f, 1+P, E]` of each chunk, copied to the host while the next chunk is encoded."""
    before = None
    for chunk in _chunks(frames):
        pixels = np.stack([_checked(frame, config, None) for frame in chunk])
        encoded = encode_frames(structure, params, pad_to(pixels, chunk_size(len(chunk))))
        if before is not None:
            yield np.asarray(before[0])[: before[1]]
        before = encoded, len(chunk)
    if before is not None:
        yield np.asarray(before[0])[: before[1]]


def encode_visuals(
    structure: Structure,
    params: Params,
    config: LLaMAVIDLlavaConfig,
    visuals: Sequence[Visual],
    text_ids: np.ndarray,
    text_mask: np.ndarray,
    dtype: Any,
    progress: Callable[[int], None] | None = None,
) -> tuple[jax.Array, list[list[np.ndarray]]]:
    """Encodes all visuals: the table `[N, D]`, and `slots[visual][question]` `[F]`, each frame's first index.

    `text_ids` and `text_mask` `[U, T]` hold the questions.  `progress` gets the number of frames of each step.
    Raises RequestError for a frame of a wrong shape.
    """
    slots: list[list[list[int]]] = [[[] for _ in visual.questions] for visual in visuals]
    table = jnp.zeros((_first_size(visuals, config), config.text_config.hidden_size), dtype)
    used, running = 0, table
    questions = bucket(len(text_ids), SMALLEST_QUESTIONS)
    text_ids, text_mask = (pad_to(array, questions, array.shape[1]) for array in (text_ids, text_mask))
    for (are_features, has_cls), group in itertools.groupby(enumerate(visuals), lambda item: item[1][2:]):
        width = config.tokens_of(has_cls)
        owned = ((index, frame) for index, visual in group for frame in visual.frames)
        for chunk in _chunks(owned):
            array = np.stack([_checked(frame, config, has_cls if are_features else None) for _, frame in chunk])
            array = pad_to(array, chunk_size(len(chunk)))
            features = jnp.asarray(array, dtype) if are_features else encode_frames(structure, params, array)
            running.block_until_ready()  # the previous chunk: decoding may run ahead by one chunk, not by the video
            running = features
            pairs = []
            for place, (index, _) in enumerate(chunk):
                for number, question in enumerate(visuals[index].questions):
                    slots[index][number].append(used)
                    pairs.append((place, question, used))
                    used += width
            if used > len(table):
                table = _grow(table, size=bucket(used, 2 * len(table)))
            for some in _chunks(pairs):
                frame, question, slot = np.zeros((3, chunk_size(len(some))), np.int32)
                slot += len(table)  # padding goes beyond the table, where it is dropped
                frame[: len(some)], question[: len(some)], slot[: len(some)] = zip(*some, strict=True)
                tokens = compress_frames(
                    structure, params, features, frame, question, text_ids, text_mask, has_cls=has_cls
                )
                table = _write(table, slot[:, None] + np.arange(width, dtype=np.int32), tokens)
            if progress:
                progress(len(chunk))
    return table, [[np.asarray(slot, np.int32) for slot in visual] for visual in slots]


def table_of(
    tokens: Sequence[Sequence[np.ndarray]], width: int, dtype: Any
) -> tuple[np.ndarray, list[list[np.ndarray]]]:
    """Given visual tokens as a table `[N, D]` of a bucketed length, and the indices in it of every row's arrays."""
    arrays = [array for row in tokens for array in row]
    table = np.concatenate([np.zeros((0, width), dtype), *arrays]).astype(dtype)
    ends = itertools.accumulate(map(len, arrays))
    ranges = iter([np.arange(end - len(array), end, dtype=np.int32) for array, end in zip(arrays, ends, strict=True)])
    places = [[next(ranges) for _ in row] for row in tokens]
    return pad_to(table, bucket(len(table), SMALLEST_TABLE)), places


def token_places(slots: np.ndarray, tokens_per_frame: int) -> np.ndarray:
    """Indices `[F·(n+1)]` in the table of all tokens of the frames at `slots`."""
    return (slots[:, None] + np.arange(tokens_per_frame)).reshape(-1).astype(np.int32)


def _chunks(items: Iterable[Any]) -> Iterator[list[Any]]:
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, FRAME_CHUNK)):
        yield chunk


def _first_size(visuals: Sequence[Visual], config: LLaMAVIDLlavaConfig) -> int:
    known = [(v.num_frames or UNKNOWN_FRAMES) * len(v.questions) * config.tokens_of(v.has_cls) for v in visuals]
    return bucket(sum(known), SMALLEST_TABLE)


def _checked(frame: np.ndarray, config: LLaMAVIDLlavaConfig, features_have_cls: bool | None) -> np.ndarray:
    """The frame, if it has the shape of pixels (`features_have_cls` None) or of features."""
    vision = config.vision_tower_config
    if features_have_cls is None:
        expected, what = (3, vision.image_size, vision.image_size), "a frame of pixels [3, H, W]"
    else:
        expected = (vision.num_patches + features_have_cls, vision.hidden_size)
        what = f"features of a frame [P, E] {'with' if features_have_cls else 'without'} the CLS token"
    if np.shape(frame) != expected:
        raise RequestError(f"{what} must be {expected} for this model, not {np.shape(frame)}; use its image processor")
    frame = np.asarray(frame)
    if not jnp.issubdtype(frame.dtype, jnp.floating) or not np.isfinite(frame.astype(np.float32)).all():
        held = "values that are not finite" if jnp.issubdtype(frame.dtype, jnp.floating) else str(frame.dtype)
        raise RequestError(f"{what} holds {held}; give normalised floating-point values, from the image processor")
    return frame


@jax.jit(donate_argnums=0)
def _write(table: jax.Array, slot: jax.Array, tokens: jax.Array) -> jax.Array:
    return table.at[slot].set(tokens.astype(table.dtype), mode="drop")


@jax.jit(static_argnames="size")
def _grow(table: jax.Array, *, size: int) -> jax.Array:
    return jnp.pad(table, [(0, size - len(table)), (0, 0)])
