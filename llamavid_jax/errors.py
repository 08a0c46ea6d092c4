"""The one base of every error that bad input causes, and how commands say it: one line, and exit code 2."""

import argparse
import contextlib
import io
import os
import sys


class InputError(ValueError):
    """Input that cannot be used.  The message names the thing, the value and the remedy."""


class ConfigError(InputError):
    """A configuration that cannot be used: names the field, its value and the remedy."""


class CheckpointError(InputError):
    """Weights, an adapter or a run's checkpoint that cannot be used: names the file, what is wrong and the remedy."""


class Parser(argparse.ArgumentParser):
    """Arguments that cannot be read are bad input as any other: one line, without the usage."""

    def error(self, message: str):
        raise InputError(message)


def complain(error: InputError, command: str = "error") -> int:
    """Prints the error to stderr as one line that begins with `command`; returns the exit code."""
    if sys.stderr is not None:  # closed: print would take stdout in its place
        with contextlib.suppress(OSError):
            print(printable(f"{command}: {' '.join(str(error).split())}"), file=sys.stderr, flush=True)
    return 2


def printable(text: str, kept: str = "") -> str:
    """`text` with all that a terminal would obey, and half surrogate pairs, written out: "\\x1b[2J".

    Names of files and answers of servers may hold anything; the characters of `kept` stay.
    """
    return "".join(
        letter if letter.isprintable() or letter in kept else letter.encode("unicode_escape").decode()
        for letter in text
    )


def open_streams() -> set[str]:
    """Makes the standard streams usable: those that are closed, whose names it returns, lead nowhere from now on.

    Else the next file that is opened would take their place.  Text that a stream cannot hold is escaped.
    """
    closed = [name for name in ("stdin", "stdout", "stderr") if getattr(sys, name) is None]
    for name in closed:  # in the order of their numbers: a file gets the lowest that is free
        setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    return set(closed)
