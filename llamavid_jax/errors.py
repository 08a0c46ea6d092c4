"""The one base of every error that bad input causes, and how commands say it: one line, and exit code 2."""

import argparse
import contextlib
import functools
import io
import os
import sys
from collections.abc import Callable
from typing import Any

EXTRAS = {  # module → extra; the others are of `train`
    **dict.fromkeys(("starlette", "uvicorn", "multipart", "prometheus_client"), "serve"),
    **dict.fromkeys(("requests", "openpyxl", "pyarrow"), "eval"),
    **dict.fromkeys(("torch", "gguf"), "convert"),
    **dict.fromkeys(("matplotlib", "sklearn"), "demo"),
    "faster_whisper": "speech",
    "libtpu": "tpu",
    "gcsfs": "gcs",
}
LONGEST = 3000  # characters of an error that a command says; names and values from files may have any number
AWAY = 75  # the exit code of what may go well when it is run again, as in sysexits.h
SHOWN: dict[str, str] = {}  # how paths begin, and what is said in place of that (`buckets.py`)


class InputError(ValueError):
    """Input that cannot be used.  The message names the thing, the value and the remedy.

    Names of files and replies of servers stand in it: what would command a terminal is written as an escape.
    """

    def __init__(self, message: object = ""):
        super().__init__(printable(message))


class ConfigError(InputError):
    """A configuration that cannot be used: names the field, its value and the remedy."""


class CheckpointError(InputError):
    """Weights, an adapter or a run's checkpoint that cannot be used: names the file, what is wrong and the remedy."""


class TrainingError(InputError):
    """A run that cannot go on: says at which step, why, and what to do."""


class OutageError(Exception):
    """What is needed is away for now, such as a bucket.  No InputError: what it holds is not to be left out as bad."""

    def __init__(self, message: object = ""):
        super().__init__(printable(message))


class Parser(argparse.ArgumentParser):
    """Arguments that cannot be read are bad input as any other: one line, without the usage.

    Of a `description`, such as a module's docstring, which `python -OO` leaves out, `--help` shows the first paragraph.
    """

    def __init__(self, *, description: str | None = None, **arguments: Any):
        super().__init__(description=(description or "").split("\n\n")[0], **arguments)

    def error(self, message: str):
        raise InputError(message)


def command(name: str = "error") -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Makes a function of arguments a command: its streams are usable, bad input is one line, Ctrl-C a code."""

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
            except OSError as error:  # which nobody expected: of stdout, whose reader has gone or whose disk is full
                with contextlib.suppress(OSError):  # else what is left of the output would be tried again at the end
                    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                return 141 if isinstance(error, BrokenPipeError) else complain(InputError(str(error)), name)

        return run

    return decorate


def complain(error: Exception, command: str = "error") -> int:
    """Says the error as one line that begins with `command`; returns the exit code."""
    text = " ".join(str(error).split())
    say(f"{command}: {text if len(text) <= LONGEST else f'{text[:-400][: LONGEST - 400]} ... {text[-400:]}'}")
    return 2


def say(text: str) -> None:
    """Prints to stderr.  What cannot be said there, because it is closed or its disk is full, ends no command."""
    if sys.stderr is not None:  # closed: print would take stdout in its place
        with contextlib.suppress(OSError):
            print(printable(text, kept="\n"), file=sys.stderr, flush=True)


def printable(text: object, kept: str = "") -> str:
    """`text` with all that a terminal would obey, and half surrogate pairs, written out: "\\x1b[2J".

    Names of files and answers of servers may hold anything; the characters of `kept` stay.
    """
    text = str(text)
    for path, address in SHOWN.items():
        text = text.replace(path, address)
    return "".join(
        letter if letter.isprintable() or letter in kept else letter.encode("unicode_escape").decode()
        for letter in text
    )


def first_line(error: BaseException) -> str:
    """Of the error that the others were raised from: it names the file and what is wrong with it."""
    while error.__cause__ is not None:
        error = error.__cause__
    line = (str(error).strip().splitlines() or ["no message"])[0]
    return line if len(line) <= 300 else f"{line[:150]} ... {line[-145:]}"  # what is wrong often stands at its end


def open_streams() -> None:
    """Makes the standard streams usable: those that are closed lead nowhere from now on.

    Else the next file that is opened would take their place.  Text that a stream cannot hold is escaped.
    """
    for name in ("stdin", "stdout", "stderr"):  # in the order of their numbers: a file gets the lowest that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")


def was_closed(stream: Any) -> bool:
    """Whether `open_streams` found it so."""
    return getattr(stream, "name", None) == os.devnull
