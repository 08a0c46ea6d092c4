"""Answers questions: items → rows.  Each image or video is decoded and encoded only once for all its questions.

    items of one video ─ frames, 1 a second ─▶ visual tokens of every question ─┐
    ... of the next, read meanwhile ────────▶ ...                               ├─ full buckets ─▶ generate ─▶ rows
                                                                                ┘
If an image cannot be read, or a prompt does not fit the model, only those questions fail: their rows are written as
broken.
"""

import dataclasses
import itertools
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from llamavid_jax.errors import InputError
from llamavid_jax.evaluation.folder import read_json
from llamavid_jax.evaluation.identity import media_name
from llamavid_jax.evaluation.items import Item, Row
from llamavid_jax.inference.film_text import film_subtitles
from llamavid_jax.inference.model import LLaMAVIDLlavaForConditionalGeneration
from llamavid_jax.inference.request import RequestError
from llamavid_jax.media.image_processor import LLaMAVIDLlavaImageProcessor
from llamavid_jax.shapes import IMAGE_TOKEN, bucket
from llamavid_jax.text.conversation import (
    IMAGE,
    check_text,
    long_video_text,
    marked,
    prompt,
    question_turn,
    template_named,
)
from llamavid_jax.text.subtitles import Cue, interleave
from llamavid_jax.text.tokenizer import encode_with_images

SAMPLING = "temperature", "top_p", "top_k", "max_new_tokens"
PIECES_AHEAD = 16  # pieces of the next video that are read ahead: 256 frames, 154 MB at 224 px

Pieces = Iterator[tuple[np.ndarray, np.ndarray]]  # some frames' pixels [f, 3, H, W], and their seconds [f]


@dataclasses.dataclass(frozen=True)
class Ready:
    """A question that is ready for the language model; `tokens` are its visual tokens, `[n, D]` each, perhaps none."""

    item: Item
    index: int
    ids: list[int]
    tokens: list[np.ndarray]
    frames: int
    seconds: float  # spent on reading and encoding frames, divided by the number of questions about the video

    @property
    def length(self) -> int:
        return len(self.ids) - self.ids.count(IMAGE_TOKEN) + sum(map(len, self.tokens))


def by_media(items: Sequence[Item]) -> list[list[int]]:
    """Indices of the items about the same image or video (and subtitles); groups in order of first appearance."""
    groups: dict[Any, list[int]] = defaultdict(list)
    for place, item in enumerate(items):
        key = (place,) if item.media is None else (item.media, item.subtitles, item.subtitles_start)
        groups[key].append(place)
    return list(groups.values())


def clean(text: str) -> str:
    """Cleans an answer as the original does."""
    return text.strip().removesuffix("</s>").strip()


def llm_prompt(text: str, template: str, visuals: int, start_end: bool = False) -> str:
    """The whole text for the language model."""
    turn = question_turn(visuals, text).replace(IMAGE, marked(IMAGE, start_end)) if visuals else text
    return prompt(template_named(template), [turn])


