"""Writes feature files of many videos, for training and for inference:

    python -m llamavid_jax.commands.features FOLDER "clips/*.mp4" walk.mp4 --model DIR --out FEATURES

A folder stands for all videos in it, at any depth.  FEATURES/NAME.mp4.safetensors is written for each.  Complete files
of the same video, tower and sampling are skipped, so that the same command resumes where it was stopped.  A video that
fails does not stop the others: it is listed in FEATURES/failures.jsonl, and the exit code is then 1.
"""

import argparse
import functools
import glob
import itertools
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llamavid_jax import buckets, uploads
from llamavid_jax.commands import program
from llamavid_jax.commands.options import add_fps, add_model, add_transcribe, check_fps, load_model
from llamavid_jax.commands.processes import add_shard, own_shard, read_shard
from llamavid_jax.data.beam import add_beam, beam_map, beam_options
from llamavid_jax.errors import InputError, Parser, command, printable, say
from llamavid_jax.files import brought, find, local
from llamavid_jax.inference.film_text import film_speech, film_subtitles
from llamavid_jax.media.feature_file import SUFFIX, FeatureWriter, name_of
from llamavid_jax.media.features import describe
from llamavid_jax.media.image_processor import LLaMAVIDLlavaImageProcessor
from llamavid_jax.media.source import VIDEO_ENDINGS, MediaError, local_file
from llamavid_jax.media.speech import SilentError
from llamavid_jax.text.subtitles import Cue, interleave

SUBTITLES = (".srt", ".vtt", ".ass")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="llamavid-features", description="Write feature files of videos.", allow_abbrev=False)
    parser.add_argument("videos", nargs="+", metavar="VIDEO", help="files, folders and patterns such as 'clips/*.mp4'")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder for the feature files")
    add_model(parser)
    add_fps(parser)
    parser.add_argument("--int8", action="store_true", help="half the size; each file states the error")
    parser.add_argument(
        "--subtitles",
        action="store_true",
        help="include subtitles: the .srt, .vtt or .ass file of the same name beside each video",
    )
    add_transcribe(parser, "where none lies beside a video: what is said by its sound")
    add_shard(parser)
    add_beam(parser, "share the work")
    options = parser.parse_args(arguments)
    check_fps(options)
    if options.beam is not None and (options.shard or options.coordinator or options.distributed):
        raise InputError("--beam shares the work among its own workers; give it or --shard and --distributed")
    options.shard = read_shard(options)
    return options


def find_videos(given: Sequence[str]) -> dict[str, Path]:
    """The videos by the name of their feature file, relative to the output.  InputError for a missing one."""
    found: dict[str, Path] = {}
    for text in given:
        path = local(text)
        kind = buckets.kind(path)
        if kind == "directory":
            below = map(Path, buckets.files_below(path))
            videos = {name: path / name for name in below if name.suffix.lower() in VIDEO_ENDINGS}
        elif kind or not glob.has_magic(text):
            videos = {Path(path.name): path}
        elif buckets.url(path):
            videos = {Path(file.name): file for file in buckets.glob(path)}
        else:
            videos = {
                Path(file.name): file for file in map(Path, glob.glob(str(path), recursive=True)) if file.is_file()
            }
        if not videos:
            raise InputError(f"{text} holds no video, such as .mp4; check the spelling and the folder it is in")
        for name, file in videos.items():
            key = f"{name}{SUFFIX}"
            if key in found and found[key] != file and not os.path.samefile(found[key], file):
                raise InputError(
                    f"{found[key]} and {file} would both be written to {key}; give each an --out of its own"
                )
            found[key] = file
    return dict(sorted(found.items()))


