"""Answers many questions about many videos:

    python -m llamavid_jax.commands.batch --in questions.jsonl --out answers.jsonl --model DIR

A line of questions.jsonl is {"id": "7", "video": "walk.mp4", "question": "Who walks?"}; "image" may replace "video",
and both may be lists.  Without "id" the line's number is used.  Each video is encoded once, whatever the order of the
lines, and rows of similar length are answered together.

Answers are written as they come, one per line, so that the same command resumes where it was stopped, even if it was
killed.  A row that fails has "error" instead of "answer", and the exit code is then 1: delete its line to try it again.
"""

import argparse
import collections
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from llamavid_jax import buckets, uploads
from llamavid_jax.commands import program
from llamavid_jax.commands.options import (
    add_cache,
    add_fps,
    add_model,
    add_settings,
    add_times,
    check_fps,
    load_model,
    read_cache,
    read_settings,
)
from llamavid_jax.commands.processes import add_shard, own_shard, read_shard
from llamavid_jax.commands.rows import Answers, Row, read_questions
from llamavid_jax.errors import InputError, Parser, command, say
from llamavid_jax.files import find, local, locked
from llamavid_jax.media.image_processor import LLaMAVIDLlavaImageProcessor
from llamavid_jax.shapes import bucket

SECONDS = 10.0  # between two progress messages
MOST_ROWS = 64  # answered together


class Prompt(NamedTuple):
    """A row that is ready to be answered."""

    row: Row
    ids: list[int]
    tokens: list[np.ndarray]
    frames: int

    @property
    def length(self) -> int:
        return len(self.ids) + sum(map(len, self.tokens))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="llamavid-batch", description="Answer many questions about many videos.", allow_abbrev=False)
    parser.add_argument("--in", dest="questions", required=True, metavar="JSONL", help="the questions, one per line")
    parser.add_argument("--out", required=True, metavar="JSONL", help="file for the answers, one per line")
    add_model(parser)
    add_fps(parser)
    add_times(parser)
    add_settings(parser)
    add_cache(parser)
    parser.add_argument(
        "--batch-tokens",
        type=int,
        default=16384,
        metavar="N",
        help="tokens of the rows answered together: their prompts and longest answers (16384)",
    )
    add_shard(parser)
    options = parser.parse_args(arguments)
    check_fps(options)
    if options.batch_tokens < 1:
        parser.error(f"--batch-tokens is {options.batch_tokens}; give a number above 0, such as 16384")
    options.settings, options.cache, options.shard = read_settings(options), read_cache(options), read_shard(options)
    return options


