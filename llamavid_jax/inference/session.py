"""A conversation about some images and videos: `Session(model, image_processor, videos=["walk.mp4"]).ask("Who?")`.

    frames ─ once ─▶ features on the host ─ each question ─▶ its own visual tokens
    system │ visual tokens 1, question 1 │ answer 1 │ visual tokens 2, question 2 │ ...

Each turn is asked with visual tokens of its own, as in training and as the processor's `chat` lays messages out.  A
prompt so begins as the one before, whose keys and values are kept (`prompt_cache.py`): only the last answer and the
new question are run.

A conversation that becomes too long loses what is oldest, and `notice` is told so once.  Beyond the positions that the
language model was trained for before they were stretched (4,096 for Vicuna) earlier turns keep their words but not
their visual tokens: every turn of an hour of video would bring 7,200 more.  Beyond the model's own positions the older
half of the turns is left out.
"""

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llamavid_jax.errors import InputError
from llamavid_jax.inference.feature_cache import DamagedEntryError, FeatureCache
from llamavid_jax.inference.film import Reading
from llamavid_jax.inference.model import LLaMAVIDLlavaForConditionalGeneration
from llamavid_jax.inference.prompt_cache import PromptCache
from llamavid_jax.inference.request import Settings
from llamavid_jax.inference.sources import Shown, Stored, description, gathered, read_stored, stored, version, video_key
from llamavid_jax.media.feature_file import Description
from llamavid_jax.media.features import is_features
from llamavid_jax.media.image_processor import LLaMAVIDLlavaImageProcessor
from llamavid_jax.media.source import fetch, is_url
from llamavid_jax.media.timeline import Sampling
from llamavid_jax.shapes import IMAGE_TOKEN
from llamavid_jax.text.conversation import (
    IMAGE,
    check_text,
    long_video_text,
    marked,
    prompt,
    question_turn,
    template_named,
)
from llamavid_jax.text.subtitles import TIMES, Cue, interleave, with_times
from llamavid_jax.text.tokenizer import encode_with_images


@dataclasses.dataclass(frozen=True)
class Answer:
    """What one question gave.  Of the `prompt_tokens`, `visual_tokens` are frames, `cached_tokens` known before.

    `evidence`, where it was asked for, has every frame in order: its image or video, its second in it, and its part of
    the answer's attention to all frames (docs/long-video.md).
    """

    text: str
    frames: int
    visual_tokens: int
    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    seconds: dict[str, float]  # "encode": frames and visual tokens; "generate": the answer
    sampling: list[dict[str, Any]]  # of each video: its name, the rule that chose its frames, how many, their seconds
    evidence: list[dict[str, Any]] | None = None


@dataclasses.dataclass(frozen=True)
class Turn:
    """A question with its visual tokens, `[n, D]` for each visual or none where they are left out, and its answer."""

    question: str
    tokens: list[np.ndarray]
    answer: str = ""