class Asker:
    """Asks a model.  `write` receives rows in small batches, not in the items' order."""

    def __init__(
        self,
        model: LLaMAVIDLlavaForConditionalGeneration,
        images: LLaMAVIDLlavaImageProcessor,
        settings: Mapping[str, Any],
        batch: int,
        write: Callable[[list[Row]], None],
    ):
        if model.tokenizer is None or model.qformer_tokenizer is None:
            raise InputError("the checkpoint holds no tokenizers; convert it again with --bert-tokenizer FOLDER")
        self.model, self.settings, self.write = model, settings, write
        crops = settings["image_aspect_ratio"] == "crop"
        self.images = dataclasses.replace(images, image_aspect_ratio="crop") if crops else images
        self.is_sampled = settings["temperature"] > 0
        self.batch = 1 if self.is_sampled else batch
        self.pending: dict[int, list[Ready]] = defaultdict(list)  # by length bucket

    def ask(self, groups: Sequence[Sequence[tuple[int, Item]]]) -> None:
        """Asks (index in the set, item) pairs, grouped by image or video; the next group's media is read meanwhile."""
        with ThreadPoolExecutor(1) as pool:
            ahead = None
            for group, following in itertools.zip_longest(groups, groups[1:]):
                begun = ahead or pool.submit(self._begin, group[0][1])
                ahead = following and pool.submit(self._begin, following[0][1])
                self._ask(group, begun.result)
        self._finish()

    def _ask(self, items: Sequence[tuple[int, Item]], begun: Callable[[], Pieces]) -> None:
        items = [pair for pair in items if self._is_text(*pair)]
        if not items:
            return
        started = time.perf_counter()
        try:
            tokens, texts, frames = self._encode([item for _, item in items], begun())
        except InputError as error:
            self.write([broken(item, index, error) for index, item in items])
            return
        seconds = (time.perf_counter() - started) / len(items)
        for (index, item), own, text in zip(items, tokens, texts, strict=True):
            try:
                ids = encode_with_images(self.model.tokenizer, text)
            except InputError as error:
                self.write([broken(item, index, error)])
                continue
            ready = Ready(item, index, ids, own, frames, seconds)
            waiting = self.pending[bucket(ready.length)]
            waiting.append(ready)
            if len(waiting) == self.batch:
                self._answer(waiting)
                waiting.clear()

    def _is_text(self, index: int, item: Item) -> bool:
        """Whether a question's text can be asked at all; if not, writes it as broken."""
        try:
            check_text(item.text, f"the question of {item.id}")
            check_text(item.question, f"the question of {item.id}")
            if IMAGE in item.text:
                raise InputError(f"the question of {item.id} holds {IMAGE}, which stands for a picture")
        except InputError as error:
            self.write([broken(item, index, error)])
            return False
        return True

    def _finish(self) -> None:
        """Asks the questions in buckets that did not fill up."""
        for size in sorted(self.pending):
            waiting = self.pending.pop(size)
            if waiting:
                self._answer(waiting)

    # ---- frames → visual tokens

    def _encode(self, items: Sequence[Item], pieces: Pieces) -> tuple[list[list[np.ndarray]], list[str], int]:
        """The visual tokens and prompt of every item, and the number of frames."""
        first, config = items[0], self.model.config
        template, start_end = self.settings["template"], config.mm_use_im_start_end
        if first.media is None:
            return [[]] * len(items), [llm_prompt(item.text, template, 0) for item in items], 0
        times: list[float] = []
        frames = _frames(pieces, times)
        tokens = self.model.visual_tokens(frames, [item.question for item in items])
        if first.subtitles is None:
            texts = [llm_prompt(item.text, template, 1, start_end) for item in items]
        else:
            movie = interleave(times, cues_of(first))
            turns = [long_video_text(movie, item.text, config.tokens_per_frame, start_end) for item in items]
            texts = [prompt(template_named(template), [turn]) for turn in turns]
        return [[own] for own in tokens], texts, len(times)

    def _begin(self, item: Item) -> Pieces:
        """The item's frames; the first PIECES_AHEAD pieces are read already."""
        if item.media is None:
            return iter(())
        if not item.is_video:
            return iter([(self.images.image_pixels(item.media), np.zeros(1))])
        pieces = self.images.stream_video(item.media, self.settings["fps"], progress=self._check_length)
        return itertools.chain(list(itertools.islice(pieces, PIECES_AHEAD)), pieces)

    def _check_length(self, sampling: Any, done: int) -> None:
        """Raises RequestError at the first frame of a film that does not fit the model."""
        room = self.model.config.text_config.max_length
        if done == 1 and len(sampling) * self.model.config.tokens_per_frame > room:
            raise RequestError(f"{len(sampling)} frames do not fit the {room} positions of this model")

    # ---- prompts → answers

    def _answer(self, rows: Sequence[Ready]) -> None:
        """Answers rows in one batch; if that fails, each alone."""
        started = time.perf_counter()
        sampling = {name: self.settings[name] for name in SAMPLING}
        seed = zlib.crc32(rows[0].item.id.encode()) if self.is_sampled else 0
        try:
            output = self.model.generate(
                [row.ids for row in rows], visual_tokens=[row.tokens for row in rows], seed=seed, **sampling
            )
        except InputError as error:
            if len(rows) == 1:
                self.write([broken(rows[0].item, rows[0].index, error)])
            else:
                for row in rows:
                    self._answer([row])
            return
        seconds = (time.perf_counter() - started) / len(rows)
        self.write(
            [
                as_row(row.item, row.index, clean(text), frames=row.frames, seconds=round(row.seconds + seconds, 4))
                for row, text in zip(rows, output.texts, strict=True)
            ]
        )


def _frames(pieces: Pieces, times: list[float]) -> Iterator[np.ndarray]:
    for pixels, seconds in pieces:
        times += seconds.tolist()
        yield from pixels


def as_row(item: Item, index: int, text: str, **more: Any) -> Row:
    named = {"id": item.id, "index": index, "prompt": item.prompt, "text": text}
    return {**named, **more, "media": media_name(item), "reference": item.reference}


def broken(item: Item, index: int, error: InputError) -> Row:
    """The row of a question that could not be asked: it has the error, and counts as wrong."""
    return as_row(item, index, "", frames=0, seconds=0.0, error=" ".join(str(error).split()))


def cues_of(item: Item) -> list[Cue]:
    """Subtitles from a .srt or .vtt file or LongVideoBench's JSON, in seconds of the video."""
    file = Path(item.subtitles)
    if file.suffix != ".json":
        return film_subtitles(str(file), item.media)
    try:
        cues = [_cue(one, item.subtitles_start) for one in read_json(file)]
        return [cue for begin, cue in cues if begin < item.duration and cue.end > 0]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{file} is not in the form of LongVideoBench's subtitles ({error!r})") from None


def _cue(one: Mapping[str, Any], begin: float) -> tuple[float, Cue]:
    """The cue and its start in seconds of the video, which starts at `begin` in the subtitles' time."""
    if "timestamp" in one:
        start, end = one["timestamp"]
        end, text = (end if isinstance(end, int | float) else start), one["text"]
    else:
        (start, end), text = map(_seconds, (one["start"], one["end"])), one["line"]
    return float(start) - begin, Cue(float(end) - begin, text.replace(IMAGE, " ").strip())


def _seconds(clock: str) -> float:
    hours, minutes, seconds = clock.split(":")
    return 3600 * int(hours) + 60 * int(minutes) + float(seconds)
