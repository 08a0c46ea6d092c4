"""A feature file in place of a video: its frames are neither decoded nor encoded again."""

from pathlib import Path
from typing import Any

import numpy as np

from llamavid_jax.inference.model import LLaMAVIDLlavaForConditionalGeneration
from llamavid_jax.inference.sources import read_stored
from llamavid_jax.media.features import describe, read_header
from llamavid_jax.media.image_processor import LLaMAVIDLlavaImageProcessor
from llamavid_jax.media.source import MediaError
from llamavid_jax.serving.decoding import check_length


def stored_film(
    path: Path,
    rate: tuple[Any, Any],
    model: LLaMAVIDLlavaForConditionalGeneration,
    images: LLaMAVIDLlavaImageProcessor,
    most: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Features `[F, P, E]` and times `[F]`.  `rate` holds the frames per second and their number, as requested.

    Raises MediaError for features of another tower or rate, damaged ones, and files that do not describe their origin.
    """
    fps, count = rate
    if describe(path) is None:
        raise MediaError(f"{path} holds features, and not of what; make it with llamavid-features")
    if count is not None:
        raise MediaError(f"{path} holds features of frames that were taken before; leave out num_frames")
    known = read_stored(path, fps, model, images)
    check_length(path, known.sampling.timeline, len(known.sampling), most)
    return np.stack(list(known.frames())).astype(model.dtype), known.sampling.times


def stored_text(path: Path, goes_alone: bool) -> str | None:
    """The speech in the video, with the placeholders of its frames; None if the file has no text.

    Raises MediaError unless the video `goes_alone`.
    """
    text = read_header(path).inputs
    if text is not None and not goes_alone:
        raise MediaError(f"{path} is a film with what is said, and goes alone; show nothing else")
    return text
