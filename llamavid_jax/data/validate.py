"""Checks training data before a run: lists missing, unreadable, malformed and oversized samples in a table.

    python -m llamavid_jax.data.validate DATA.json --media DIR [--model DIR --max-tokens 2048] [--decode] [--json FILE]

    missing     the media file does not exist
    unreadable  it exists, but cannot be opened (or, with --decode, decoded to its end)
    malformed   the record or its conversation cannot be used, or has no tokens to train on
    oversized   it has more tokens after expansion than --max-tokens, by default the model's number of positions

A summary by kind follows: samples, frames, seconds, tokens.  The exit code is 1 if something is broken, 2 for wrong
arguments.  Without --model, conversations are checked but not tokenised, and features are not compared with a model's.
Threads check a few hundred records at a time, so that memory does not grow with the data.
"""

import argparse
import collections
import dataclasses
import json
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from llamavid_jax.config.schema import LLaMAVIDLlavaConfig
from llamavid_jax.data.examples import ExampleReader
from llamavid_jax.data.labels import check_template
from llamavid_jax.data.record import DataError, Record
from llamavid_jax.data.records import decode, find_media, media_file, media_size, read_records
from llamavid_jax.errors import CheckpointError, InputError, Parser, command, printable
from llamavid_jax.files import local, write_files
from llamavid_jax.media.features import check_made_by, check_rate, describe, processing, read_header
from llamavid_jax.media.images import check_picture
from llamavid_jax.media.source import MediaError
from llamavid_jax.media.timeline import check_fps
from llamavid_jax.text.conversation import ConversationError
from llamavid_jax.text.tokenizer import JsonTokenizer, load_tokenizer

SHOWN = 50  # rows of the table; --json writes all of them
CHUNK = 256  # records under way at a time


@dataclasses.dataclass(frozen=True)
class Check:
    """The result for one sample: its size, and its problem, if any."""

    index: int
    id: str
    kind: str = ""
    media: str | None = None
    problem: str = ""
    reason: str = ""
    frames: int = 0
    tokens: int = 0


class NoTokenizer(JsonTokenizer):
    """In place of a model's tokenizer: its texts have no tokens."""

    def __init__(self):
        self.bos_id = self.eos_id = self.pad_id = 0

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        return []


class Validator:
    """Checks single records, and against a model where the fields below `reader` are set."""

    def __init__(self, reader: ExampleReader, fps: float, decode_all: bool):
        self.reader, self.fps, self.decode_all = reader, fps, decode_all
        self.frame_shape: tuple[int, int] | None = None  # (P, E) of ready features
        self.max_tokens: int | None = None
        self.takes_features = True
        self.tower: Callable[[], str] | None = None  # returns its hash
        self.prepared: dict[str, Any] = {}  # the preprocessing of frames for it

    def __call__(self, records: Sequence, index: int) -> Check:
        """Never raises for a bad sample."""
        try:
            record = records[index]
        except InputError as error:
            return Check(index, str(index), problem="malformed", reason=str(error))
        check = Check(index, record.id, record.kind, record.media)
        try:
            self._check_medium(record)
            frames, tokens = self._check_text(record, index)
        except CheckpointError:  # of the model, not of the sample
            raise
        except MediaError as error:
            there = record.data is not None or os.path.exists(find_media(record))
            return dataclasses.replace(check, problem="unreadable" if there else "missing", reason=str(error))
        except InputError as error:
            return dataclasses.replace(check, problem="malformed", reason=str(error))
        check = dataclasses.replace(check, frames=frames, tokens=tokens)
        if self.max_tokens is not None and tokens > self.max_tokens:
            reason = f"{tokens} tokens; shorten it, or raise the limit of {self.max_tokens}"
            return dataclasses.replace(check, problem="oversized", reason=reason)
        return check

    def _check_medium(self, record: Record) -> None:
        if record.kind == "text":
            return
        with media_file(record) as path:
            if self.decode_all:
                for _ in decode(path, record.kind, self.fps):
                    pass
            elif record.kind == "image":
                check_picture(path)
            if record.kind == "features" and not self.takes_features:
                raise DataError(
                    f"{path} holds features, which are trained without CLS, and this model makes a token of CLS "
                    "(mm_vision_select_feature cls_patch); give the video"
                )
            if record.kind == "features" and self.frame_shape:
                header = read_header(path)
                if (header.patches, header.width) != self.frame_shape:
                    raise DataError(
                        f"{path} holds {header.patches} patches of {header.width} numbers a frame, the model takes "
                        f"{self.frame_shape[0]} of {self.frame_shape[1]}; make the features with its own tower"
                    )
            made = describe(path) if record.kind == "features" else None
            try:
                if made and self.tower:
                    check_made_by(record.media, made, self.tower(), self.prepared)
                if made:
                    check_rate(record.media, made, self.fps)
            except MediaError as error:
                raise DataError(str(error)) from None

    def _check_text(self, record: Record, index: int) -> tuple[int, int]:
        """The number of frames, and of tokens after expansion if there is a tokenizer, else 0."""
        text, frames = self.reader.text(record, index), media_size(record, self.fps)
        if self.max_tokens is None:  # no model
            return frames, 0
        if text.ignored:
            raise ConversationError(f"no token of it would be trained: {text.ignored}")
        return frames, self.reader.expanded_length(text.input_ids, len(text.prompts), frames)


