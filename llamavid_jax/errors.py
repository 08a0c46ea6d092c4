"""The base class of every error that bad input causes, and how commands report it: one line, and exit code 2."""

import argparse
import contextlib
import functools
import io
import os
import sys
from collections.abc import Callable
from typing import Any

EXTRAS = {  # module → extra; all others are in `train`
    **dict.fromkeys(("starlette", "uvicorn", "multipart", "prometheus_client"), "serve"),
    **dict.fromkeys(("requests", "openpyxl", "pyarrow"), "eval"),
    **dict.fromkeys(("torch", "gguf"), "convert"),
    **dict.fromkeys(("matplotlib", "sklearn"), "demo"),
    "faster_whisper": "speech",
    "libtpu": "tpu",
    "gcsfs": "gcs",
}
LONGEST = 3000  # characters of a reported error; names and values from files may have any number
AWAY = 75  # exit code where running again may succeed; EX_TEMPFAIL in sysexits.h
SHOWN: dict[str, str] = {}  # prefix of local paths → the bucket address shown instead (`buckets.py`)


class InputError(ValueError):
    """Input that cannot be used.  The message names the thing, the value and the remedy.

    It may contain file names and server replies, so terminal control characters are escaped.
    """

    def __init__(self, message: object = ""):
        super().__init__(printable(message))


class ConfigError(InputError):
    """A configuration that cannot be used: names the field, its value and the remedy."""


class CheckpointError(InputError):
    """Weights, an adapter or a run's checkpoint that cannot be used: names the file, what is wrong and the remedy."""


class TrainingError(InputError):
    """A run that cannot continue: names the step, the reason and the remedy."""


class OutageError(Exception):
    """Something needed, such as a bucket, is unreachable for now.  No InputError: its data are not to be skipped."""

    def __init__(self, message: object = ""):
        super().__init__(printable(message))


class Parser(argparse.ArgumentParser):
    """Reports unreadable arguments like other bad input: in one line, without the usage.

    `--help` shows the first paragraph of `description`, usually a module's docstring (None under `python -OO`).
    """

    def __init__(self, *, description: str | None = None, **arguments: Any):
        super().__init__(description=(description or "").split("\n\n")[0], **arguments)

    def error(self, message: str):
        raise InputError(message)


def command(name: str = "error") -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Decorates a command's `main`: makes streams usable, reports bad input in one line, gives Ctrl-C an exit code."""

    def decorate(main: Callable[..., int]) -> Callable[..., int]:
        @functools.wraps(main)
        def run(arguments: list[str] | None = None) -> int:
            open_streams()
            try:
                code = main(arguments)
                sys.stdout.flush()
                return code
            except InputError as error:
                return complain(error, name)
            except OutageError as error:
                complain(error, name)
                return AWAY
            except ModuleNotFoundError as error:
                extra = EXTRAS.get((error.name or "").partition(".")[0], "train")
                return complain(InputError(f'{error.name} is not installed; pip install "llamavid_jax[{extra}]"'), name)
            except KeyboardInterrupt:
                return 130
            except OSError as error:  # handled nowhere else: stdout's reader has gone or its disk is full
                with contextlib.suppress(OSError):  # else Python would try to write the rest again at exit
                    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                return 141 if isinstance(error, BrokenPipeError) else complain(InputError(str(error)), name)

        return run

    return decorate


def complain(error: Exception, command: str = "error") -> int:
    """Prints the error as one line that begins with `command`; returns the exit code."""
    text = " ".join(str(error).split())
    say(f"{command}: {text if len(text) <= LONGEST else f'{text[:-400][: LONGEST - 400]} ... {text[-400:]}'}")
    return 2


def say(text: str) -> None:
    """Prints to stderr.  If stderr is closed or its disk is full, the text is lost but the command continues."""
    if sys.stderr is not None:  # None if closed: print would use stdout instead
        with contextlib.suppress(OSError):
            print(printable(text, kept="\n"), file=sys.stderr, flush=True)


def printable(text: object, kept: str = "") -> str:
    """`text` with control characters and lone surrogates escaped, such as "\\x1b[2J".

    File names and server replies may hold anything; the characters of `kept` stay.
    """
    text = str(text)
    for path, address in SHOWN.items():
        text = text.replace(path, address)
    return "".join(
        letter if letter.isprintable() or letter in kept else letter.encode("unicode_escape").decode()
        for letter in text
    )


def first_line(error: BaseException) -> str:
    """The first line of the root cause, which names the file and what is wrong with it."""
    while error.__cause__ is not None:
        error = error.__cause__
    line = (str(error).strip().splitlines() or ["no message"])[0]
    return line if len(line) <= 300 else f"{line[:150]} ... {line[-145:]}"  # the reason is often at its end


def open_streams() -> None:
    """Makes the standard streams usable: closed ones are opened on `os.devnull`.

    Otherwise the next file opened would get their descriptor.  Characters that a stream cannot encode are escaped.
    """
    for name in ("stdin", "stdout", "stderr"):  # in the order of their descriptors: a file gets the lowest free one
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")


def was_closed(stream: Any) -> bool:
    """Whether `open_streams` found the stream closed."""
    return getattr(stream, "name", None) == os.devnull