class Session:
    """One conversation.

    `images` and `videos` are paths, URLs or pixels; `subtitles` those of the one video, and `times` put the time of
    each "frame" or each "minute" of it into the text, for a model that was trained so.  `fps` holds in place of the
    image processor's.  Without `follow_ups` every
    question stands alone and frames are forgotten as they are encoded; with them their features stay in host memory
    (0.7 MB a frame for the 7B models).  `like_original` leaves the visual tokens out of all earlier turns and places
    subtitles as the original's command lines do.  A video may be a file of its features (`media/features.py`); `cache`
    keeps those of all others for the next session.  `progress(video, frames done, frames in all or None)` and
    `notice(text)` are told what happens.
    """

    def __init__(
        self,
        model: LLaMAVIDLlavaForConditionalGeneration,
        image_processor: LLaMAVIDLlavaImageProcessor,
        *,
        images: Sequence[Any] = (),
        videos: Sequence[Any] = (),
        subtitles: Sequence[Cue] | None = None,
        times: str | None = None,
        fps: float | int | None = None,
        reading: Reading = Reading(),  # noqa: B008
        template: str = "vicuna_v1",
        follow_ups: bool = True,
        like_original: bool = False,
        cache: FeatureCache | None = None,
        progress: Callable[[Any, int, int | None], None] = lambda *_: None,
        notice: Callable[[str], None] = lambda _: None,
    ):
        if model.tokenizer is None:
            raise InputError("the checkpoint holds no tokenizer; convert again with --tokenizer FOLDER")
        if subtitles is not None and (len(videos) != 1 or images):
            raise InputError(f"subtitles go with one video alone, not with {len(videos)} and {len(images)} images")
        if times not in (None, *TIMES):
            raise InputError(f"times is {times!r}; use one of {', '.join(TIMES)}, or None")
        if times and (len(videos) > 1 or (videos and images)):
            raise InputError(f"times go with one video alone, not with {len(videos)} and {len(images)} images")
        if times and reading.fit:
            raise InputError("fit does not know the room that times take; give a lower fps, and no fit")
        self.model, self.image_processor, self.template = model, image_processor, template_named(template)
        self.images, self.videos, self.subtitles = images, videos, subtitles
        self.fps = image_processor.rate(fps) if videos else 1.0
        self.reading, self.cache = reading, cache
        self.follow_ups, self.like_original, self.progress, self.notice = follow_ups, like_original, progress, notice
        self.turns: list[Turn] = []
        self.frames = 0  # encoded
        self.features: list[Shown] | None = None  # of each visual, once they are encoded
        self._movie: str | None = None  # the frames' placeholders with subtitles and times between them
        self._times_of = times
        self.times: dict[int, list[float]] = {}  # seconds of each video's frames
        self.sampled: dict[int, Sampling] = {}  # of each video that has begun: which frames, and by which rule
        self._said: set[str] = set()
        self._cache = PromptCache()

    def ask(
        self,
        question: str,
        streamer: Callable[[str], None] | None = None,
        evidence: bool = False,
        **settings: Any,
    ) -> Answer:
        """The answer to a question, after all that was asked before.

        `streamer` is given the answer as it comes; `settings` are those of `generate`, such as `max_new_tokens=128`.
        Raises InputErrors; the conversation is then what it was.
        """
        chosen, started = Settings(**settings), time.perf_counter()
        turn = self._turn(question, chosen.max_new_tokens)
        earlier = self._that_fit(turn, chosen.max_new_tokens) if self.follow_ups else []
        ids, tokens = self._lay_out([*earlier, turn])
        encoded = time.perf_counter() - started
        out = self.model.generate(
            [ids],
            visual_tokens=[tokens],
            **dataclasses.asdict(chosen),
            streamer=streamer and (lambda _, text: streamer(text)),
            cache=self._cache if self.follow_ups else None,
            evidence=evidence,
        )
        text = out.texts[0].strip()
        self.turns = [*earlier, dataclasses.replace(turn, answer=text.replace(IMAGE, ""))]
        seconds = {"encode": encoded + out.seconds["encode"], "generate": out.seconds["generate"]}
        counts = out.visual_tokens[0], out.prompt_tokens[0], out.cached_tokens, len(out.token_ids[0])
        sampling = [
            {"video": str(self.videos[number]), "rule": plan.rule, "frames": len(times), "times": times}
            for number, plan in self.sampled.items()
            if (times := [round(time_, 3) for time_ in self.times[number]])
        ]
        looked_at = self._evidence(out.evidence[0]) if evidence else None
        return Answer(text, self.frames, *counts, seconds, sampling, looked_at)

    def inputs(self, question: str) -> tuple[list[int], list[np.ndarray]]:
        """Ids and visual tokens of the question as the first of a conversation: a row of a batch for `generate`."""
        return self._lay_out([self._turn(question, 1)])

    def encode(self, new_tokens: int = 1) -> int:
        """Decodes and encodes all frames, which the first question does otherwise; returns their number."""
        if self.features is None:
            self.frames = 0
            self.features = self._each(new_tokens, lambda visual: gathered(visual, self.model))
        return self.frames

    def _evidence(self, weights: np.ndarray) -> list[dict[str, Any]]:
        """Every frame with the attention `weights` `[n]` to its tokens in all turns, as a part of their sum."""
        found = []
        for number in range(len(self.images) + len(self.videos)):
            video = number - len(self.images)
            seconds = self.times[video] if video >= 0 else [0.0]
            name = {"video": str(self.videos[video])} if video >= 0 else {"image": str(self.images[number])}
            found += [{**name, "second": second, "weight": 0.0} for second in seconds]
        width = self.model.config.tokens_per_frame
        parts = weights.reshape(-1, len(found), width).sum((0, 2)) / (weights.sum() or 1.0)
        return [frame | {"weight": weight} for frame, weight in zip(found, parts.tolist(), strict=True)]

    # ---- a question becomes a prompt

    def _turn(self, question: str, new_tokens: int) -> Turn:
        """The question with its visual tokens."""
        check_text(question, "the question")
        if IMAGE in question:
            raise InputError(f"the question holds {IMAGE}, which stands for a picture; give pictures with --image")

        def tokens(visual: Shown) -> np.ndarray:
            return self.model.visual_tokens(**visual.arguments, prompts=[question])[0]

        if self.follow_ups:
            self.encode(new_tokens)
            return Turn(question, [tokens(one) for one in self.features])
        self.frames = 0
        return Turn(question, self._each(new_tokens, tokens))

    def _that_fit(self, newest: Turn, new_tokens: int) -> list[Turn]:
        """The earlier turns that go before the newest one, with their visual tokens or without."""
        positions = self.model.config.text_config
        room, turns = positions.max_length - new_tokens, self.turns
        if self._length([newest]) > room:
            return []  # it cannot be asked at all, which `generate` says
        short = min(room, positions.max_position_embeddings)
        if any(turn.tokens for turn in turns) and (self.like_original or self._length([*turns, newest]) > short):
            turns = [dataclasses.replace(turn, tokens=[]) for turn in turns]
            if not self.like_original:
                self._say(f"with more than {short} tokens in all, earlier questions keep their words but no frames")
        while self._length([*turns, newest]) > room:
            turns = turns[(len(turns) + 1) // 2 :]
            self._say(f"the conversation is longer than the {room} tokens of its room: the oldest turns are left out")
        return turns

    def _lay_out(self, turns: Sequence[Turn]) -> tuple[list[int], list[np.ndarray]]:
        """Ids of the prompt, and the visual tokens of its placeholders."""
        words = [part for turn in turns for part in (self._words(turn), turn.answer)]
        ids = encode_with_images(self.model.tokenizer, prompt(self.template, words[:-1]))
        return ids, [array for turn in turns for array in turn.tokens]

    def _words(self, turn: Turn) -> str:
        config = self.model.config
        if self._movie is not None and turn.tokens:
            return long_video_text(self._movie, turn.question, config.tokens_per_frame, config.mm_use_im_start_end)
        return question_turn(len(turn.tokens), turn.question).replace(IMAGE, marked(IMAGE, config.mm_use_im_start_end))

    def _length(self, turns: Sequence[Turn]) -> int:
        ids, tokens = self._lay_out(turns)
        return len(ids) - ids.count(IMAGE_TOKEN) + sum(map(len, tokens))

    def _say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self.notice(text)

    # ---- frames

    def _each(self, new_tokens: int, use: Callable[[Shown], Any]) -> list[Any]:
        """What `use` makes of every image and video; the frames of a video are decoded as it asks for them."""
        made = [use(Shown(self._counted(self.image_processor.image_pixels(image)))) for image in self.images]
        for number, video in enumerate(self.videos):
            before = self.frames
            for source in self._sources(number, video, new_tokens):
                self.frames = before
                with contextlib.suppress(DamagedEntryError):  # then there is another source
                    made.append(use(source))
                    break
        return made

    def _sources(self, number: int, video: Any, new_tokens: int) -> Iterator[Shown]:
        """Where the frames of a video are to be had: from the cache first, which may turn out to be damaged."""
        if is_features(video):
            with fetch(video) as path:
                known = read_stored(path, self.fps, self.model, self.image_processor)
                if known.inputs is not None and len(self.videos) + len(self.images) > 1:
                    raise InputError(f"{video} is a film with what is said, and goes alone; give no other visual")
                yield Shown(self._stored_frames(number, video, known, known.frames(), new_tokens), known.has_cls)
            return
        if self.cache is None or not isinstance(video, str | Path):
            yield Shown(self._counted(self._video_frames(number, video, new_tokens)))
            return
        has_cls = self.model.config.vision_tower_config.has_cls
        with fetch(video) as path:
            most = self._room(number, new_tokens) if self.reading.fit else None
            how = {"fast": self.reading.fast, "most": most}
            before, key = version(path), video_key(path, self.fps, self.model, self.image_processor, **how)
            if found := self.cache.find(key):
                known, frames = stored(self.cache.path(key), found), self.cache.frames(key)
                yield Shown(self._stored_frames(number, video, known, frames, new_tokens), has_cls)

            def described() -> Description | None:
                same = version(path) == before  # else it was written to meanwhile, and is not what `key` says
                return description(video, key, self.sampled[number], self.model) if same else None

            pixels = self._counted(self._video_frames(number, path if is_url(video) else video, new_tokens))
            frames = itertools.chain.from_iterable(self.model.feature_chunks(pixels))
            yield Shown(self.cache.keep(key, frames, lambda: len(self.sampled[number]), described), has_cls)

    def _stored_frames(
        self, number: int, video: Any, known: Stored, frames: Iterator[np.ndarray], new_tokens: int
    ) -> Iterator[np.ndarray]:
        """`_video_frames` of features that a file holds."""
        self.sampled[number], times = known.sampling, known.sampling.times.tolist()
        self.times[number] = times
        self._check_length(video, new_tokens)
        for done, frame in enumerate(self._counted(frames), 1):
            yield frame
            self.progress(video, done, len(times))
        self._movie = self._film(times, known.inputs)

    def _counted(self, frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        for frame in frames:
            self.frames += 1
            yield frame

    def _video_frames(self, number: int, video: Any, new_tokens: int) -> Iterator[np.ndarray]:
        expected = None
        times = self.times[number] = []

        def on_read(sampling: Sampling, done: int) -> None:
            nonlocal expected
            if done == 1:
                self.sampled[number], expected = sampling, len(sampling)
                self._check_length(video, new_tokens)

        if isinstance(video, str | Path):
            pieces = self.image_processor.stream_video(
                video,
                self.fps,
                progress=on_read,
                adapt=lambda plan: self.reading.plan(plan, self.fps, self._room(number, new_tokens), video, self._say),
                partial=self.reading.damage(video, self._say),
            )
        else:
            pieces = [self.image_processor.video_pixels(video, self.fps)]
        for frames, seconds in pieces:
            for frame, time_ in zip(frames, seconds.tolist(), strict=True):
                yield frame
                times.append(time_)
                self.progress(video, len(times), expected)
        self._movie = self._film(times)

    def _film(self, times: Sequence[float], said: str | None = None) -> str | None:
        """The text of the one video; None where nothing stands between its frames."""
        if self.subtitles is not None:
            said = interleave(times, self.subtitles, self.like_original)
        return with_times(said, times, self._times_of)

    def _room(self, number: int, new_tokens: int) -> int:
        """Frames of the video that the model has room for beside all else, and a tenth of that for the question."""
        config, words = self.model.config, ""
        if self.subtitles is not None:  # as they stand between frames
            movie = interleave([cue.end for cue in self.subtitles], self.subtitles, self.like_original)
            words = long_video_text(movie, words, config.tokens_per_frame, config.mm_use_im_start_end)
        ids = encode_with_images(self.model.tokenizer, prompt(self.template, [words]))
        taken = new_tokens + len(ids) - ids.count(IMAGE_TOKEN)
        frames = len(self.images) + sum(len(plan) for other, plan in self.sampled.items() if other < number)
        room = 0.9 * (config.text_config.max_length - taken) - frames * config.tokens_per_frame
        return int(room / config.tokens_per_frame / (len(self.videos) - number))

    def _check_length(self, video: Any, new_tokens: int) -> None:
        """Says that the videos are too long at the first frame of the one too many, not after its last."""
        config, total = self.model.config, sum(plan.timeline.seconds for plan in self.sampled.values())
        tokens = sum(map(len, self.sampled.values())) * config.tokens_per_frame
        room = config.text_config.max_length - new_tokens
        if tokens <= room:
            return
        fps = 0.9 * room / config.tokens_per_frame / total
        remedy = f"--fps {fps:.2g}" if fps >= 0.001 else "a smaller --max-new-tokens"
        raise InputError(
            f"with {video} the videos last {total:.0f} s, at {self.fps:g} frames a second {tokens} visual tokens; "
            f"this model has room for {max(room, 0)}: use {remedy}, --fit or a long-video checkpoint"
        )
