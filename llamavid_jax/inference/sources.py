"""Where the frames of a visual come from: pixels that go through the tower, or features that a file holds already."""

import dataclasses
import hashlib
import os
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llamavid_jax.inference.model import LLaMAVIDLlavaForConditionalGeneration
from llamavid_jax.media.feature_file import Description
from llamavid_jax.media.features import check_made_by, describe, iter_features, processing, read_header
from llamavid_jax.media.image_processor import LLaMAVIDLlavaImageProcessor
from llamavid_jax.media.source import MediaError
from llamavid_jax.media.timeline import Sampling, Timeline
from llamavid_jax.text.conversation import IMAGE

RULES = 2  # increased when decoding, sampling or preprocessing changes the pixels of a key


class Shown(NamedTuple):
    """One visual: frames [3, S, S] if `has_cls` is None, else features [P, E] with or without the CLS token."""

    frames: Iterable[np.ndarray]
    has_cls: bool | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of `model.visual_tokens`."""
        if self.has_cls is None:
            return {"pixel_values": self.frames}
        return {"features": self.frames, "features_have_cls": self.has_cls}


@dataclasses.dataclass(frozen=True)
class Stored:
    """Features in a file, and the sampling of their frames."""

    path: Path
    has_cls: bool
    sampling: Sampling
    inputs: str | None = None

    def frames(self) -> Iterator[np.ndarray]:
        """Yields the features of each frame.  Raises MediaError at the first damaged frames."""
        return iter_features(self.path, keep_cls=self.has_cls)


def stored(path: Path, description: Mapping[str, Any]) -> Stored:
    """A feature file by its description.  The CLS token stays, so that answers equal those about the video itself."""
    said = description["sampling"]
    sampling = _sampling(np.array(description["timestamps"], float), said["seconds"], said["rule"])
    return Stored(path, description["cls"], sampling, description["inputs"])


def _sampling(times: np.ndarray, seconds: float | int, rule: str) -> Sampling:
    places = np.arange(len(times))
    return Sampling(Timeline(places, times, float(seconds), 0.0), rule, places, times)


def read_stored(
    path: str | Path,
    fps: float | int | None,
    model: LLaMAVIDLlavaForConditionalGeneration,
    images: LLaMAVIDLlavaImageProcessor,
) -> Stored:
    """A file of features of any kind.  Raises MediaError, also for another tower or another rate than `fps`.

    Only feature files have a description.  Frames of other kinds of files count as `fps` a second, without CLS token,
    as in the original.
    """
    description, header = describe(path), read_header(path)
    vision = model.config.vision_tower_config
    if (header.patches, header.width) != (vision.num_patches, vision.hidden_size):
        raise MediaError(
            f"{path} holds {header.patches} patches of {header.width} numbers a frame, this model takes "
            f"{vision.num_patches} of {vision.hidden_size}; make the features with its own tower: llamavid-features"
        )
    if header.inputs is not None and header.inputs.count(IMAGE) != header.frames:
        raise MediaError(
            f"{path}: `inputs` has {header.inputs.count(IMAGE)} {IMAGE} for {header.frames} frames; write one for each"
        )
    if description is None:
        rate = images.rate(fps)
        sampling = _sampling(np.arange(header.frames) / rate, header.frames / rate, "features")
        return Stored(Path(path), False, sampling, header.inputs)
    check_made_by(path, description, model.tower.rounded(), prepared(images))
    if fps not in (None, rate := description["sampling"]["fps"]):
        raise MediaError(f"{path} holds {rate:g} frames a second, not {fps:g}; leave out fps, or give the video")
    return stored(Path(path), description)


def prepared(images: LLaMAVIDLlavaImageProcessor) -> dict[str, Any]:
    """How a video's frames are preprocessed for the tower."""
    return processing(images.size, images.image_mean, images.image_std)


def video_key(
    path: Path,
    fps: float | int,
    model: LLaMAVIDLlavaForConditionalGeneration,
    images: LLaMAVIDLlavaImageProcessor,
    fast: bool = False,
    most: int | None = None,
) -> dict[str, Any]:
    """All that the features of a video depend on.

    `fast`: key frames replace the requested ones; `most`: the number of frames that the rate was fitted to.
    """
    return {
        "rules": RULES,
        "source": content(path),
        "fps": float(fps),
        "fast": fast,
        "most": most,
        "processing": prepared(images),
        "tower": model.tower.exact(),
        "dtype": model.dtype.name,
    }


def content(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file: 1.4 GB/s on a core with SHA instructions."""
    with path.open("rb") as stream:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def version(path: Path) -> tuple[int, ...]:
    """Numbers that change when a file is written to or replaced."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def description(
    video: str | Path,
    key: Mapping[str, Any],
    sampling: Sampling,
    model: LLaMAVIDLlavaForConditionalGeneration,
    inputs: str | None = None,
) -> Description:
    """The description for a video's feature file; `key` is its `video_key`, `inputs` its text with subtitles."""
    return Description(
        cls=model.config.vision_tower_config.has_cls,
        timestamps=sampling.times.tolist(),
        source={"name": os.path.basename(urllib.parse.urlsplit(str(video)).path), **key["source"]},
        sampling={"fps": key["fps"], "rule": sampling.rule, "seconds": float(sampling.timeline.seconds)},
        processing=key["processing"],
        tower={"sha256": model.tower.rounded(), "dtype": key["dtype"]},
        inputs=inputs,
    )


def gathered(visual: Shown, model: LLaMAVIDLlavaForConditionalGeneration) -> Shown:
    """The visual's features, all in host memory."""
    if visual.has_cls is None:
        return Shown(model.vision_features(visual.frames), model.config.vision_tower_config.has_cls)
    return Shown(np.stack(list(visual.frames)).astype(model.dtype), visual.has_cls)
