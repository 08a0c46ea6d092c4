"""Times a video from file to first word, and its second question: the table of docs/performance.md.

    python -m benchmarks.film FILM.mp4 --fps 1 --fps 0.1

Two ways to the same features and the same word alternate in one process: `plain` decodes every frame in order,
`session` is what a Session does.  Also timed: decoding every frame and discarding it, and each of the session's stages
alone, which together take more than the session, where they overlap.  Programs are compiled before the clock starts.
On a busy machine compare CPU seconds, not wall seconds.

The model's positions are stretched until the video fits, so its answers are meaningless.
"""

import dataclasses
import functools
import itertools
import sys
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any, NamedTuple

import av
import jax
import numpy as np

from llamavid_jax import LLaMAVIDLlavaForConditionalGeneration, Session
from llamavid_jax.errors import Parser, command
from llamavid_jax.inference.film import Reading
from llamavid_jax.media.image_processor import LLaMAVIDLlavaImageProcessor
from llamavid_jax.media.source import local_file
from llamavid_jax.media.timeline import Sampling
from llamavid_jax.media.video import _read_timeline, cores, plan_video
from llamavid_jax.shapes import FRAME_CHUNK

QUESTIONS = "What happens in the film?", "Who is seen there?"
COLUMNS = "| frames a second | what | wall, s | CPU, s |\n|---|---|---|---|"


class InOrder(Reading):
    """Decodes every frame, as it ignores the file's index."""

    def plan(self, sampling: Sampling, *_: Any) -> Sampling:
        return dataclasses.replace(sampling, timeline=dataclasses.replace(sampling.timeline, index=None))


class Took(NamedTuple):
    wall: float
    cpu: float
    result: Any


def clocked(run: Callable[[], Any]) -> Took:
    _read_timeline.cache_clear()
    wall, cpu = time.perf_counter(), time.process_time()
    result = run()
    return Took(time.perf_counter() - wall, time.process_time() - cpu, result)


def stretched(model: LLaMAVIDLlavaForConditionalGeneration, tokens: int) -> LLaMAVIDLlavaForConditionalGeneration:
    """The model with at least `tokens` positions."""
    text = model.config.text_config
    factor = max(text.rope_factor, -(-tokens // text.max_position_embeddings))
    config = dataclasses.replace(model.config, text_config=dataclasses.replace(text, rope_factor=float(factor)))
    tokenizers = {"tokenizer": model.tokenizer, "qformer_tokenizer": model.qformer_tokenizer}
    return type(model)(config, model.params, dtype=model.dtype, **tokenizers)


def decode_all(path: str) -> None:
    with av.open(path) as container:
        container.streams.video[0].thread_type = "AUTO"
        for _ in container.decode(video=0):
            pass


def measure(path: str, fps: float, model: Any, images: LLaMAVIDLlavaImageProcessor, rounds: int) -> list[tuple]:
    """Rows of the table; each is the one of `rounds` that took the fewest CPU seconds."""

    def session(reading: Reading) -> Session:
        return Session(model, images, videos=[path], fps=fps, reading=reading)

    def ask(session: Session, question: str) -> Session:
        session.ask(question, max_new_tokens=1)
        return session

    def read(count: int | None = None) -> list[np.ndarray]:
        chunks = images.stream_video(path, fps)
        frames = (frame for pixels, _ in chunks for frame in pixels)
        kept = [frame.copy() for frame in itertools.islice(frames, count or FRAME_CHUNK)]
        for _ in frames if count is None else ():
            pass
        chunks.close()
        return kept

    warm = session(Reading(fast=True))
    for question in QUESTIONS:
        ask(warm, question)
    some = read(FRAME_CHUNK)
    count = len(plan_video(path, fps))
    taken: dict[str, list[Took]] = {}

    def take(name: str, run: Callable[[], Any]) -> Any:
        taken.setdefault(name, []).append(clocked(run))
        return taken[name][-1].result

    for _ in range(rounds):
        plain = take("plain: file to first word", lambda: ask(session(InOrder()), QUESTIONS[0]))
        take("every frame decoded and thrown away", lambda: decode_all(path))
        ours = take("session: file to first word", lambda: ask(session(Reading()), QUESTIONS[0]))
        for one, other in zip(plain.features, ours.features, strict=True):
            np.testing.assert_array_equal(one.frames, other.frames)
        take("alone: packets read", lambda: plan_video(path, fps))
        take("alone: frames read, packets and all", read)
        take(f"alone: first {len(some)} frames read and encoded", lambda: model.vision_features(read(FRAME_CHUNK)))
        take("alone: frames encoded", lambda: model.vision_features(itertools.islice(itertools.cycle(some), count)))
        take("session: second question", functools.partial(ask, ours, QUESTIONS[1]))
    best = {name: min(all_, key=lambda took: took.cpu) for name, all_ in taken.items()}
    return [(fps, name, took.wall, took.cpu) for name, took in best.items()]


@command("film")
def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="film", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("film", metavar="FILM")
    parser.add_argument("--model", default="demo/model", metavar="DIR")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--fps", type=float, action="append", help="frames a second (1); may be repeated")
    parser.add_argument("--rounds", type=int, default=1, metavar="N", help="rounds; the best counts (1)")
    options = parser.parse_args(arguments)
    film = str(local_file(options.film))
    model = LLaMAVIDLlavaForConditionalGeneration.from_pretrained(options.model, dtype=options.dtype)
    images = LLaMAVIDLlavaImageProcessor.from_pretrained(options.model)
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("jax", "av"))
    print(f"{jax.devices()[0].device_kind}, {cores()} cores, {versions}, {options.model}\n\n{COLUMNS}")
    for fps in options.fps or [1.0]:
        tokens = 2 * len(plan_video(film, fps)) * model.config.tokens_per_frame + 1000  # two turns with their frames
        for row in measure(film, fps, stretched(model, tokens), images, options.rounds):
            print("| {:g} | {} | {:.2f} | {:.2f} |".format(*row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
