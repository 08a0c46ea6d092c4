"""A request's messages -> the row that is prefilled, and the table of visual tokens that it points into.

    part ─ sources ─▶ file ─ once for all requests ─▶ features [F, P, E] ─ once a question ─▶ visual tokens [n, D]
    messages ─ text/chat.py ─▶ turns ─▶ ids with a placeholder for each visual ─▶ Row

Every request has a thread of its own here; what needs the device goes to one queue in chunks of frames, of which each
request has two at most at a time.  So chunks of different requests take turns, whatever the length of their films.
"""

import concurrent.futures
import contextlib
import hashlib
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from llamavid_jax.errors import InputError
from llamavid_jax.inference.encode import table_of
from llamavid_jax.inference.model import LLaMAVIDLlavaForConditionalGeneration
from llamavid_jax.inference.request import check_row
from llamavid_jax.media.image_processor import LLaMAVIDLlavaImageProcessor
from llamavid_jax.media.source import MediaError
from llamavid_jax.media.timeline import Sampling
from llamavid_jax.serving.protocol import Asked
from llamavid_jax.serving.sources import Sources
from llamavid_jax.serving.store import Store
from llamavid_jax.shapes import FRAME_CHUNK, Row, merge_row
from llamavid_jax.text.chat import Chat, read_messages
from llamavid_jax.text.conversation import IMAGE, long_video_text, marked
from llamavid_jax.text.subtitles import interleave
from llamavid_jax.text.tokenizer import encode_with_images

Check = Callable[[], None]  # raises where nobody waits for the row any more
DECODING = 4  # videos that are decoded at a time


