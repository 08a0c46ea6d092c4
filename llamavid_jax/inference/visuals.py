"""Reads the images and videos of a session frame by frame, from files or from the cache.

video file ── in the cache? ─▶ its features there
    │   └──── decode ─▶ pixels ─▶ with a cache: features, stored on the way
feature file ─▶ its features
"""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llamavid_jax.errors import InputError
from llamavid_jax.inference.feature_cache import DamagedEntryError, FeatureCache
from llamavid_jax.inference.film import Notice, Reading
from llamavid_jax.inference.model import LLaMAVIDLlavaForConditionalGeneration
from llamavid_jax.inference.sources import Shown, Stored, description, read_stored, stored, version, video_key
from llamavid_jax.media.feature_file import Description
from llamavid_jax.media.features import is_features
from llamavid_jax.media.image_processor import LLaMAVIDLlavaImageProcessor
from llamavid_jax.media.source import fetch, is_url
from llamavid_jax.media.timeline import Sampling, rate_that_fits
from llamavid_jax.media.video import plan_video
from llamavid_jax.shapes import IMAGE_TOKEN
from llamavid_jax.text.conversation import Template, long_video_text, prompt
from llamavid_jax.text.subtitles import TIMES, Cue, clock, interleave, with_times
from llamavid_jax.text.tokenizer import encode_with_images