class Runner:
    """Encodes video after video, and answers rows of similar length together."""

    def __init__(self, options: argparse.Namespace, model: Any, images: LLaMAVIDLlavaImageProcessor, answers: Answers):
        self.options, self.model, self.images, self.answers = options, model, images, answers
        self.waiting: dict[int, list[Prompt]] = collections.defaultdict(list)  # by length bucket
        self.frames = 0

    def run(self, rows: Sequence[Row]) -> Iterator[None]:
        """Yields after each step, so that the caller can report progress."""
        groups: dict[tuple, list[Row]] = collections.defaultdict(list)
        for row in rows:
            groups[row.videos, row.images, row.error].append(row)
        for (_, _, error), group in groups.items():
            if error:
                self.answers.fail(group, error)
                continue
            for prompt in self._prompts(group):
                size = bucket(prompt.length)
                self.waiting[size].append(prompt)
                if len(self.waiting[size]) == self._together(size):
                    self._answer(self.waiting.pop(size))
                elif sum(size * len(some) for size, some in self.waiting.items()) > 4 * self.options.batch_tokens:
                    self._answer(self.waiting.pop(max(self.waiting, key=lambda size: size * len(self.waiting[size]))))
                yield
        for size in sorted(self.waiting):
            self._answer(self.waiting.pop(size))
            yield

    def _together(self, size: int) -> int:
        """How many rows of `size` tokens are answered at once: a power of two, so that it fills its bucket."""
        count = min(self.options.batch_tokens // (size + bucket(self.options.max_new_tokens)), MOST_ROWS)
        return 1 << max(count.bit_length() - 1, 0)

    def _prompts(self, group: Sequence[Row]) -> Iterator[Prompt]:
        """The prompts of rows with the same images and videos, which are encoded once."""
        from llamavid_jax.inference.session import Session  # JAX takes seconds to import

        first, options = group[0], self.options
        try:
            session = Session(
                self.model,
                self.images,
                images=first.images,
                videos=first.videos,
                times=options.times,
                fps=options.fps,
                template=options.template,
                cache=options.cache,
                notice=say,
            )
            self.frames += session.encode(options.max_new_tokens)
        except InputError as error:
            self.answers.fail(group, error)
            return
        for row in group:
            try:
                prompt = Prompt(row, *session.inputs(row.question), session.visuals.frames)
            except InputError as error:
                self.answers.fail([row], error)
            else:
                yield prompt

    def _answer(self, prompts: Sequence[Prompt]) -> None:
        """Answers rows together or, if that fails, one by one, so that an error costs only its own row."""
        given = [prompt.ids for prompt in prompts], [prompt.tokens for prompt in prompts]
        try:
            out = self.model.generate(given[0], visual_tokens=given[1], **self.options.settings)
        except InputError as error:
            if len(prompts) == 1:
                return self.answers.fail([prompts[0].row], error)
            for prompt in prompts:
                self._answer([prompt])
            return None
        self.answers.write(
            [
                {
                    **prompt.row.said(),
                    "answer": text.strip(),
                    "frames": prompt.frames,
                    "visual_tokens": visual,
                    "prompt_tokens": length,
                    "new_tokens": len(new),
                }
                for prompt, text, visual, length, new in zip(
                    prompts, out.texts, out.visual_tokens, out.prompt_tokens, out.token_ids, strict=True
                )
            ]
        )
        return None


@command("llamavid-batch")
def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    images = LLaMAVIDLlavaImageProcessor.from_pretrained(options.model)
    rows = read_questions(options.questions)
    index, count = own_shard(options)
    out = local(options.out)
    if count > 1:
        out = out.with_name(f"{out.stem}.{index}-of-{count}{out.suffix}")
    places = {media: place for place, media in enumerate(dict.fromkeys((row.videos, row.images) for row in rows))}
    rows = [row for row in rows if places[row.videos, row.images] % count == index]
    if buckets.url(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    with locked(out.with_name(f".{out.name}.lock"), str(out)), uploads.sending(find(out)):
        return _run(options, images, rows, Answers(out, rows))


def _run(
    options: argparse.Namespace, images: LLaMAVIDLlavaImageProcessor, rows: Sequence[Row], answers: Answers
) -> int:
    named = ("model", "dtype", "quantize", "kv_cache", "fps", "times", "template")
    settings = {name: getattr(options, name) for name in named} | options.settings
    answers.begin({**settings, "model": find(options.model).resolve().name, "stop": list(settings["stop"])})
    left = [row for row in rows if row.id not in answers.done]
    known = len(rows) - len(left)
    if known:
        say(f"{known} of {len(rows)} rows are answered already")
    if left:
        program.keep_programs()
        runner = Runner(options, load_model(options), images, answers)
        started = said = time.perf_counter()

        def progress() -> None:
            seconds, done = time.perf_counter() - started, len(answers.done) - known
            say(
                f"{known + done} of {len(rows)} rows, {done / seconds:.2f} a second; "
                f"{runner.frames} frames, {runner.frames / seconds:.0f} a second"
            )

        for _ in runner.run(left):
            if time.perf_counter() - said > SECONDS and len(answers.done) < len(rows):
                said = time.perf_counter()
                progress()
        progress()
    if answers.failed:
        say(f"failed: {answers.failed} of {len(rows)} rows; their lines in {answers.path} say why")
    return int(answers.failed > 0)


def run() -> None:
    """Runs `main` as a process."""
    program.run(main)


if __name__ == "__main__":
    sys.exit(main())
