"""The documented `LLaMAVIDLlavaImageProcessor`: images and videos -> pixels for the vision tower.

    images: path, URL, Pillow image or uint8 array [H, W, 3]        -> float32 [1, 3, S, S] each
    videos: path, URL, uint8 array [F, H, W, 3] or list of frames   -> float32 [F, 3, S, S] each, and their metadata

S is `size`.  Stills are padded to a square or centre-cropped by `image_aspect_ratio`, frames always cropped.
The settings are stored in `preprocessor_config.json`, in the format of transformers' CLIP, those for sampling in
`video_preprocessor_config.json`.
"""

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, Int, UInt8
from PIL import Image

from llamavid_jax.config.parts import LLaMAVIDLlavaVisionConfig
from llamavid_jax.config.schema import LLaMAVIDLlavaConfig, stated_pixels
from llamavid_jax.errors import ConfigError
from llamavid_jax.files import find, write_files
from llamavid_jax.media.images import normalize, open_image, pad_to_square, resize_and_crop, to_rgb
from llamavid_jax.media.processor_settings import clip_settings, fields, read_settings
from llamavid_jax.media.source import MediaError, check_size, fetch
from llamavid_jax.media.timeline import Sampling, check_fps, shown_at
from llamavid_jax.media.video import Partial, Progress, cores, iter_frames, plan_video, read_timeline

FILE_NAME, VIDEO_FILE = "preprocessor_config.json", "video_preprocessor_config.json"
SAMPLING = ("fps", "num_frames", "do_sample_frames")
FORMS = "give a path, a URL, a picture, an array or a list of them"

# Any, as arrays may be of any library and are checked here (MediaError): types would only repeat the checks.
Picture = Any  # path, URL, Pillow image or uint8 array [H, W, 3]
Clip = Any  # path, URL, uint8 array [F, H, W, 3] or list of images
Pixels = Float32[np.ndarray, "F 3 S S"]


@dataclasses.dataclass(frozen=True, eq=False)
class VideoMetadata:
    """Which frames of a video were sampled, in transformers' names.  An image is one frame at 0 s."""

    fps: float  # frames a second of the source, on average
    total_num_frames: int
    duration: float  # seconds
    frames_indices: Int[np.ndarray, " F"]  # indices among the source's frames
    timestamps: Float64[np.ndarray, " F"]  # seconds after the first one


