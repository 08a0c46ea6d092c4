"""Evaluate a model on a set, compare two results, make the page of results:

    llamavid-evaluate --model DIR --set gqa --data FOLDER --out runs/gqa
    llamavid-evaluate score runs/gqa                  # scores existing answers, without the model or the data
    llamavid-evaluate compare runs/gqa runs/gqa-int8
    llamavid-evaluate results docs/results.md runs/*

The same command resumes a run that was stopped.  Bad input ends with exit code 2 and one line.
"""

import argparse
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from llamavid_jax import buckets, uploads
from llamavid_jax.commands import program
from llamavid_jax.commands.processes import add_shard, own_shard, read_shard
from llamavid_jax.errors import InputError, Parser, command, printable, say
from llamavid_jax.evaluation.compare import compare
from llamavid_jax.evaluation.folder import opened
from llamavid_jax.evaluation.identity import data_identity, model_identity, settings, versions
from llamavid_jax.evaluation.items import Item, Row
from llamavid_jax.evaluation.judge import MODEL, ModelJudge, OfflineJudge
from llamavid_jax.evaluation.results import page
from llamavid_jax.evaluation.score import RESULT, score_folder, table
from llamavid_jax.evaluation.sets import SETS
from llamavid_jax.evaluation.store import Store, gather, open_store, part_name
from llamavid_jax.files import find, local, write_files

REPLIES = "judge_replies.jsonl"
SAY_EVERY = 60.0  # seconds between progress lines if stderr is no terminal


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(prog="llamavid-evaluate", description="Evaluate a model on a set.", allow_abbrev=False)
    parser.add_argument("--model", required=True, metavar="DIR", help="a converted checkpoint")
    parser.add_argument("--set", required=True, choices=SETS, dest="name", help="the evaluation set")
    parser.add_argument("--data", required=True, metavar="FOLDER", help="the set's official folder, as downloaded")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="for answers, scores and submission files")
    parser.add_argument("--limit", type=int, metavar="N", help="ask only the first N questions")
    add_shard(parser)
    parser.add_argument("--retry", action="store_true", help="ask the broken questions again")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="questions answered together (8)")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="data type of the weights (bfloat16)"
    )
    parser.add_argument("--quantize", choices=["int8", "int4"], help="quantize the weights as they are loaded")
    parser.add_argument("--mesh", default="", metavar="AXIS=N", help="shard over devices, such as tensor=4")
    parser.add_argument("--like-original", action="store_true", help="use the original's sampling, rules and bugs")
    add_judge(parser)
    options = parser.parse_args(arguments)
    options.shard = read_shard(options)
    for name in ("limit", "batch"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}; give a whole number of 1 or more")
    return options


def add_judge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--judge", metavar="URL", help="an OpenAI-compatible address, such as https://api.openai.com/v1"
    )
    parser.add_argument("--judge-model", default=MODEL, metavar="NAME", help=f"its model ({MODEL}, the paper's)")
    parser.add_argument(
        "--judge-key-env",
        default="OPENAI_API_KEY",
        metavar="NAME",
        help="the variable that holds its key (OPENAI_API_KEY)",
    )


def judge_of(options: argparse.Namespace, out: Path) -> Any:
    if not options.judge:
        return OfflineJudge()
    key = os.environ.get(options.judge_key_env, "").strip()
    if not (key.isascii() and key.isprintable()):  # requests' error message would show the key
        raise InputError(f"the key in {options.judge_key_env} has characters that no key has; set it again")
    return ModelJudge(options.judge, key, options.judge_model, out / REPLIES)


# ---- answers


