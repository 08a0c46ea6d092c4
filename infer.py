"""Ask LLaMA-VID about videos and images:

    python infer.py --model DIR --video FILE_OR_URL --question "What happens?"

The answer goes to stdout, progress to stderr.  Bad input ends with exit code 2 and one line that says what to do.
`--chat` reads one question a line and never encodes the video again: the features of its frames stay in host memory
(0.7 MB a frame for the 7B models), only the Q-Former reads them anew with each question.
"""

import argparse
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from llamavid_jax.data.records import count_frames
from llamavid_jax.errors import InputError, Parser, complain
from llamavid_jax.inference.request import Settings
from llamavid_jax.media.source import local_file
from llamavid_jax.text.conversation import IMAGE, TEMPLATES, prompt, template_named
from llamavid_jax.text.tokenizer import encode_with_images


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(description="Ask LLaMA-VID about videos and images.", allow_abbrev=False)
    parser.add_argument("--model", required=True, metavar="DIR", help="a converted checkpoint")
    parser.add_argument("--video", action="append", default=[], metavar="FILE|URL", help="may be given several times")
    parser.add_argument("--image", action="append", default=[], metavar="FILE|URL", help="may be given several times")
    parser.add_argument("--question", help="what to ask; with --chat the first question")
    parser.add_argument("--chat", action="store_true", help="go on asking: one question a line on stdin")
    parser.add_argument("--fps", type=float, default=1.0, help="frames sampled a second of video (1)")
    parser.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="longest answer, in tokens (512)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (0)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="sample from the likeliest P of mass (1)")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="sample from the K likeliest tokens (0: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (0)")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end the answer before TEXT")
    parser.add_argument("--template", default="vicuna_v1", choices=sorted(TEMPLATES), help="conversation format")
    parser.add_argument("--stream", action="store_true", help="print the answer as it comes")
    parser.add_argument("--json", action="store_true", help="print one JSON object for each answer")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="of the weights (bfloat16)"
    )
    parser.add_argument("--quantize", choices=["int8", "int4"], help="the weights, while they are loaded")
    parser.add_argument("--kv-cache", default="float", choices=["float", "int8"], help="of decoding (float)")
    parser.add_argument("--mesh", default="", metavar="AXIS=N", help="shard over devices, such as tensor=4")
    parser.add_argument("--compile-only", action="store_true", help="compile for --topology and stop")
    parser.add_argument("--topology", metavar="NAME", help="such as v5e:1x1: a generation of TPU, and chips")
    parser.add_argument("--tokens", type=int, default=3584, metavar="N", help="of the compiled prompt, frames and all")
    options = parser.parse_args(arguments)
    if options.compile_only != bool(options.topology):
        parser.error("--compile-only and --topology go together, such as --compile-only --topology v5e:1x1")
    if options.tokens < 1:
        parser.error(f"--tokens is {options.tokens}; give the length of the prompt, such as 3584")
    # said now, not after minutes of loading
    options.settings = Settings(
        options.max_new_tokens, options.temperature, options.top_p, options.top_k, options.seed, options.stop
    )
    if options.compile_only:
        return options
    options.question = (options.question or "").strip()
    if not options.question and not options.chat:
        parser.error("there is no question; give --question TEXT or --chat")
    if options.stream and options.json:
        parser.error("--stream and --json exclude each other; give one of them")
    if not 0 < options.fps < math.inf:
        parser.error(f"--fps is {options.fps}; give a number above 0, such as 1")
    return options


def compile_only(options: argparse.Namespace) -> int:
    """Compiles the programs for a slice that need not be there.  `--model` may be one of configs/models/."""
    from llamavid_jax import LLaMAVIDLlavaConfig
    from llamavid_jax.precompile.infer import check_inference
    from llamavid_jax.precompile.report import show
    from llamavid_jax.precompile.topology import in_own_process

    read = LLaMAVIDLlavaConfig.from_yaml if options.model.endswith(".yaml") else LLaMAVIDLlavaConfig.from_pretrained
    config = read(options.model)
    config = config.quantized(options.quantize) if options.quantize else config
    arguments = options.topology, options.mesh, options.tokens, options.max_new_tokens, options.dtype, options.model
    return show(in_own_process(check_inference, config, *arguments, options.kv_cache))