@dataclasses.dataclass(frozen=True)
class LLaMAVIDLlavaImageProcessor:
    """`processor(images=[...], videos=[...])` gives `pixel_values`, `timestamps`, `video_metadata`, one entry each.

    Samples `fps` frames a second of a video, or `num_frames` evenly spaced; takes all without `do_sample_frames`.
    """

    size: int = 224  # pixels: S
    image_mean: tuple[float, ...] = LLaMAVIDLlavaVisionConfig.image_mean
    image_std: tuple[float, ...] = LLaMAVIDLlavaVisionConfig.image_std
    image_aspect_ratio: str = "pad"  # of stills: "pad" or "crop"
    fps: Any = 1.0  # frames a second
    num_frames: Any = None
    do_sample_frames: Any = True

    def __post_init__(self):
        if type(self.size) is not int or not 1 <= self.size <= 4096:
            raise ConfigError(f"size is {self.size!r}; use a whole number of pixels from 1 to 4096, such as 224 or 336")
        for name in ("image_mean", "image_std"):
            values = getattr(self, name)
            if (
                not isinstance(values, tuple | list)
                or len(values) != 3
                or not all(isinstance(value, float) and np.isfinite(value) for value in values)
            ):
                raise ConfigError(f"{name} is {values!r}; three numbers are needed, for red, green and blue")
        if min(self.image_std) <= 0:
            raise ConfigError(f"image_std is {self.image_std!r}; pixels are divided by it, so use numbers above 0")
        if self.image_aspect_ratio not in ("pad", "crop"):
            raise ConfigError(f"image_aspect_ratio is {self.image_aspect_ratio!r}; use 'pad' or 'crop'")
        if self.num_frames is not None and (type(self.num_frames) is not int or not 1 <= self.num_frames <= 10**6):
            raise ConfigError(f"num_frames is {self.num_frames!r}; use a whole number of frames, or null for fps")
        if type(self.do_sample_frames) is not bool:
            raise ConfigError(f"do_sample_frames is {self.do_sample_frames!r}; use true or false")
        if type(self.fps) not in (int, float) or not 0 < self.fps < np.inf:
            raise ConfigError(f"fps is {self.fps!r}; use a number of frames a second above 0")

    def __call__(
        self,
        images: Picture | list[Picture] | None = None,
        videos: Clip | list[Clip] | None = None,
        fps: float | int | None = None,
        progress: Progress | None = None,
        *,
        num_frames: int | None = None,
        do_sample_frames: bool | None = None,
    ) -> dict[str, list]:
        """Preprocesses images, then videos.

        Returns `pixel_values`, float32 [1, 3, S, S] for each image and [F, 3, S, S] for each video, `timestamps`,
        float64 [1] or [F] seconds, and `video_metadata`.  A single image or video need not be in a list; a list of
        frames or a [F, H, W, 3] array is one video, already sampled at `fps`.  None leaves a setting as the processor
        has it.  Raises MediaError for media that cannot be used.
        """
        reader = self._sampling(fps, num_frames, do_sample_frames)
        pixel_values, metadata = [], []
        for image in _as_list(images, one_has_dimensions=3):
            pixel_values.append(self.image_pixels(image))
            metadata.append(VideoMetadata(1.0, 1, 0.0, np.zeros(1, int), np.zeros(1)))
        for video in _as_list(videos, one_has_dimensions=4):
            pixels, about = reader._read(video, progress)
            pixel_values.append(pixels)
            metadata.append(about)
        timestamps = [about.timestamps for about in metadata]
        return {"pixel_values": pixel_values, "timestamps": timestamps, "video_metadata": metadata}

    def image_pixels(self, image: Picture) -> Float32[np.ndarray, "1 3 S S"]:
        """One still."""
        picture = _picture(image, "the image")
        if self.image_aspect_ratio == "pad":
            picture = pad_to_square(picture, self.image_mean)
        return normalize(resize_and_crop(picture, self.size)[None], self.image_mean, self.image_std)

    def video_pixels(
        self, video: Clip, fps: float | int | None = None, progress: Progress | None = None
    ) -> tuple[Pixels, Float64[np.ndarray, " F"]]:
        """One video and the times of its frames in seconds."""
        pixels, about = self._sampling(fps)._read(video, progress)
        return pixels, about.timestamps

    def rate(self, fps: Any = None) -> float | int:
        """The frames a second to sample of a video that is read as a stream: `fps`, or the processor's own.

        Raises MediaError for an invalid number, and for None if the processor does not sample at a rate.
        """
        if fps is None and (self.num_frames is not None or not self.do_sample_frames):
            own = {"num_frames": self.num_frames, "do_sample_frames": self.do_sample_frames}
            raise MediaError(f"{VIDEO_FILE} has {own}, and videos are read at a rate here; give --fps")
        check_fps(self.fps if fps is None else fps, "the video")
        return self.fps if fps is None else fps

    def _sampling(
        self, fps: float | int | None = None, num_frames: int | None = None, do_sample_frames: bool | None = None
    ) -> "LLaMAVIDLlavaImageProcessor":
        """This processor with the settings that are not None; `fps` overrides the processor's `num_frames`."""
        if fps is not None and num_frames is not None:
            raise MediaError(f"fps is {fps!r} and num_frames {num_frames!r}; give one of them")
        if fps is not None:
            check_fps(fps, "the video")
        given = {"fps": fps, "num_frames": num_frames, "do_sample_frames": do_sample_frames}
        changes = {name: value for name, value in given.items() if value is not None}
        try:
            return dataclasses.replace(self, **({"num_frames": None} if fps is not None else {}) | changes)
        except ConfigError as error:
            raise MediaError(str(error)) from None

    def _read(self, video: Clip, progress: Progress | None) -> tuple[Pixels, VideoMetadata]:
        """One video, and which of its frames were sampled."""
        if isinstance(video, str | Path):
            with fetch(video) as path:
                plan = self._plan(path)
                frames = np.stack([frame for _, frame in iter_frames(path, plan, self._crop, progress, cores())])
            total, seconds = len(plan.timeline.times), plan.timeline.seconds
            rate = plan.timeline.average_fps or total / seconds
            return self._normalize(frames), VideoMetadata(float(rate), total, seconds, plan.frames, plan.times)
        if not _is_sequence(video):
            raise MediaError(f"a video is a {type(video).__name__}; {FORMS}")
        if len(video) == 0:
            raise MediaError("the video has no frames; give one at least")
        kept = np.arange(len(video)) if self.num_frames is None else _evenly(len(video), self.num_frames, "the video")
        frames = [self._crop(np.asarray(_picture(video[place], f"frame {place}"))) for place in kept]
        about = VideoMetadata(float(self.fps), len(video), len(video) / self.fps, kept, kept / self.fps)
        return self._normalize(np.stack(frames)), about

    def _plan(self, path: Path) -> Sampling:
        if self.do_sample_frames and self.num_frames is None:
            return plan_video(path, self.fps)
        timeline = read_timeline(path)
        every = Sampling(timeline, "all", np.arange(len(timeline.times)), timeline.times)
        return every.only(_evenly(len(every), self.num_frames, path).tolist()) if self.do_sample_frames else every

    def stream_video(
        self,
        video: str | Path,
        fps: float | int | None = None,
        chunk: int = 16,
        progress: Progress | None = None,
        adapt: Callable[[Sampling], Sampling] | None = None,
        partial: Partial | None = None,
    ) -> Iterator[tuple[Pixels, Float64[np.ndarray, " F"]]]:
        """`video_pixels` in pieces of up to `chunk` frames, for videos that do not fit in memory.

        Frames are decoded on all cores while the caller works on earlier ones, at most `media.video.AHEAD` bytes ahead.
        `adapt` may change the sampling.  A damaged video raises MediaError; with `partial` it is read as far as
        possible, and `partial` is called with the readable seconds.
        """
        with fetch(video) as path:
            sampling = plan_video(path, self.rate(fps), partial)
            sampling = adapt(sampling) if adapt else sampling
            frames = iter_frames(path, sampling, self._crop, progress, cores(), partial)
            with contextlib.closing(frames):
                while piece := list(itertools.islice(frames, chunk)):
                    times, pixels = zip(*piece, strict=True)
                    yield self._normalize(np.stack(pixels)), np.array(times)

    def video_frames(
        self, video: str | Path, seconds: Sequence[float], partial: Partial | None = None
    ) -> UInt8[np.ndarray, "F S S 3"]:
        """The frames that a video shows at these seconds, ascending, before `normalize`."""
        with fetch(video) as path:
            sampling = shown_at(read_timeline(path, partial), np.array(seconds))
            frames = iter_frames(path, sampling, self._crop, decoders=cores(), partial=partial)
            return np.stack([frame for _, frame in frames])

    def _crop(self, frame: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "S S 3"]:
        return resize_and_crop(frame, self.size)

    def _normalize(self, frames: UInt8[np.ndarray, "F S S 3"]) -> Pixels:
        return normalize(frames, self.image_mean, self.image_std)

    @classmethod
    def of(cls, config: LLaMAVIDLlavaConfig) -> "LLaMAVIDLlavaImageProcessor":
        """The image processor for a model's configuration."""
        vision = config.vision_tower_config
        return cls(vision.image_size, vision.image_mean, vision.image_std, config.image_aspect_ratio)

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> "LLaMAVIDLlavaImageProcessor":
        """Reads both files, of this package or of transformers' CLIP; the one for videos may be absent.

        A mean or deviation that they lack comes from the `config.json` beside them.  Raises ConfigError.
        """
        path = Path(directory) / FILE_NAME
        values = read_settings(path)
        try:
            processor = cls(**fields(values))
            path = path.with_name(VIDEO_FILE)
            values = read_settings(path) if find(path).is_file() else {}
            processor = dataclasses.replace(processor, **{name: values[name] for name in SAMPLING if name in values})
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
        return dataclasses.replace(processor, **stated_pixels(path.parent))

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes both files, so that transformers' CLIPImageProcessor reads the first one too."""
        values = clip_settings(self.size, self.image_mean, self.image_std, self.image_aspect_ratio)
        files = {FILE_NAME: values, VIDEO_FILE: {name: getattr(self, name) for name in SAMPLING}}
        write_files(directory, {name: (json.dumps(file, indent=1) + "\n").encode() for name, file in files.items()})