def evaluate(arguments: list[str]) -> int:
    options = parse_arguments(arguments)
    one, out = SETS[options.name], local(options.out)
    judge_of(options, out)  # reports a wrong judge option now, not after all answers
    options.shard = own_shard(options)
    items, rest = read(options)
    header = {
        "set": options.name,
        "like_original": options.like_original,
        "settings": settings(one, Path(options.model), options.like_original, options.dtype, options.quantize),
        "model": identity_of(options.model),
        "data": data_identity(items),
        "shard": list(options.shard),
        "versions": versions(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    groups = groups_of(items, options)
    rest = [{**row, "index": len(items) + place, "media": None} for place, row in enumerate(rest)]
    references = {item.id: item.reference for item in items}
    with open_store(out / part_name(options.shard), header, rest, options.retry, references) as store:
        left = [[pair for pair in group if pair[1].id not in store.done] for group in groups]
        left = [group for group in left if group]
        if left:
            answer(options, header["settings"], left, store)
        if store.broken:
            say(f"{store.broken} questions are broken and count as wrong; their rows say why, --retry asks them again")
    if store.outdated:
        return wait_for(store.outdated, options)
    if options.shard != (0, 1) and not is_whole(out, options.shard[1], len(items[: options.limit])):
        say("part {}/{} is answered; the last part to end scores all".format(*options.shard))
        return 0
    return show(scored(out, None, options))


def identity_of(model: str) -> dict[str, str]:
    """The model's identity; a status line says what takes so long, as hashing 16 GB does."""
    with Console(stderr=True).status(Text(printable(f"reading {model} for its SHA-256"))):
        return model_identity(model)


def read(options: argparse.Namespace) -> tuple[list[Item], list[Row]]:
    """The questions of the set.  InputError if no image or video is there; reports missing ones."""
    one, folder = SETS[options.name], opened(options.data)
    try:
        items, rest = one.read(folder, options.like_original)
    except InputError:
        raise
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        raise InputError(
            f"{folder} is not in the official form of {one.title} ({error!r}); download it again"
        ) from None
    if not items:
        raise InputError(f"{folder} holds no question of {one.title}; is it the right folder?")
    files = {item.media for item in items if isinstance(item.media, Path)}
    lost = sorted(file for file in files if not buckets.kind(file))
    if lost and len(lost) == len(files):
        raise InputError(f"none of the {len(files)} pictures and videos of {one.title} is there, such as {lost[0]}")
    if lost:
        say(f"{len(lost)} of {len(files)} pictures and videos are missing and break their questions: {lost[0]}")
    return items, rest


def groups_of(items: list[Item], options: argparse.Namespace) -> list[list[tuple[int, Item]]]:
    """The questions for this process, grouped by image or video, each with its index in the set."""
    from llamavid_jax.evaluation.answers import by_media

    items = items[: options.limit]
    part, count = options.shard
    return [[(place, items[place]) for place in group] for group in by_media(items)[part::count]]


def answer(
    options: argparse.Namespace, asked: dict[str, Any], groups: list[list[tuple[int, Item]]], store: Store
) -> None:
    from llamavid_jax import LLaMAVIDLlavaForConditionalGeneration, LLaMAVIDLlavaImageProcessor
    from llamavid_jax.evaluation.answers import Asker
    from llamavid_jax.parallel.mesh import local_mesh, parse_mesh

    program.keep_programs()
    mesh = local_mesh(**parse_mesh(options.mesh)) if options.mesh else None
    images = LLaMAVIDLlavaImageProcessor.from_pretrained(options.model)
    console, total = Console(stderr=True), sum(map(len, groups))
    with console.status(Text(printable(f"loading {options.model}"))):
        model = LLaMAVIDLlavaForConditionalGeneration.from_pretrained(
            options.model, dtype=options.dtype, mesh=mesh, quantize=options.quantize
        )
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bar:
        task, started = bar.add_task("questions", total=total), time.monotonic()
        done, said = 0, started

        def write(rows: list[Row]) -> None:
            nonlocal done, said
            store.write(rows)
            done += len(rows)
            bar.update(task, completed=done, description=f"questions, {store.broken} broken")
            now = time.monotonic()
            if not console.is_terminal and (done == total or now - said > SAY_EVERY):
                said, left = now, (now - started) / done * (total - done)
                say(f"{done} of {total} questions, {store.broken} broken, {left / 60:.0f} min left")

        Asker(model, images, asked, options.batch, write).ask(groups)


def wait_for(outdated: Sequence[Path], options: argparse.Namespace) -> int:
    """Scores nothing while parts are outdated: a score of some questions would look like one of all."""
    told = f"{outdated[0].name} does not know the annotations that are in {options.data} now; call that part again, "
    told += "with its own --shard (answers.jsonl has none)"
    if options.shard == (0, 1):
        raise InputError(told)
    say(told)
    return 0


def is_whole(out: Path, count: int, asked: int) -> bool:
    """Whether all parts exist and together have answered the first `asked` questions."""
    files = [out / part_name((part, count)) for part in range(count)]
    if not all(find(file).exists() for file in files):
        return False
    return sum(row["text"] is not None and row["index"] < asked for row in gather(out)[1]) == asked


# ---- scores


def score(arguments: list[str]) -> int:
    parser = Parser(prog="llamavid-evaluate score", description="Score existing answers.", allow_abbrev=False)
    parser.add_argument("out", metavar="FOLDER", help="the --out of an evaluation")
    rules = parser.add_mutually_exclusive_group()
    rules.add_argument("--like-original", action="store_true", default=None, help="score by the original's rules")
    rules.add_argument("--by-default", action="store_false", dest="like_original", help="score by the default rules")
    add_judge(parser)
    options = parser.parse_args(arguments)
    out = find(options.out)
    return show(scored(out, options.like_original, options))


def scored(out: Path, like_original: bool | None, options: argparse.Namespace) -> dict[str, Any]:
    with uploads.sending(out):  # uploads the judge's replies if `out` is in a bucket
        return score_folder(out, like_original, judge_of(options, out))


def show(result: dict[str, Any]) -> int:
    print(table(result))
    return 0


def compared(arguments: list[str]) -> int:
    parser = Parser(prog="llamavid-evaluate compare", description="Compare two results of a set.", allow_abbrev=False)
    parser.add_argument("first", metavar="A", help="the folder of a scored evaluation")
    parser.add_argument("second", metavar="B")
    parser.add_argument("--json", metavar="FILE", help="also write the whole comparison")
    options = parser.parse_args(arguments)
    text, outcome = compare(options.first, options.second)
    if options.json:
        file = local(options.json)
        write_files(file.parent, {file.name: (json.dumps(outcome, indent=1, ensure_ascii=False) + "\n").encode()})
    print(text)
    return 0


def results(arguments: list[str]) -> int:
    parser = Parser(prog="llamavid-evaluate results", description="Make the page of results.", allow_abbrev=False)
    parser.add_argument("page", metavar="FILE", help="such as docs/results.md")
    parser.add_argument("runs", nargs="*", metavar="RUN", help=f"folders that hold {RESULT}, or such files")
    options = parser.parse_args(arguments)
    file = local(options.page)
    write_files(file.parent, {file.name: page(options.runs).encode()})
    return 0


@command("llamavid-evaluate")
def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    others = {"score": score, "compare": compared, "results": results}
    if arguments and arguments[0] in others:
        return others[arguments[0]](arguments[1:])
    return evaluate(arguments)


def run() -> None:
    """`main` in a process of its own."""
    program.run(main)