class Extractor:
    """Writes the feature files of videos."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.images = images = LLaMAVIDLlavaImageProcessor.from_pretrained(options.model)
        program.keep_programs()
        self.model = model = load_model(options)
        self.fps, self.without = images.rate(options.fps), set()  # videos without subtitles
        self.dtype = "I8" if options.int8 else "F16" if model.dtype == "float32" else name_of(model.dtype)

    def __call__(self, number: str, name: str, video: str) -> dict[str, Any]:
        """Reports on a video; returns its line for failures.jsonl, or None, and whether it lacks subtitles."""
        started, path, error = time.perf_counter(), local(video), None
        try:
            frames = self.write(path, local(self.options.out) / name)
            seconds = time.perf_counter() - started
            done = f"{frames} frames in {seconds:.1f} s, {frames / seconds:.0f} a second" if frames else "there already"
        except InputError as failure:
            done, error = str(failure), json.dumps({"video": printable(path), "error": str(failure)})
        say(f"{number} {path}: {done}")
        return {"error": error, "without": path in self.without}

    def write(self, video: Path, file: Path) -> int:
        """Writes a feature file; returns the number of frames, 0 if it exists.  Raises InputError and OSError."""
        from llamavid_jax.inference.sources import description, version, video_key  # JAX takes seconds to import

        path, cues = local_file(video), self._cues(video)
        before, key = version(path), video_key(path, self.fps, self.model, self.images)
        made_as = {"key": key, "stored": self.dtype, "said": [list(cue) for cue in cues or ()]}
        hear = cues is None and self.options.transcribe
        made_as |= {"heard": hear} if hear else {}
        if self._is_there(file, made_as):
            return 0
        if hear:
            cues = self._heard(video)
        plans: list[Any] = []
        pieces = self.images.stream_video(video, self.fps, progress=lambda plan, _: plans.append(plan))
        frames = itertools.chain.from_iterable(pixels for pixels, _ in pieces)
        writer = None
        try:
            for chunk in self.model.feature_chunks(frames):
                writer = writer or FeatureWriter(file, len(plans[0]), self.dtype, json.dumps(cues))
                for frame in chunk:
                    writer.add(frame)
            if version(path) != before:
                raise MediaError(f"{video} was written to while it was read; try it again")
            inputs = interleave(plans[0].times, cues) if cues is not None else None
            writer.commit(description(video, key, plans[0], self.model, inputs), made_as=made_as)
            return writer.frames
        finally:
            if writer is not None:
                writer.discard()

    def _cues(self, video: Path) -> list[Cue] | None:
        if not self.options.subtitles:
            return None
        beside = (video.with_suffix(case) for suffix in SUBTITLES for case in (suffix, suffix.upper()))
        file = next((file for file in beside if find(file).exists()), None)
        if file is None:
            self.without.add(video)
        return file and film_subtitles(str(file), video)

    def _heard(self, video: Path) -> list[Cue]:
        try:
            return film_speech(video, self.options.transcribe)
        except SilentError as error:
            say(str(error))
            return []

    def _is_there(self, file: Path, made_as: dict[str, Any]) -> bool:
        try:
            return find(file).exists() and (describe(file) or {}).get("made_as") == made_as
        except MediaError:
            return False  # damaged: written again


@command("llamavid-features")
def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    pipeline = beam_options(options.beam)
    index, count = own_shard(options)
    videos = list(find_videos(options.videos).items())[index::count]
    out = local(options.out)
    log = out / ("failures.jsonl" if count == 1 else f"failures.{index}-of-{count}.jsonl")
    tasks = [(f"{number}/{len(videos)}", name, str(video)) for number, (name, video) in enumerate(videos, 1)]
    if pipeline is None:
        outcomes = itertools.starmap(Extractor(options), tasks)
    else:  # workers may be other machines
        LLaMAVIDLlavaImageProcessor.from_pretrained(options.model)  # reports a wrong folder
        options.model, options.out = buckets.address(brought(Path(options.model))), buckets.address(out)
        tasks = [(number, name, buckets.address(brought(Path(video)))) for number, name, video in tasks]
        outcomes = beam_map(functools.partial(Extractor, options), tasks, pipeline, out / ".outcomes.jsonl")
    try:
        out.mkdir(parents=True, exist_ok=True)
        uploads.remove(log)
    except OSError as error:
        raise InputError(f"{out} cannot be written to ({error.strerror}); give a folder that can") from None
    failures = without = 0
    with uploads.sending(log):
        for outcome in outcomes:
            without += outcome["without"]
            if outcome["error"]:
                failures += 1
                with log.open("a", encoding="utf-8") as file:
                    print(outcome["error"], file=file)
    if without:
        say(f"{without} of {len(videos)} videos have no {', '.join(SUBTITLES)} of their name beside them")
    if failures:
        say(f"{failures} of {len(videos)} videos failed; {log} names them")
    return int(failures > 0)


def run() -> None:
    """Runs `main` as a process."""
    program.run(main)


if __name__ == "__main__":
    sys.exit(main())
