"""Record -> Example: ids and labels of the conversation, prompts of the Q-Former, frames of the media file.

    Record ─ conversation, labels ─▶ input_ids [t], labels [t], questions
           └ decode, thin, resize ─▶ frames uint8 [F, H, W, 3], or ready features [F, P, E]

The result depends only on (record, index, seed): the side at which each later turn repeats the image is drawn once per
sample and is the same in every epoch.  Images are padded or cropped, videos cropped.  A feature file with `inputs` is a
movie, and so is a video with subtitles: its text replaces `<image>`, with one placeholder per visual token.

Deviations from the original: nothing is truncated here (`data/rows.py` does it); a prompt belongs to the turn of its
placeholder, even if the first turns have none; a placeholder without media, media without a placeholder and a
placeholder in an answer are errors, where the original silently trains on something else.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32
from PIL import Image

from llamavid_jax.config.parts import LLaMAVIDLlavaVisionConfig
from llamavid_jax.data.labels import TextExample, training_example
from llamavid_jax.data.record import DataError, Record
from llamavid_jax.data.records import decode, film_text, find_media, media_file, media_size, thinned
from llamavid_jax.data.shards import MediaHeader
from llamavid_jax.media import features
from llamavid_jax.media.images import pad_to_square, resize_and_crop
from llamavid_jax.media.source import MediaError, local_file
from llamavid_jax.media.timeline import check_fps, count_samples
from llamavid_jax.media.video import plan_video
from llamavid_jax.shapes import IMAGE_TOKEN
from llamavid_jax.text.conversation import (
    IMAGE,
    ConversationError,
    draw_image_sides,
    movie_inputs,
    prompt,
    speakers_and_turns,
    template_named,
    training_turns,
)
from llamavid_jax.text.subtitles import with_times
from llamavid_jax.text.tokenizer import Tokenizer, encode_with_images

NO_LIMIT = 10**30  # tokens: rows are cut after expansion


@dataclasses.dataclass(frozen=True)
class Example:
    """One sample, ready to be laid out in a row.

    `questions[i]` is read with every frame, and the resulting tokens replace the i-th placeholder; in a movie the
    tokens of the only question replace all placeholders in order.  `frames` are uint8 [F, H, W, 3], not normalised, or
    features [F, P, E] without CLS; None for text only.
    """

    id: str
    input_ids: Int32[np.ndarray, " t"]
    labels: Int32[np.ndarray, " t"]
    questions: list[str]
    frames: np.ndarray | None


class SampleSize(NamedTuple):
    """The room that a sample takes in a row; of its `tokens`, `questions * frames * tokens_per_frame` are visual."""

    kind: str  # "pixels", "features" or "text"
    frames: int
    questions: int
    tokens: int  # after expansion
    marks: int = 0  # of them, those of the frames' times, which go with their frames


class ExampleReader:
    """Reads the samples of one data set; picklable.  Methods raise InputError for a sample that cannot be used."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: str,
        image_size: int,
        image_aspect_ratio: str,
        tokens_per_frame: int,
        fps: float | int,
        seed: int,
        image_mean: Sequence[float] = LLaMAVIDLlavaVisionConfig.image_mean,
        start_end: bool = False,
    ):
        """`image_mean` is the padding colour; `start_end` puts a token before and after every visual."""
        check_fps(fps, "the data")
        if image_aspect_ratio not in ("pad", "crop"):
            raise DataError(f"image_aspect_ratio is {image_aspect_ratio!r}; use 'pad' or 'crop'")
        if seed < 0:
            raise DataError(f"the seed of the data is {seed}; use 0 or more")
        self.tokenizer, self.template, self.tokens_per_frame = tokenizer, template, tokens_per_frame
        self.image_size, self.image_aspect_ratio, self.fps, self.seed = image_size, image_aspect_ratio, fps, seed
        self._template, self.image_mean, self.start_end = template_named(template), image_mean, start_end

    def text(self, record: Record, index: int) -> TextExample:
        """Ids, labels and prompts, with all frames; `index` is the record's index in the data set."""
        return self._text(record, index, self._header(record) if record.is_film else MediaHeader(0))

    def size(self, record: Record, index: int, header: MediaHeader | None = None) -> SampleSize:
        """The size of `read(record, index, max_frames)` with enough `max_frames`, without decoding the media file.

        With `header`, as stored in shards, the media file is not even opened.
        """
        header, marks = header or self._header(record), 0
        frames = header.frames
        if header.average_fps or header.seconds:
            frames = count_samples(frames, header.average_fps, header.seconds, self.fps, record.media)
        if self._template.masking == "rounds" and header.inputs is None:
            # Labels cost three times as much as the ids, and a data set may have a million samples to plan.
            check_places(record)
            has_image = record.kind != "text"
            turns, _ = training_turns(
                self._template, record.conversations, has_image, self._sides(record, index), start_end=self.start_end
            )
            text = prompt(self._template, turns, open_answer=False)
            ids = np.array(encode_with_images(self.tokenizer, text) if has_image else self.tokenizer.encode(text))
            questions = int((ids == IMAGE_TOKEN).sum())
        else:
            example = self._text(record, index, header)
            ids, questions = example.input_ids, len(example.prompts)
            if record.times:
                marks = len(ids) - len(self._text(dataclasses.replace(record, times=None), index, header).input_ids)
        kind = {"text": "text", "features": "features"}.get(record.kind, "pixels")
        return SampleSize(kind, frames, questions, self.expanded_length(ids, questions, frames), marks)

    def expanded_length(self, input_ids: np.ndarray, questions: int, frames: int) -> int:
        """Tokens of a row once its placeholders are replaced by the visual tokens of every question and frame."""
        return len(input_ids) - int((input_ids == IMAGE_TOKEN).sum()) + questions * frames * self.tokens_per_frame

    def read(self, record: Record, index: int, max_frames: int, max_tokens: int = NO_LIMIT) -> Example:
        """The whole sample; of more than `max_frames` frames, evenly spaced ones stay, from the first to the last.

        A film keeps fewer if its text then fits in `max_tokens`: how long it is without a frame, only tokenising tells.
        """
        if record.kind == "text":
            text, frames = self.text(record, index), None
        elif max_frames < 1:
            raise DataError(f"record {record.id!r} has frames, but there is room for {max_frames}; use a larger bucket")
        else:
            with media_file(record) as path:
                header = self._film_header(record, path)
                text, max_frames = self._fitting(record, index, header, max_frames, max_tokens)
                decoded = decode(path, record.kind, self.fps, max_frames)
                frames = np.stack([self._transform(frame, record.kind) for frame in decoded])
        return Example(record.id, text.input_ids, text.labels, text.prompts, frames)

    def _fitting(
        self, record: Record, index: int, header: MediaHeader, max_frames: int, max_tokens: int
    ) -> tuple[TextExample, int]:
        """The text of at most `max_frames` frames, and how many; all of them if it is too long even with one."""
        whole = text = self._text(record, index, header, max_frames)
        frames = min(header.frames, max_frames) if header.inputs is not None else 1
        while (over := len(text.input_ids) - max_tokens) > 0 and frames > 1:
            frames = max(frames - math.ceil(over / self.tokens_per_frame), 1)
            text = self._text(record, index, header, frames)
        return (whole, max_frames) if over > 0 or text is whole else (text, frames)

    def _text(self, record: Record, index: int, header: MediaHeader, max_frames: int | None = None) -> TextExample:
        check_places(record)
        movie = None
        if header.inputs is not None:
            kept = thinned(header.frames, max_frames or header.frames)
            film = thinned_inputs(record.media, header, kept)
            film = with_times(film, [header.times[place] for place in kept] if record.times else (), record.times)
            movie = movie_inputs(film, self.tokens_per_frame, training=True)
        text = training_example(
            self.template,
            record.conversations,
            self.tokenizer,
            has_image=record.kind != "text",
            image_sides=self._sides(record, index),
            movie=movie,
            max_length=NO_LIMIT,
            start_end=self.start_end,
        )
        placeholders = int((text.input_ids == IMAGE_TOKEN).sum())
        if movie is None:  # a guided template has prompts of all turns, and placeholders in the last of them
            return dataclasses.replace(text, prompts=text.prompts[len(text.prompts) - placeholders :])
        if placeholders != len(kept) * self.tokens_per_frame:
            raise ConversationError(
                f"a movie's {IMAGE} must stand in one turn, once, but its {len(kept) * self.tokens_per_frame} visual "
                f"tokens would take {placeholders} places in template {self.template!r}"
            )
        return text

    def _header(self, record: Record) -> MediaHeader:
        """The header of the media file, with the frames that are sampled at `fps`."""
        if record.kind == "image" and record.data is None:  # its content does not matter here, but it must exist
            local_file(find_media(record))
        if not record.is_film:
            return MediaHeader(media_size(record, self.fps))
        with media_file(record) as path:
            return self._film_header(record, path)

    def _film_header(self, record: Record, path: Path) -> MediaHeader:
        """The frames, their times and the text of a film; an empty header for other records."""
        if not record.is_film:
            return MediaHeader(0)
        if record.kind == "features":
            header = file_header(path)
            if record.times is None:
                return header
            if (said := features.describe(path)) is None:
                raise MediaError(f"{record.media} does not say when its frames are; make it with llamavid-features")
            times = said["timestamps"]
            return header._replace(inputs=header.inputs or film_text(record, times), times=times)
        times = plan_video(path, self.fps).times.tolist()
        return MediaHeader(len(times), inputs=film_text(record, times), times=times)

    def _sides(self, record: Record, index: int) -> list[int]:
        if record.kind == "text" or not self._template.image_every_turn:
            return []
        return draw_image_sides((self.seed << 32) + int(index), len(record.conversations))

    def _transform(self, frame: np.ndarray, kind: str) -> np.ndarray:
        if kind == "features":
            return frame
        if kind == "image" and self.image_aspect_ratio == "pad":
            return resize_and_crop(pad_to_square(Image.fromarray(frame), self.image_mean), self.image_size)
        return resize_and_crop(frame, self.image_size)


