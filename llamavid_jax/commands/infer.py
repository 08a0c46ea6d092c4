"""Ask LLaMA-VID about videos and images:

    python infer.py --model DIR --video FILE_OR_URL --question "What happens?"

The answer goes to stdout, progress to stderr.  Bad input ends with exit code 2 and one line that says what to do.
`--chat` reads one question per line and encodes the video only once.
"""

import argparse
import contextlib
import dataclasses
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from llamavid_jax import uploads
from llamavid_jax.commands import program
from llamavid_jax.commands.options import (
    add_cache,
    add_film,
    add_fps,
    add_model,
    add_settings,
    check_film,
    check_fps,
    checked,
    load_model,
    read_cache,
    read_settings,
)
from llamavid_jax.errors import InputError, Parser, command, complain, printable, say, was_closed
from llamavid_jax.files import local, write_files
from llamavid_jax.inference.film_text import film_speech
from llamavid_jax.media.features import is_features
from llamavid_jax.media.image_processor import LLaMAVIDLlavaImageProcessor
from llamavid_jax.media.source import is_url, local_file
from llamavid_jax.media.video import plan_video

MOST_EVIDENCE = 10  # frames in --json, those with the most weight first
# the original's command line, except for the seed; an explicit option overrides these
LIKE_ORIGINAL = {"template": "llava_v1", "temperature": 0.2, "top_p": 0.7, "image_aspect_ratio": "crop"}


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = Parser(prog="infer.py", description="Ask LLaMA-VID about videos and images.", allow_abbrev=False)
    add_model(parser)
    parser.add_argument(
        "--video", action="append", default=[], metavar="FILE|URL", help="a video or its features; may be repeated"
    )
    parser.add_argument("--image", action="append", default=[], metavar="FILE|URL", help="may be repeated")
    add_film(parser)
    parser.add_argument("--question", help="what to ask; with --chat the first question")
    parser.add_argument("--chat", action="store_true", help="read further questions from stdin, one per line")
    add_fps(parser)
    parser.add_argument("--fit", action="store_true", help="lower --fps if a video is too long for the model")
    parser.add_argument(
        "--fast-sampling", action="store_true", help="use the key frame nearest to each sampled frame: much faster"
    )
    parser.add_argument("--partial", action="store_true", help="answer about the readable part of a damaged video")
    add_settings(parser)
    add_cache(parser)
    parser.add_argument(
        "--like-original",
        action="store_true",
        help="like the original's command line: template llava_v1, images cropped, temperature 0.2 and top-p 0.7, in a "
        "chat only the newest question has the visuals; explicit options override these",
    )
    parser.add_argument("--stream", action="store_true", help="print the answer as it is generated")
    parser.add_argument(
        "--evidence", metavar="FILE", help="draw the frames of the video that the answer rests on; --json lists them"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object for each answer")
    parser.add_argument("--compile-only", action="store_true", help="compile for --topology and stop")
    parser.add_argument("--topology", metavar="NAME", help="TPU generation and chips, such as v5e:1x1")
    parser.add_argument("--tokens", type=int, metavar="N", help="tokens of the compiled prompt, with frames (3584)")
    parser.set_defaults(**{"image_aspect_ratio": None} | (LIKE_ORIGINAL if "--like-original" in arguments else {}))
    options = parser.parse_args(arguments)
    if options.compile_only != bool(options.topology):
        parser.error("--compile-only and --topology go together, such as --compile-only --topology v5e:1x1")
    if options.tokens is not None and (options.tokens < 1 or not options.compile_only):
        parser.error(f"--tokens is {options.tokens}; give the length of the prompt to compile, with --compile-only")
    # reports errors now, not after minutes of loading
    options.settings = read_settings(options)
    if options.compile_only:
        return options
    options.question = checked((options.question or "").strip(), "--question")
    if not options.question and not options.chat:
        parser.error("there is no question; give --question TEXT or --chat")
    if options.stream and options.json:
        parser.error("--stream and --json exclude each other; give one of them")
    check_fps(options)
    options.cache = read_cache(options)
    ready = next(filter(is_features, options.video), None)
    if ready and (options.fast_sampling or options.partial or options.fit):
        parser.error(f"{ready} holds features, whose frames are chosen; --fast-sampling, --partial, --fit read a video")
    check_film(options)
    if options.evidence is not None:
        if not options.evidence.endswith(".png"):
            parser.error(f"--evidence is {options.evidence}; give a FILE.png")
        if is_features(options.video[0]):
            parser.error(f"--evidence draws frames, and {options.video[0]} holds features alone; give the video")
        options.evidence = local(options.evidence)
        write_files(options.evidence.parent, {})  # InputError if it is not writable
    return options


def compile_only(options: argparse.Namespace) -> int:
    """Compiles the programs for a slice that need not be attached; `--model` may be a file of configs/models/."""
    from llamavid_jax import LLaMAVIDLlavaConfig
    from llamavid_jax.precompile.infer import check_inference
    from llamavid_jax.precompile.report import show
    from llamavid_jax.precompile.topology import in_own_process

    read = LLaMAVIDLlavaConfig.from_yaml if options.model.endswith(".yaml") else LLaMAVIDLlavaConfig.from_pretrained
    config = read(options.model)
    config = config.quantized(options.quantize) if options.quantize else config
    arguments = (
        options.topology,
        options.mesh,
        options.tokens or 3584,
        options.max_new_tokens,
        options.dtype,
        options.model,
    )
    return show(in_own_process(check_inference, config, *arguments, options.kv_cache))


def image_processor(options: argparse.Namespace) -> LLaMAVIDLlavaImageProcessor:
    """The image processor.  Checks all files: MediaError for one that is no image, or no video that can be sampled.

    URLs are read later.
    """
    processor = LLaMAVIDLlavaImageProcessor.from_pretrained(options.model)
    if options.image_aspect_ratio:
        processor = dataclasses.replace(processor, image_aspect_ratio=options.image_aspect_ratio)
    fps = processor.rate(options.fps) if options.video else None
    partial = (lambda _: None) if options.partial else None  # the session reports it
    for sources, look in (
        (options.image, processor.image_pixels),
        (options.video, lambda video: is_features(video) or plan_video(video, fps, partial)),
    ):
        for source in sources:
            if not is_url(source):
                local_file(source)
                look(source)
    return processor


def start_session(options: argparse.Namespace, console: Console) -> Any:
    """Loads the model and starts the conversation."""
    images = image_processor(options)  # before minutes of loading, and before JAX is imported
    if options.transcribe:
        with console.status(Text(printable(f"listening to {options.video[0]}"))):
            options.subtitles = film_speech(options.video[0], options.transcribe)
        if not options.subtitles:
            say(f"{options.video[0]}: nothing is said that {options.transcribe} could hear")
    from llamavid_jax.inference.film import Reading
    from llamavid_jax.inference.session import Session

    with console.status(Text(printable(f"loading {options.model}"))):
        model = load_model(options)
    return Session(
        model,
        images,
        images=options.image,
        videos=options.video,
        subtitles=options.subtitles,
        times=options.times,
        fps=options.fps,
        reading=Reading(options.fast_sampling, options.partial, options.fit),
        template=options.template,
        follow_ups=options.chat,
        like_original=options.like_original,
        cache=options.cache,
        notice=say,
    )


@contextlib.contextmanager
def progress_bar(console: Console, session: Any) -> Iterator[Callable[[Any, int, int | None], None]]:
    """A bar for each video if stderr is a terminal: stage, frames, speed against real time, time left."""
    stage = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, ratio=1))
    speed, times = TextColumn("{task.fields[speed]}"), (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    columns = stage, BarColumn(10), MofNCompleteColumn(), speed, *times
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, expand=True, disable=hidden) as bar:
        tasks: dict[str, Any] = {}

        def show(video: Any, done: int, total: int | None) -> None:
            name = printable(str(video))
            if done == 1 or name not in tasks:
                tasks[name] = bar.add_task(f"decoding and encoding {name}", total=total, speed="")
            task = bar.tasks[bar.task_ids.index(tasks[name])]
            seconds = next(
                (session.visuals.times.get(n) for n, one in enumerate(session.visuals.videos) if one is video), None
            )
            speed = f"{seconds[-1] / task.elapsed:.0f}x" if seconds and task.elapsed else ""
            bar.update(task.id, completed=done, total=total, speed=speed)
            if done == total:
                bar.update(task.id, description=f"answering about {name}")

        yield show


