"""A conversation about some images and videos: `Session(model, image_processor, videos=["walk.mp4"]).ask("Who?")`.

    frames ─ once ─▶ features on the host ─ each question ─▶ its own visual tokens
    system │ visual tokens 1, question 1 │ answer 1 │ visual tokens 2, question 2 │ ...

Each turn has its own visual tokens, as in training and in the processor's `chat`.  A prompt therefore begins like the
previous one, whose keys and values are kept (`prompt_cache.py`): only the last answer and the new question are run.

A conversation that becomes too long is shortened in two steps, each reported once to `notice`.  Beyond the positions
that the language model was first trained for (4,096 for Vicuna, before they were stretched), earlier turns keep their
words but lose their visual tokens: each turn about an hour of video would add 7,200.  Beyond the model's maximum length
the older half of the turns is dropped.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llamavid_jax.errors import InputError
from llamavid_jax.inference.feature_cache import FeatureCache
from llamavid_jax.inference.film import Reading
from llamavid_jax.inference.model import LLaMAVIDLlavaForConditionalGeneration
from llamavid_jax.inference.prompt_cache import PromptCache
from llamavid_jax.inference.request import Settings
from llamavid_jax.inference.sources import Shown, gathered
from llamavid_jax.inference.visuals import Visuals
from llamavid_jax.media.image_processor import LLaMAVIDLlavaImageProcessor
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
from llamavid_jax.text.subtitles import Cue
from llamavid_jax.text.tokenizer import encode_with_images


@dataclasses.dataclass(frozen=True)
class Answer:
    """The answer to one question.  Of the `prompt_tokens`, `visual_tokens` are of frames, `cached_tokens` were cached.

    `evidence`, if requested, lists every frame in order: its image or video, its second there, and its share of the
    answer's attention to all frames (docs/long-video.md).
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
    """A question with its visual tokens, `[n, D]` for each visual (none once they are dropped), and its answer."""

    question: str
    tokens: list[np.ndarray]
    answer: str = ""


class Session:
    """One conversation.

    `images` and `videos` are paths, URLs or pixels; a single path or URL need not be in a list.  A video may also be a
    file of its features (`media/features.py`); `cache` keeps the features of other videos for later sessions.
    `subtitles` are those of a single video.  `times` "frame" or "minute" puts the time of each into the text, for a
    model that was trained this way.  `fps` overrides the image processor's.  Without `follow_ups` every question stands
    alone and frames are dropped once encoded; with them the features stay in host memory (0.7 MB a frame for the 7B
    models).  `like_original` drops the visual tokens of all earlier turns and places subtitles as the original's
    command lines do.  `progress(video, frames done, total frames or None)` is called for each frame, `notice(text)`
    once for each text.
    """

    def __init__(
        self,
        model: LLaMAVIDLlavaForConditionalGeneration,
        image_processor: LLaMAVIDLlavaImageProcessor,
        *,
        images: str | Path | Sequence[Any] = (),
        videos: str | Path | Sequence[Any] = (),
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
        said: set[str] = set()

        def say(text: str) -> None:
            if text not in said:
                said.add(text)
                notice(text)

        images, videos = ([one] if isinstance(one, str | Path) else one for one in (images, videos))
        self.model, self.template, self.say = model, template_named(template), say
        self.visuals = Visuals(
            model,
            image_processor,
            images,
            videos,
            subtitles=subtitles,
            times=times,
            fps=fps,
            reading=reading,
            template=self.template,
            like_original=like_original,
            cache=cache,
            progress=progress,
            say=say,
        )
        self.follow_ups, self.like_original = follow_ups, like_original
        self.turns: list[Turn] = []
        self.features: list[Shown] | None = None  # of each visual, once they are encoded
        self._cache = PromptCache()

    def ask(
        self,
        question: str,
        streamer: Callable[[str], None] | None = None,
        evidence: bool = False,
        **settings: Any,
    ) -> Answer:
        """Answers a question, given all earlier turns.

        `streamer` receives the answer as it comes; `settings` are those of `generate`, such as `max_new_tokens=128`.
        Raises InputErrors, which leave the conversation unchanged.
        """
        if evidence and not (self.visuals.images or self.visuals.videos):
            raise InputError("evidence is the attention to frames, and there are none; give an image or a video")
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
        looked_at = self._evidence(out.evidence[0]) if evidence else None
        return Answer(text, self.visuals.frames, *counts, seconds, self.visuals.sampling(), looked_at)

    def inputs(self, question: str) -> tuple[list[int], list[np.ndarray]]:
        """Ids and visual tokens of the question as the first of a conversation: one row for a batch of `generate`."""
        return self._lay_out([self._turn(question, 1)])

    def encode(self, new_tokens: int = 1) -> int:
        """Decodes and encodes all frames, as the first question would; returns their number."""
        if self.features is None:
            self.features = self.visuals.each(new_tokens, lambda visual: gathered(visual, self.model))
        return self.visuals.frames

    def _evidence(self, weights: np.ndarray) -> list[dict[str, Any]]:
        """Every frame with its tokens' share of the attention `weights` `[n]`, summed over all turns."""
        found = [frame | {"weight": 0.0} for frame in self.visuals.each_frame()]
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
        return Turn(question, self.visuals.each(new_tokens, tokens))

    def _that_fit(self, newest: Turn, new_tokens: int) -> list[Turn]:
        """The earlier turns that fit before the newest one, with or without their visual tokens."""
        positions = self.model.config.text_config
        room, turns = positions.max_length - new_tokens, self.turns
        if self._length([newest]) > room:
            return []  # too long by itself, which `generate` reports
        short = min(room, positions.max_position_embeddings)
        if any(turn.tokens for turn in turns) and (self.like_original or self._length([*turns, newest]) > short):
            turns = [dataclasses.replace(turn, tokens=[]) for turn in turns]
            if not self.like_original:
                self.say(f"with more than {short} tokens in all, earlier questions keep their words but no frames")
        while self._length([*turns, newest]) > room:
            turns = turns[(len(turns) + 1) // 2 :]
            self.say(f"the conversation is longer than the {room} tokens of its room: the oldest turns are left out")
        return turns

    def _lay_out(self, turns: Sequence[Turn]) -> tuple[list[int], list[np.ndarray]]:
        """Ids of the prompt, and the visual tokens of its placeholders."""
        words = [part for turn in turns for part in (self._words(turn), turn.answer)]
        ids = encode_with_images(self.model.tokenizer, prompt(self.template, words[:-1]))
        return ids, [array for turn in turns for array in turn.tokens]

    def _words(self, turn: Turn) -> str:
        config = self.model.config
        if self.visuals.movie is not None and turn.tokens:
            return long_video_text(
                self.visuals.movie, turn.question, config.tokens_per_frame, config.mm_use_im_start_end
            )
        return question_turn(len(turn.tokens), turn.question).replace(IMAGE, marked(IMAGE, config.mm_use_im_start_end))

    def _length(self, turns: Sequence[Turn]) -> int:
        ids, tokens = self._lay_out(turns)
        return len(ids) - ids.count(IMAGE_TOKEN) + sum(map(len, tokens))