class Session:
    """One conversation about some videos and images."""

    def __init__(self, options: argparse.Namespace, console: Console):
        start = time.perf_counter()
        from llamavid_jax import LLaMAVIDLlavaForConditionalGeneration, LLaMAVIDLlavaImageProcessor
        from llamavid_jax.parallel.sharding import make_mesh, parse_mesh

        self.options, self.console = options, console
        self.images = LLaMAVIDLlavaImageProcessor.from_pretrained(options.model)
        self._look_at_files()  # before minutes of loading
        mesh = make_mesh(**parse_mesh(options.mesh)) if options.mesh else None
        with console.status(f"loading {options.model}"):
            self.model = LLaMAVIDLlavaForConditionalGeneration.from_pretrained(
                options.model, dtype=options.dtype, mesh=mesh, quantize=options.quantize, kv_cache=options.kv_cache
            )
        if self.model.tokenizer is None:
            raise InputError(f"{options.model} holds no tokenizer; convert again with --tokenizer FOLDER")
        self.turns: list[str] = []
        self.features: list[np.ndarray] | None = None  # of each visual, once a chat has encoded it
        self.frames = 0
        self.expected: dict[int, float] = {}  # seconds of each video that has begun
        self.load_seconds = time.perf_counter() - start

    def _look_at_files(self) -> None:
        """Raises MediaError for a file that is no picture, or no video that can be sampled; URLs are read later."""
        for sources, look in (
            (self.options.image, self.images.image_pixels),
            (self.options.video, lambda video: count_frames(video, "video", self.options.fps)),
        ):
            for source in sources:
                if "://" not in source and not source.startswith("data:"):
                    local_file(source)
                    look(source)

    @property
    def can_go_on(self) -> bool:
        """Whether another question may be asked after one that failed: the videos are encoded."""
        return self.options.chat and (self.features is not None or not (self.options.image or self.options.video))

    def ask(self, question: str) -> dict[str, Any]:
        """The answer to one question, after all that was asked before."""
        options = self.options
        if IMAGE in question:
            raise InputError(f"the question holds {IMAGE}, which stands for a picture; give pictures with --image")
        visuals = len(options.image) + len(options.video)
        template = template_named(options.template)
        # as in the original's command line, only the newest turn holds the visuals
        text = prompt(template, [*self.turns, f"{IMAGE}\n" * visuals + question])
        with self._progress() as bar:
            if options.chat and self.features is None:
                self.features = [self.model.vision_features(frames) for frames in self._visuals(bar)]
            visual = {"pixel_values": [list(self._visuals(bar))]} if not options.chat else {"features": [self.features]}
            if not visuals:
                visual = {}
            out = self.model.generate(
                [encode_with_images(self.model.tokenizer, text)],
                **visual,
                features_have_cls=True,
                prompts=[[question] * visuals],
                **dataclasses.asdict(options.settings),
                streamer=self._write if options.stream else None,
            )
        answer = out.texts[0].strip()
        self.turns += [question, answer.replace(IMAGE, "")]
        return {
            "answer": answer,
            "frames": self.frames,
            "visual_tokens": out.visual_tokens[0],
            "prompt_tokens": out.prompt_tokens[0],
            "new_tokens": len(out.token_ids[0]),
            "seconds": {"load": self.load_seconds, **out.seconds},
        }

    def _write(self, row: int, text: str) -> None:
        print(text, end="", flush=True)

    def _visuals(self, bar: Progress) -> Iterator[Iterable[np.ndarray]]:
        """Frames of every image and video; those of a video are decoded as they are asked for."""
        for image in self.options.image:
            yield self._counted(self.images.image_pixels(image))
        for number, video in enumerate(self.options.video):
            yield self._counted(self._video_frames(number, video, bar))

    def _counted(self, frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        for frame in frames:
            self.frames += 1
            yield frame

    def _video_frames(self, number: int, video: str, bar: Progress) -> Iterator[np.ndarray]:
        task = bar.add_task(f"frames of {video}", total=None)

        def show(seconds: float, total: float | None) -> None:
            if total:
                self._check_length(number, video, total)
                bar.update(task, total=int(total * self.options.fps) + 1)

        for frames, _ in self.images.stream_video(video, self.options.fps, progress=show):
            for frame in frames:
                yield frame
                bar.advance(task)

    def _check_length(self, number: int, video: str, seconds: float) -> None:
        """Says that the videos are too long at the first frame of the one too many, not after its last."""
        self.expected[number] = seconds
        config, total = self.model.config, sum(self.expected.values())
        tokens = int(total * self.options.fps) * config.tokens_per_frame
        room = config.text_config.max_length - self.options.max_new_tokens
        if tokens <= room:
            return
        fps = 0.9 * room / config.tokens_per_frame / total
        remedy = f"--fps {fps:.2g}" if fps >= 0.001 else "a smaller --max-new-tokens"
        raise InputError(
            f"with {video} the videos last {total:.0f} s, at {self.options.fps:g} frames a second {tokens} visual "
            f"tokens; this model has room for {max(room, 0)}: use {remedy} or a long-video checkpoint"
        )

    def _progress(self) -> Progress:
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        return Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)


def questions(options: argparse.Namespace) -> Iterator[str]:
    if options.question:
        yield options.question
    while options.chat:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError as error:
            raise InputError(f"a question on stdin is not UTF-8 ({error}); give it in UTF-8") from None
        if not line:
            return
        if line.strip():
            yield line.strip()


def main(arguments: list[str] | None = None) -> int:
    code = 0
    try:
        options = parse_arguments(arguments)
        if options.compile_only:
            return compile_only(options)
        session = Session(options, Console(stderr=True))
        for question in questions(options):
            try:
                result = session.ask(question)
            except InputError as error:
                code = complain(error, "infer.py")
                if session.can_go_on:
                    continue
                break
            if options.json:
                print(json.dumps(result, ensure_ascii=False), flush=True)
            else:
                print("" if options.stream else result["answer"], flush=True)
    except InputError as error:
        return complain(error, "infer.py")
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read the answers has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return code


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # compiled work may still run after Ctrl-C, and would crash the interpreter's own end
