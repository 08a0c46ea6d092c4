"""A request's messages -> the row that is prefilled, and the table of visual tokens that it points into.

    part ─ sources ─▶ file ─ once for all requests ─▶ features [F, P, E] ─ once a question ─▶ visual tokens [n, D]
                           └ if requested ─▶ speech ──────────────┐
    messages ─ text/chat.py ─▶ turns ─────────────────────────────┴▶ ids with a placeholder for each visual ─▶ Row

Every request has a thread of its own here.  Work for the device goes to one queue in chunks of frames, at most two per
request at a time.  So chunks of different requests take turns, however long their videos are.
"""

import concurrent.futures
import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llamavid_jax.errors import InputError
from llamavid_jax.inference.encode import table_of
from llamavid_jax.inference.feature_cache import DamagedEntryError, FeatureCache
from llamavid_jax.inference.model import LLaMAVIDLlavaForConditionalGeneration
from llamavid_jax.inference.request import check_row
from llamavid_jax.inference.sources import content, description, stored, version, video_key
from llamavid_jax.media.feature_file import Description
from llamavid_jax.media.features import is_feature_file
from llamavid_jax.media.image_processor import LLaMAVIDLlavaImageProcessor
from llamavid_jax.media.source import MediaError
from llamavid_jax.serving.decoding import Reading, check_length, decoded, heard
from llamavid_jax.serving.layout import lay_out
from llamavid_jax.serving.prepared import LOOKED_AT, Prepared, Shown, Visual
from llamavid_jax.serving.protocol import Asked
from llamavid_jax.serving.sources import Sources
from llamavid_jax.serving.store import Store
from llamavid_jax.serving.stored import stored_film, stored_text
from llamavid_jax.shapes import FRAME_CHUNK, merge_row
from llamavid_jax.text.chat import Chat, read_messages
from llamavid_jax.text.subtitles import Cue

Check = Callable[[], None]  # raises if nobody waits for the row any more
DECODING = 4  # videos decoded at a time, and images, which do not wait for videos