def check_places(record: Record) -> None:
    """Raises ConversationError for malformed turns, and if the placeholders do not match the media."""
    turns = zip(*speakers_and_turns(record.conversations), strict=True)
    speakers = [speaker for speaker, words in turns if IMAGE in words]
    if record.kind == "text" and speakers:
        raise ConversationError(
            f"a turn holds {IMAGE}, but the record names no image, video or features; add the key or delete {IMAGE}"
        )
    if record.kind != "text" and not speakers:
        raise ConversationError(f"the record has media, but no turn holds {IMAGE}; put it in the first question")
    if "gpt" in speakers:
        raise ConversationError(f"an answer holds {IMAGE}; put it in a question")


def file_header(path: Path) -> MediaHeader:
    """The header of a feature file."""
    header = features.read_header(path)
    return MediaHeader(header.frames, inputs=header.inputs)


def thinned_inputs(name: str | None, header: MediaHeader, kept: Sequence[int]) -> str:
    """The text of the movie `name` with the placeholders of the kept frames and all subtitles."""
    before, *parts = (header.inputs or "").split(IMAGE)
    if len(parts) != header.frames:
        raise MediaError(
            f"{name}: `inputs` has {len(parts)} {IMAGE} for {header.frames} frames; write one for each frame"
        )
    places = set(kept)
    return before + "".join(IMAGE + part if number in places else part for number, part in enumerate(parts))