def check_all(validator: Validator, records: Sequence) -> Iterator[Check]:
    """The checks of all records, in their order."""
    with ThreadPoolExecutor() as threads:
        for start in range(0, len(records), CHUNK):
            indices = range(start, min(start + CHUNK, len(records)))
            yield from threads.map(validator, [records] * len(indices), indices)


class Report:
    """Counts by kind, and all problems."""

    def __init__(self, fps: float):
        self.fps = fps
        self.kinds: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        self.problems: list[Check] = []
        self.ids: collections.Counter[int] = collections.Counter()  # by their hashes, which are smaller

    def add(self, check: Check) -> None:
        if check.problem:
            self.problems.append(check)
        self.kinds[check.kind or "?"].update(
            samples=1, broken=bool(check.problem), frames=check.frames, tokens=check.tokens
        )
        self.ids[hash(check.id)] += 1

    def summary(self) -> dict[str, Any]:
        rows = {}
        for kind, counts in sorted(self.kinds.items()):
            rows[kind] = {name: counts[name] for name in ("samples", "broken", "frames", "tokens")}
            rows[kind]["seconds"] = round(counts["frames"] / self.fps, 1) if kind in ("video", "features") else 0
        return {
            "kinds": rows,
            "problems": dict(collections.Counter(check.problem for check in self.problems)),
            "repeated_ids": sum(count > 1 for count in self.ids.values()),
        }

    def show(self, console: Console) -> None:
        summary = self.summary()
        if self.problems:
            table = Table(title="Problems", title_justify="left")
            for name in ("index", "id", "problem", "reason"):
                table.add_column(name, overflow="fold")
            for check in self.problems[:SHOWN]:
                cells = (check.index, check.id, check.problem, check.reason)
                table.add_row(*(Text(printable(str(cell))) for cell in cells))
            console.print(table)
            if len(self.problems) > SHOWN:
                console.print(f"... and {len(self.problems) - SHOWN} more: --json FILE writes them all")
        table = Table(title="Summary", title_justify="left")
        columns = ("samples", "broken", "frames", "seconds", "tokens")
        for name in ("kind", *columns):
            table.add_column(name, justify="left" if name == "kind" else "right")
        for kind, counts in summary["kinds"].items():
            table.add_row(kind, *(f"{counts[name]:,}" for name in columns))
        console.print(table)
        if summary["repeated_ids"]:
            console.print(
                f"{summary['repeated_ids']:,} ids stand for several samples: log files cannot tell them apart"
            )
        found = ", ".join(f"{count:,} {problem}" for problem, count in summary["problems"].items())
        console.print(f"{len(self.problems):,} samples are broken: {found}" if found else "No sample is broken.")