class Visuals:
    """Reads images and videos with `each`, which sets the attributes below.

    frames          the number of frames in total
    sampled, times  of each video: which frames were sampled, and their seconds
    movie           a single video's text, its frames' placeholders with subtitles and times between; else None
    """

    def __init__(
        self,
        model: LLaMAVIDLlavaForConditionalGeneration,
        image_processor: LLaMAVIDLlavaImageProcessor,
        images: Sequence[Any],
        videos: Sequence[Any],
        *,
        subtitles: Sequence[Cue] | None,
        times: str | None,
        fps: float | int | None,
        reading: Reading,
        template: Template,
        like_original: bool,
        cache: FeatureCache | None,
        progress: Callable[[Any, int, int | None], None],
        say: Notice,
    ):
        """Arguments as in `Session`."""
        if subtitles is not None and (len(videos) != 1 or images):
            raise InputError(f"subtitles go with one video alone, not with {len(videos)} and {len(images)} images")
        if times not in (None, *TIMES):
            raise InputError(f"times is {times!r}; use one of {', '.join(TIMES)}, or None")
        if times and (len(videos) > 1 or (videos and images)):
            raise InputError(f"times go with one video alone, not with {len(videos)} and {len(images)} images")
        self.model, self.image_processor, self.template = model, image_processor, template
        self.images, self.videos, self.subtitles, self.times_of = images, videos, subtitles, times
        self.asked_fps, self.fps = fps, image_processor.rate(fps) if videos else 1.0
        self.reading, self.like_original, self.cache = reading, like_original, cache
        self.progress, self.say = progress, say
        self.frames = 0
        self.sampled: dict[int, Sampling] = {}  # by the number of the video
        self.times: dict[int, list[float]] = {}  # seconds
        self.movie: str | None = None

    def sampling(self) -> list[dict[str, Any]]:
        """Of each video that was read: its name, the rule that chose its frames, how many, and their seconds."""
        return [
            {"video": str(self.videos[number]), "rule": plan.rule, "frames": len(times), "times": times}
            for number, plan in self.sampled.items()
            if (times := [round(time, 3) for time in self.times[number]])
        ]

    def each_frame(self) -> Iterator[dict[str, Any]]:
        """All frames in order, each with its image or video and its second there."""
        for image in self.images:
            yield {"image": str(image), "second": 0.0}
        for number, video in enumerate(self.videos):
            for second in self.times[number]:
                yield {"video": str(video), "second": second}

    def each(self, new_tokens: int, use: Callable[[Shown], Any]) -> list[Any]:
        """The results of `use` for every image and video; a video's frames are decoded as `use` consumes them."""
        self.frames = 0
        made = [use(Shown(self._counted(self.image_processor.image_pixels(image)))) for image in self.images]
        for number, video in enumerate(self.videos):
            before = self.frames
            for source in self._sources(number, video, new_tokens):
                self.frames = before
                with contextlib.suppress(DamagedEntryError):  # then the next source is tried
                    made.append(use(source))
                    break
        return made

    def _sources(self, number: int, video: Any, new_tokens: int) -> Iterator[Shown]:
        """Yields a video's frames from each source until one succeeds: first the cache, whose entry may be damaged."""
        if is_features(video):
            with fetch(video) as path:
                known = read_stored(path, self.asked_fps, self.model, self.image_processor)
                if known.inputs is not None and len(self.videos) + len(self.images) > 1:
                    raise InputError(f"{video} is a film with what is said, and goes alone; give no other visual")
                yield Shown(self._stored_frames(number, video, known, known.frames(), new_tokens), known.has_cls)
            return
        # the readable part of a damaged file is not cached: it must not answer a question about the whole
        if self.cache is None or self.reading.partial or not isinstance(video, str | Path):
            yield Shown(self._counted(self._video_frames(number, video, new_tokens)))
            return
        has_cls = self.model.config.vision_tower_config.has_cls
        with fetch(video) as path:
            most = self._room(number, plan_video(path, self.fps), new_tokens) if self.reading.fit else None
            how = {"fast": self.reading.fast, "most": most}
            before, key = version(path), video_key(path, self.fps, self.model, self.image_processor, **how)
            if found := self.cache.find(key):
                if self.reading != Reading():  # report again what is given up
                    plan = plan_video(path, self.fps)
                    self.reading.plan(plan, self.fps, self._room(number, plan, new_tokens), video, self.say)
                known, frames = stored(self.cache.path(key), found), self.cache.frames(key)
                yield Shown(self._stored_frames(number, video, known, frames, new_tokens), has_cls)

            def described() -> Description | None:
                same = version(path) == before  # else it was written to meanwhile, and `key` is another file's
                return description(video, key, self.sampled[number], self.model) if same else None

            pixels = self._counted(self._video_frames(number, path if is_url(video) else video, new_tokens))
            frames = itertools.chain.from_iterable(self.model.feature_chunks(pixels))
            yield Shown(self.cache.keep(key, frames, lambda: len(self.sampled[number]), described), has_cls)

    def _stored_frames(
        self, number: int, video: Any, known: Stored, frames: Iterator[np.ndarray], new_tokens: int
    ) -> Iterator[np.ndarray]:
        """`_video_frames` for features from a file."""
        self.sampled[number], times = known.sampling, known.sampling.times.tolist()
        self.times[number] = times
        self._check_length(video, new_tokens)
        for done, frame in enumerate(self._counted(frames), 1):
            yield frame
            self.progress(video, done, len(times))
        self.movie = self._film(times, known.inputs)

    def _counted(self, frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        for frame in frames:
            self.frames += 1
            yield frame

    def _video_frames(self, number: int, video: Any, new_tokens: int) -> Iterator[np.ndarray]:
        expected, readable = None, math.inf  # frames, seconds
        times = self.times[number] = []
        tell = self.reading.damage(video, self.say)

        def on_read(sampling: Sampling, done: int) -> None:
            nonlocal expected
            if done == 1:
                self.sampled[number], expected = sampling, len(sampling)
                self._check_length(video, new_tokens)

        def on_damage(seconds: float) -> None:
            nonlocal readable
            readable = seconds
            tell(seconds)

        if isinstance(video, str | Path):
            pieces = self.image_processor.stream_video(
                video,
                self.fps,
                progress=on_read,
                adapt=lambda plan: self.reading.plan(
                    plan, self.fps, self._room(number, plan, new_tokens), video, self.say
                ),
                partial=tell and on_damage,
            )
        else:
            pieces = [self.image_processor.video_pixels(video, self.fps)]
        for frames, seconds in pieces:
            for frame, time_ in zip(frames, seconds.tolist(), strict=True):
                yield frame
                times.append(time_)
                self.progress(video, len(times), expected)
        self.movie = self._film(times, until=readable)

    def _film(self, times: Sequence[float], said: str | None = None, until: float = math.inf) -> str | None:
        """The single video's text, read up to `until` seconds; None if nothing stands between its frames."""
        if self.subtitles is not None:
            said = interleave(times, [cue for cue in self.subtitles if cue.end <= until], self.like_original)
        return with_times(said, times, self.times_of)

    def _room(self, number: int, plan: Sampling, new_tokens: int) -> int:
        """Frames of the video that fit beside everything else, when a tenth is left for the question."""
        config, words = self.model.config, ""
        if self.subtitles is not None or self.times_of is not None:  # as they stand between frames
            until = plan.timeline.seconds if self.reading.partial else math.inf
            cues = [cue for cue in self.subtitles or () if cue.end <= until]
            movie = interleave([cue.end for cue in cues], cues, self.like_original)
            words = long_video_text(movie, words, config.tokens_per_frame, config.mm_use_im_start_end)
        ids = encode_with_images(self.model.tokenizer, prompt(self.template, [words]))
        taken = new_tokens + len(ids) - ids.count(IMAGE_TOKEN)
        earlier = sum(len(before) for other, before in self.sampled.items() if other < number)
        room = 0.9 * (config.text_config.max_length - taken) - (len(self.images) + earlier) * config.tokens_per_frame
        return int(self._frames_in(room, plan) / (len(self.videos) - number))

    def _frames_in(self, room: float | int, plan: Sampling) -> float:
        """The number of the video's frames that fit in `room` tokens, with their times in the text."""
        frame, seconds = self.model.config.tokens_per_frame, int(plan.timeline.seconds)
        if self.times_of is None:
            return room / frame
        time = len(self.model.tokenizer.encode(clock(seconds), add_bos=False))  # the last one is the longest
        most = len(plan.timeline.times) if self.times_of == "frame" else seconds // 60 + 1
        return max(room / (frame + time), (room - most * time) / frame)

    def _check_length(self, video: Any, new_tokens: int) -> None:
        """Raises InputError if the videos are too long, at the first frame of the one too many, not after its last."""
        width, plans = self.model.config.tokens_per_frame, list(self.sampled.values())
        frames, timelines = sum(map(len, plans)), [plan.timeline for plan in plans]
        room = self._frames_in(self.model.config.text_config.max_length - new_tokens, plans[-1])
        if frames <= room:
            return
        fps, total = rate_that_fits(timelines, room), sum(timeline.seconds for timeline in timelines)
        remedy = f"--fps {fps:.2g}" if fps >= 0.001 else "a smaller --max-new-tokens"
        raise InputError(
            f"with {video} the videos last {total:.0f} s, at {self.fps:g} frames a second {frames * width} visual "
            f"tokens; this model has room for {max(round(room * width), 0)}: use {remedy}, --fit or a long-video "
            "checkpoint"
        )