def _evenly(total: int, count: int, name: object) -> Int[np.ndarray, " F"]:
    """Indices of `count` of `total` frames, evenly spaced as in transformers."""
    if count > total:
        raise MediaError(f"{name} has {total} frames, fewer than the {count} of num_frames; ask for fewer")
    return np.arange(count) * total // count


def _as_list(media: Any, one_has_dimensions: int) -> Sequence:
    """A single image or video becomes a list of one; a flat list of frames is one video (4 dimensions once stacked)."""
    if media is None:
        return []
    if isinstance(media, str | Path | Image.Image) or getattr(media, "ndim", 0) == one_has_dimensions:
        return [media]
    if not _is_sequence(media):
        raise MediaError(
            f"the {'images' if one_has_dimensions == 3 else 'videos'} are a {type(media).__name__}; {FORMS}"
        )
    if one_has_dimensions == 4 and len(media) and (isinstance(media[0], Image.Image) or np.ndim(media[0]) == 3):
        return [media]
    return media


def _is_sequence(media: Any) -> bool:
    return isinstance(media, list | tuple) or getattr(media, "ndim", 0) > 0


def _picture(image: Picture, name: str) -> Image.Image:
    if isinstance(image, str | Path):
        with fetch(image) as path:
            return open_image(path)
    if not isinstance(image, Image.Image):
        pixels = np.asarray(image)
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
            raise MediaError(
                f"{name} is an array of {pixels.dtype} {list(pixels.shape)}; give uint8 [height, width, 3], 0 to 255"
            )
        check_size(pixels.shape[1], pixels.shape[0], name)
        image = Image.fromarray(pixels)
    return to_rgb(image, name)