@command()
def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = Parser(prog="llamavid_jax.data.validate", description="Check training data.", allow_abbrev=False)
    parser.add_argument("path", metavar="JSON", help="LLaVA-format .json or .jsonl, or a folder of shards")
    parser.add_argument("--media", default="", metavar="DIR", help="folder that the paths are relative to (the JSON's)")
    parser.add_argument("--template", default="imgsp_v1", help="conversation format (imgsp_v1)")
    parser.add_argument("--fps", type=float, default=1.0, help="frames sampled per second of video (1)")
    parser.add_argument(
        "--model",
        metavar="DIR",
        help="checkpoint folder: its tokenizer counts the tokens, and features must come from its tower",
    )
    parser.add_argument(
        "--max-tokens", type=int, metavar="N", help="longer samples are oversized (the model's positions)"
    )
    parser.add_argument("--decode", action="store_true", help="decode all media completely, not only their headers")
    parser.add_argument("--json", metavar="FILE", help="write the summary and all problems to this file")
    options = parser.parse_args(arguments)
    check_fps(options.fps, "the data")
    if options.max_tokens is not None and (options.model is None or options.max_tokens < 1):
        parser.error(f"--max-tokens {options.max_tokens} needs a number above 0 and --model, to count tokens")
    config = LLaMAVIDLlavaConfig.from_pretrained(options.model) if options.model else None
    validator = Validator(_reader(options, config), options.fps, options.decode)
    if config is not None:
        vision = config.vision_tower_config
        validator.frame_shape = (vision.num_patches, vision.hidden_size)
        validator.takes_features = config.tokens_of(has_cls=False) == config.tokens_per_frame
        validator.max_tokens = options.max_tokens or config.text_config.max_length
        validator.tower = _tower(options.model, config)
        validator.prepared = processing(vision.image_size, vision.image_mean, vision.image_std)
    records = read_records(options.path, options.media)
    report = Report(options.fps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a sample whose labels are ignored is in the report
        checks = check_all(validator, records)
        for check in track(checks, "Checking", len(records), console=Console(stderr=True), transient=True):
            report.add(check)
    report.show(Console())  # before the file is written, which may fail: the checks may have taken hours
    if options.json:
        full = report.summary() | {"broken": [dataclasses.asdict(check) for check in report.problems]}
        file = local(options.json)
        write_files(file.parent, {file.name: json.dumps(full, indent=1).encode()})
    return int(bool(report.problems))


def _tower(model: str, config: LLaMAVIDLlavaConfig) -> Callable[[], str]:
    """A function for the hash of the model's tower; the first thread that calls it reads the weights."""
    lock, known = threading.Lock(), []

    def tower() -> str:
        from llamavid_jax.checkpoints.tower import stored_tower  # JAX takes seconds to import

        with lock:
            known.extend([] if known else [stored_tower(model, config)])
        return known[0]

    return tower


def _reader(options: argparse.Namespace, config: LLaMAVIDLlavaConfig | None) -> ExampleReader:
    if config is None:  # sizes of frames and tokens do not matter then
        return ExampleReader(NoTokenizer(), options.template, 1, "crop", 2, options.fps, seed=0)
    tokenizer = load_tokenizer(options.model, config.added_tokens)
    check_template(options.template, tokenizer)
    return ExampleReader(
        tokenizer,
        options.template,
        config.vision_tower_config.image_size,
        config.image_aspect_ratio,
        config.tokens_per_frame,
        options.fps,
        seed=0,
        image_mean=config.vision_tower_config.image_mean,
        start_end=config.mm_use_im_start_end,
    )


if __name__ == "__main__":
    sys.exit(main())
