"""Apache Beam: pipeline options on a command line, and `map` over the workers of a pipeline."""

import argparse
import contextlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from llamavid_jax import buckets, uploads
from llamavid_jax.errors import InputError
from llamavid_jax.files import find, local, write_files

LOCAL = "--runner=DirectRunner"


def add_beam(parser: argparse.ArgumentParser, what: str) -> None:
    text = f"{what} with Apache Beam; the options of its pipeline as one text, --beam='{LOCAL}'"
    parser.add_argument("--beam", nargs="?", const=LOCAL, metavar="OPTIONS", help=text)


def beam_options(flags: str | None) -> Any:
    """The value of --beam -> Beam's PipelineOptions; None -> None.  InputError if Beam is not installed."""
    if flags is None:
        return None
    if not flags.strip().startswith("-"):
        raise InputError(f"--beam is {flags!r}; give the pipeline's options as one text, --beam='{LOCAL}'")
    try:
        from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions
        from apache_beam.runners import create_runner
    except ImportError:
        raise InputError("--beam needs Apache Beam; install it with: pip install apache-beam") from None
    with contextlib.redirect_stderr(io.StringIO()) as said:  # a hundred lines of usage
        try:
            options = PipelineOptions(flags.split())
            options.get_all_options()  # reads them
            create_runner(options.view_as(StandardOptions).runner or "DirectRunner")
        except (SystemExit, Exception) as error:
            reason = said.getvalue().strip().splitlines()[-1] if isinstance(error, SystemExit) else error
            raise InputError(f"--beam={flags}: {reason}") from None
    return options


def beam_map(make: Callable[[], Callable[..., Any]], items: Iterable[tuple], options: Any, file: Path) -> Iterator[Any]:
    """`make()(*item)` for each item, in order.  Each of the pipeline's workers calls `make` once.

    Items and results must be JSON; `make` is pickled, what it returns is not.  The results are passed through `file`,
    which workers see under the same path.  Raises InputError if the pipeline fails.
    """
    import apache_beam as beam
    from apache_beam.utils.shared import Shared

    uploads.remove(file)
    tasks = [json.dumps(task) for task in enumerate(items)]  # ASCII only, whatever the file names contain
    try:
        with beam.Pipeline(options=options) as pipeline:
            results = pipeline | beam.Create(tasks) | beam.Reshuffle() | beam.Map(work, Shared(), make)
            results | beam.combiners.ToList() | beam.Map(keep, buckets.address(file))
    except Exception as error:  # any kind; from other processes, the text of a traceback
        text = str(error).strip()
        reason = text.splitlines()[-1] if "Traceback" in text else " ".join(text.split())
        raise InputError(f"Beam's pipeline failed: {reason.partition(' [while running')[0]}") from None
    if not find(file).is_file():
        raise InputError(f"{file} was not written by Beam's workers; give a folder that they and this process share")
    results = sorted(map(json.loads, file.read_text().splitlines()))  # by their numbers
    uploads.remove(file)
    for _, result, wrong in results:
        if wrong:
            raise InputError(wrong)
        yield result


def work(task: str, shared: Any, make: Callable[[], Callable[..., Any]]) -> str:
    number, item = json.loads(task)
    call = shared.acquire(lambda: made(make))
    wrong = str(call) if isinstance(call, InputError) else ""
    return json.dumps([number, None if wrong else call(*item), wrong])


def made(make: Callable[[], Callable[..., Any]]) -> Callable[..., Any] | InputError:
    try:
        return make()
    except InputError as error:
        return error  # if raised, it would be logged as a traceback and retried for each item


def keep(results: Sequence[str], address: str) -> None:
    file = local(address)
    write_files(file.parent, {file.name: "\n".join(results).encode()})