def draw_evidence(session: Any, question: str, answer: Any, file: Path, number: int) -> None:
    """Writes one image for each answer of a chat: FILE.png, FILE-2.png, ..."""
    from llamavid_jax.inference.evidence import draw

    if number > 1:
        file = file.with_stem(f"{file.stem}-{number}")
    try:
        draw(session, question, answer).save(file)
        uploads.put(file)
    except OSError as error:
        raise InputError(f"{file} cannot be written ({error.strerror}); give another --evidence FILE.png") from None
    say(f"{file}: what the answer rests on")


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


def write(text: str) -> None:
    """Writes to stdout; on a terminal, control characters are escaped."""
    try:
        print(printable(text, kept="\n\t") if sys.stdout.isatty() else text, end="", flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OSError(f"stdout cannot be written ({error.strerror}); send it elsewhere") from None


@command("infer.py")
def main(arguments: list[str] | None = None) -> int:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that downloads are deleted
    options = parse_arguments(arguments)
    if was_closed(sys.stdout):
        raise InputError("stdout is closed, and the answer goes there; leave it open, or give > FILE")
    if options.compile_only:
        return compile_only(options)
    if options.chat and was_closed(sys.stdin):
        raise InputError("stdin is closed, and --chat reads its questions there; leave it open, or leave out --chat")
    console, start, code, answered = Console(stderr=True), time.perf_counter(), 0, 0
    program.keep_programs()
    session = start_session(options, console)
    loaded = time.perf_counter() - start
    for question in questions(options):
        try:
            checked(question, "the question on stdin")
            with progress_bar(console, session) as session.visuals.progress:
                evidence = options.evidence is not None
                answer = session.ask(question, write if options.stream else None, evidence, **options.settings)
        except InputError as error:
            code = complain(error, "infer.py")
            if options.chat and (session.features is not None or not (options.image or options.video)):
                continue
            break
        answered += 1
        if options.evidence:
            draw_evidence(session, question, answer, options.evidence, answered)
        if options.json:
            result = dataclasses.asdict(answer)
            frames = result.pop("evidence")
            result = {"answer": result.pop("text"), **result, "seconds": {"load": loaded, **answer.seconds}}
            if frames:
                result["evidence"] = sorted(frames, key=lambda frame: -frame["weight"])[:MOST_EVIDENCE]
            is_utf8 = "utf" in (sys.stdout.encoding or "utf-8").lower()
            write(json.dumps(result, ensure_ascii=not is_utf8) + "\n")
        else:
            write("\n" if options.stream else answer.text + "\n")
    return code


def run() -> None:
    """Runs `main` as a process."""
    program.run(main)