class Preparer:
    """Called in any number of threads.  Keeps up to `max_bytes` of features, and an eighth of that of visual tokens.

    A process that decodes a file has `decoder_bytes` of memory.  `cache` keeps the features of videos on disk.
    `speech` is the faster-whisper model that transcribes their sound, if a request asks for it.
    """

    def __init__(
        self,
        model: LLaMAVIDLlavaForConditionalGeneration,
        image_processor: LLaMAVIDLlavaImageProcessor,
        sources: Sources,
        max_bytes: int = 4 << 30,
        max_frames: int = 20_000,
        decoder_bytes: int = 4 << 30,
        cache: FeatureCache | None = None,
        speech: str | None = None,
    ):
        self.decoder_bytes, self.cache, self.speech = decoder_bytes, cache, speech
        self.model, self.image_processor, self.sources, self.max_frames = model, image_processor, sources, max_frames
        self.features, self.tokens = Store(max_bytes), Store(max_bytes // 8)
        self.frames = 0  # encoded so far
        self.encoding: dict[str, tuple[int, int]] = {}  # videos being encoded, by SHA-256: frames done, of how many
        self._device = concurrent.futures.ThreadPoolExecutor(1, "encoder")
        self._decoding = {kind: threading.Semaphore(DECODING) for kind in ("video", "image")}

    def __call__(self, asked: Asked, check: Check) -> Prepared:
        """Raises InputErrors for invalid requests, and what `check` raises."""
        chat = read_messages(asked.messages)
        if len(chat.turns) % 2 == 0:
            raise InputError("the last message is the assistant's; end the messages with the user's")
        if asked.evidence and not chat.prompts:
            raise InputError("evidence is asked of messages that show nothing; show a video, or leave it out")
        config, names = self.model.config, self._names(chat, asked)
        with contextlib.ExitStack() as used:
            films, said = {}, asked.subtitles
            for name in names:
                if name not in films:
                    kind, source, rate = name
                    with self.sources.open(source) as path:
                        before, digest = version(path), content(path)["sha256"]
                        if kind == "video" and is_feature_file(path):
                            kind, alone = "features", len(set(names)) == 1
                            said = stored_text(path, alone) if said is None else said
                        elif kind == "video":
                            rate = self.image_processor.rate(1 if rate[1] else rate[0]), rate[1]
                        if asked.transcribe:
                            said = self._heard(path, before, digest, check)
                        films[name] = self._film(path, before, (digest, kind, rate), asked.room, check, used)
            shown = [films[name] for name in names]
            times = [one.times for one in shown]
            ids, first = lay_out(config, self.model.tokenizer, chat, times, said, asked.times, asked.room)
            shown, prompts = shown[first:], chat.prompts[first:]
            blocks = [self._tokens(one, question, check) for one, question in zip(shown, prompts, strict=True)]
        check_row(config, 0, ids, len(blocks), sum(map(len, blocks)), asked.room)
        table, places = table_of([blocks], config.text_config.hidden_size, self.model.dtype)
        parts = [list(films).index(name) for name in names[first:]]
        visuals = [
            Visual(part, one, len(block), question)
            for part, one, block, question in zip(parts, shown, blocks, prompts, strict=True)
        ]
        return Prepared(merge_row(ids, places[0]), table, visuals)

    def _names(self, chat: Chat, asked: Asked) -> list[tuple[str, Any, Any]]:
        """For each placeholder its kind, its source and, for a video, frames per second and number of frames."""
        names = []
        for image, video, fps in zip(chat.images, chat.videos, chat.fps, strict=True):
            if not isinstance(source := image if video is None else video, str):
                raise MediaError(f"a part names a {type(source).__name__}; give a URL or the id of an uploaded file")
            if video is None:
                names.append(("image", image, None))
            else:
                given, count = (asked.fps, asked.num_frames) if fps is None else (fps, None)
                self.image_processor.rate(1 if given is None else given)
                names.append(("video", video, (given, count)))
        for field in ("subtitles", "transcribe", "times"):
            if getattr(asked, field) and (len(set(names)) != 1 or names[0][0] != "video"):
                raise InputError(f"{field} goes with one video alone; show that, and nothing else")
        if asked.transcribe and self.speech is None:
            raise InputError("transcribe is not done by this server; start it with --transcribe, or send subtitles")
        return names

    def warm(self) -> float:
        """Compiles what frames and questions of all sizes need; returns the seconds that took."""
        started, vision = time.perf_counter(), self.model.config.vision_tower_config
        longest = self.model.config.qformer_config.max_position_embeddings
        for frames in (1, 8, FRAME_CHUNK):
            pixels = np.zeros((frames, 3, vision.image_size, vision.image_size), np.float32)
            features = self.model.vision_features(pixels)
            words = 1
            while True:  # every bucket of a question's length
                question = "a " * words
                self.model.visual_tokens(features=features, features_have_cls=vision.has_cls, prompts=[question])
                if frames == LOOKED_AT:
                    self.look(features, question)
                if words > longest:
                    break
                words *= 2
        return time.perf_counter() - started

    def look(self, features: np.ndarray, question: str) -> np.ndarray:
        """The question's attention in up to LOOKED_AT frames: `[F, S, S]`, which sums to 1 in each frame."""
        padded = features[np.minimum(np.arange(LOOKED_AT), len(features) - 1)]
        attention = self._device.submit(self.model.context_attention, None, question, features=padded)
        return attention.result()[: len(features)]

    # ---- frames

    def _film(
        self, path: Path, before: tuple, key: tuple, new_tokens: int, check: Check, used: contextlib.ExitStack
    ) -> Shown:
        """An image or a video, whose features stay until `used` ends; `before` is its version as it was hashed."""

        def make() -> tuple[np.ndarray, ...]:
            try:
                found = self._encode(path, *key, new_tokens, check)
            finally:
                self.encoding.pop(key[0], None)
            check_unchanged(path, before, key[0])
            return found

        return Shown(key, *used.enter_context(self.features.use(key, make, check)))

    def _heard(self, path: Path, before: tuple, digest: str, check: Check) -> list[Cue]:
        """The speech in a video, from its sound; kept like its features."""

        def make() -> tuple[np.ndarray, np.ndarray]:
            with self._decoder("video", check):
                cues = heard(path, self.speech, self.decoder_bytes, check)
            check_unchanged(path, before, digest)
            return np.array([cue.end for cue in cues], float), np.array([cue.text for cue in cues], str)

        with self.features.use((digest, "speech"), make, check) as (ends, texts):
            return [Cue(*pair) for pair in zip(ends.tolist(), texts.tolist(), strict=True)]

    @contextlib.contextmanager
    def _decoder(self, kind: str, check: Check) -> Iterator[None]:
        """Waits for one of the DECODING places of this `kind`, and holds it."""
        while not self._decoding[kind].acquire(timeout=0.1):
            check()
        try:
            yield
        finally:
            self._decoding[kind].release()

    def _encode(
        self, path: Path, digest: str, kind: str, rate: Any, new_tokens: int, check: Check
    ) -> tuple[np.ndarray, np.ndarray]:
        """Features `[F, P, E]` and times `[F]`: from the cache on disk, or from what a process decodes.

        A video's `rate` is its frames per second and, instead of these, their number, for which the cache is not used.
        """
        config, model = self.model.config, self.model
        most = min((config.text_config.max_length - new_tokens) // config.tokens_per_frame, self.max_frames)
        if kind == "features":
            return stored_film(path, rate, model, self.image_processor, most)
        key, before = None, version(path)
        if self.cache is not None and kind == "video" and rate[1] is None:
            key = video_key(path, rate[0], model, self.image_processor)
            if found := self.cache.find(key):
                plan = stored(path, found).sampling
                check_length(path, plan.timeline, len(plan), most)
                with contextlib.suppress(DamagedEntryError):
                    return np.stack(list(self.cache.frames(key))).astype(model.dtype), plan.times
        reading = Reading(rate[0], most, FRAME_CHUNK, rate[1]) if kind == "video" else None
        process = self.image_processor, path, reading, self.decoder_bytes, check
        with self._decoder(kind, check), contextlib.closing(decoded(*process)) as chunks:
            plan = next(chunks) if reading else None
            frames = self._counted(digest, len(plan) if plan else 1, self._on_device(chunks, check))
            if key is not None:

                def described() -> Description | None:  # None for a file that was written to meanwhile
                    return description(path, key, plan, model) if version(path) == before else None

                frames = self.cache.keep(key, frames, lambda: len(plan), described)
            return np.stack(list(frames)), plan.times if plan else np.zeros(1)

    def _counted(self, digest: str, count: int, chunks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """The frames of all chunks; `encoding` counts how many of the video's `count` have arrived."""
        self.encoding[digest] = 0, count
        for done, frame in enumerate(itertools.chain.from_iterable(chunks), 1):
            self.encoding[digest] = done, count
            yield frame

    def _on_device(
        self, chunks: Iterable[np.ndarray], check: Check, function: Callable | None = None
    ) -> Iterator[np.ndarray]:
        """`function`, by default the vision tower, of each chunk, while the next one is made."""
        pending = None
        for chunk in chunks:
            check()
            ahead = self._device.submit(function or self._vision, chunk)
            if pending:
                yield pending.result()
            pending = ahead
        if pending:
            yield pending.result()

    def _vision(self, pixels: np.ndarray) -> np.ndarray:
        self.frames += len(pixels)
        return self.model.vision_features(pixels)

    # ---- a question

    def _tokens(self, shown: Shown, question: str, check: Check) -> np.ndarray:
        """Visual tokens `[n, D]` of an image or a video for a question."""

        def make() -> tuple[np.ndarray]:
            def ask(chunk: np.ndarray) -> np.ndarray:
                has_cls = self.model.config.vision_tower_config.has_cls
                return self.model.visual_tokens(features=chunk, features_have_cls=has_cls, prompts=[question])[0]

            starts = range(0, len(shown.features), FRAME_CHUNK)
            chunks = (shown.features[start : start + FRAME_CHUNK] for start in starts)
            return (np.concatenate(list(self._on_device(chunks, check, ask))),)

        with self.tokens.use((shown.key, question), make, check) as (tokens,):
            return tokens


def check_unchanged(path: Path, before: tuple, digest: str) -> None:
    """Raises MediaError if the file's content is no longer that of `digest`, under which what was read would be kept.

    `before` is its version as it was hashed: another one with the same content is an upload that came once more.
    """
    if version(path) != before and content(path)["sha256"] != digest:
        raise MediaError(f"{path} was written to while it was read; ask again once it is complete")