class Preparer:
    """Called in any number of threads.  `max_bytes` are kept of features, and an eighth of that of visual tokens."""

    def __init__(
        self,
        model: LLaMAVIDLlavaForConditionalGeneration,
        image_processor: LLaMAVIDLlavaImageProcessor,
        sources: Sources,
        max_bytes: int = 4 << 30,
        max_frames: int = 20_000,
    ):
        self.model, self.image_processor, self.sources, self.max_frames = model, image_processor, sources, max_frames
        self.features, self.tokens = Store(max_bytes), Store(max_bytes // 8)
        self.frames = 0  # encoded so far
        self._device = concurrent.futures.ThreadPoolExecutor(1, "encoder")
        self._decoding = threading.Semaphore(DECODING)

    def __call__(self, asked: Asked, check: Check) -> tuple[Row, np.ndarray]:
        """Raises InputErrors for what cannot be asked, and what `check` raises."""
        chat = read_messages(asked.messages)
        if len(chat.turns) % 2 == 0:
            raise InputError("the last message is the assistant's; end the messages with the user's")
        config = self.model.config
        with contextlib.ExitStack() as used:
            films: dict[tuple, tuple[tuple, tuple[np.ndarray, ...]]] = {}
            shown = []
            for image, video, fps in zip(chat.images, chat.videos, chat.fps, strict=True):
                kind, source = ("video", video) if image is None else ("image", image)
                rate = None
                if kind == "video":
                    rate = self.image_processor.rate(asked.fps if fps is None else fps)
                if (name := (kind, str(source), rate)) not in films:
                    films[name] = self._film(kind, source, rate, asked.room, check, used)
                shown.append(films[name])
            width = config.tokens_of(config.vision_tower_config.has_cls)
            chat, first = self._that_fits(chat, [width * len(arrays[0]) for _, arrays in shown], asked)
            blocks = [
                self._tokens(key, arrays[0], question, check)
                for (key, arrays), question in zip(shown[first:], chat.prompts[first:], strict=True)
            ]
            ids = np.array(self._ids(chat, shown, asked))
        check_row(config, 0, ids, len(blocks), sum(map(len, blocks)), asked.room)
        table, places = table_of([blocks], config.text_config.hidden_size, self.model.dtype)
        return merge_row(ids, places[0]), table

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
                if words > longest:
                    break
                words *= 2
        return time.perf_counter() - started

    # ---- frames

    def _film(self, kind: str, source: Any, fps: Any, new_tokens: int, check: Check, used: contextlib.ExitStack):
        """The key, and features `[F, P, E]` and times `[F]`, of an image or a video; they stay until `used` ends."""
        with self.sources.open(source) as path:
            with path.open("rb") as file:
                key = hashlib.file_digest(file, "sha256").hexdigest(), kind, fps

            def make() -> tuple[np.ndarray, ...]:
                return self._encode(path, kind, fps, new_tokens, check)

            return key, used.enter_context(self.features.use(key, make, check))

    def _encode(self, path: Path, kind: str, fps: Any, new_tokens: int, check: Check) -> tuple[np.ndarray, np.ndarray]:
        if kind == "image":
            return self._on_device([self.image_processor.image_pixels(path)], check)[0], np.zeros(1)
        times = []

        def pixels() -> Iterable[np.ndarray]:
            def on_read(sampling: Sampling, done: int) -> None:
                self._check(path, new_tokens, sampling, done)

            for chunk, seconds in self.image_processor.stream_video(path, fps, FRAME_CHUNK, on_read):
                times.append(seconds)
                yield chunk

        while not self._decoding.acquire(timeout=0.1):
            check()
        try:
            return np.concatenate(self._on_device(pixels(), check)), np.concatenate(times)
        finally:
            self._decoding.release()

    def _on_device(self, chunks: Iterable[np.ndarray], check: Check, function: Callable | None = None) -> list:
        """`function`, by default the vision tower, of each chunk, while the next one is made."""
        done, pending = [], None
        for chunk in chunks:
            check()
            ahead = self._device.submit(function or self._vision, chunk)
            done += [pending.result()] if pending else []
            pending = ahead
        return done + ([pending.result()] if pending else [])

    def _vision(self, pixels: np.ndarray) -> np.ndarray:
        self.frames += len(pixels)
        return self.model.vision_features(pixels)

    def _check(self, path: Path, new_tokens: int, sampling: Sampling, done: int) -> None:
        """At the first frame: too many for the server, or for the model."""
        if done > 1:
            return
        config, frames = self.model.config, len(sampling)
        room = (config.text_config.max_length - new_tokens) // config.tokens_per_frame
        if frames > min(room, self.max_frames):
            seconds = sampling.timeline.seconds
            raise MediaError(
                f"{path} lasts {seconds:.0f} s, which are {frames} frames, and {min(room, self.max_frames)} fit; "
                f"ask with fps {0.9 * min(room, self.max_frames) / max(seconds, 1e-3):.2g}"
            )

    # ---- text

    def _tokens(self, key: tuple, features: np.ndarray, question: str, check: Check) -> np.ndarray:
        """Visual tokens `[n, D]` of a film for a question."""

        def make() -> tuple[np.ndarray]:
            def ask(chunk: np.ndarray) -> np.ndarray:
                has_cls = self.model.config.vision_tower_config.has_cls
                return self.model.visual_tokens(features=chunk, features_have_cls=has_cls, prompts=[question])[0]

            chunks = (features[start : start + FRAME_CHUNK] for start in range(0, len(features), FRAME_CHUNK))
            return (np.concatenate(self._on_device(chunks, check, ask)),)

        with self.tokens.use((key, question), make, check) as (tokens,):
            return tokens

    def _that_fits(self, chat: Chat, sizes: list[int], asked: Asked) -> tuple[Chat, int]:
        """The chat, and its first placeholder that is shown: beyond the positions that the model was trained for
        earlier turns keep their words alone, as in a Session."""
        text = self.model.config.text_config
        room = min(text.max_length - asked.room, text.max_position_embeddings)
        words = len(encode_with_images(self.model.tokenizer, chat.text("vicuna_v1")))
        newest = chat.turns[-1].count(IMAGE)
        if words + sum(sizes) <= room or len(sizes) == newest:
            return chat, 0
        bare = [turn.replace(IMAGE + "\n", "").replace(IMAGE, "") for turn in chat.turns[:-1]]
        chat.turns[:-1] = bare
        return chat, len(sizes) - newest

    def _ids(self, chat: Chat, shown: list, asked: Asked) -> list[int]:
        config = self.model.config
        start_end, turns = config.mm_use_im_start_end, chat.turns
        if asked.subtitles is None:
            turns[:] = [turn.replace(IMAGE, marked(IMAGE, start_end)) for turn in turns]
        else:
            films = [(key, arrays) for key, arrays in shown if key[1] == "video"]
            if len({key for key, _ in shown}) != 1 or not films:
                raise InputError("subtitles go with one video alone; show that, and nothing else")
            movie = interleave(films[0][1][1].tolist(), asked.subtitles)
            for number, turn in enumerate(turns):
                if IMAGE in turn:
                    words = turn.replace(IMAGE, "").strip()
                    turns[number] = long_video_text(movie, words, config.tokens_per_frame, start_end)
        return encode_with_images(self.model.tokenizer, chat.text("vicuna_v1"))
