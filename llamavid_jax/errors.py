"""The one base of every error that bad input causes, and how commands say it: one line, and exit code 2."""

import argparse
import sys


class InputError(ValueError):
    """Input that cannot be used.  The message names the thing, the value and the remedy.

    Names of files and replies of servers stand in it: what would command a terminal is written as an escape.
    """

    def __init__(self, message: object = ""):
        super().__init__(printable(message))


def printable(text: object) -> str:
    """`text` with control characters and what UTF-8 cannot hold as escapes; line breaks stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in str(text))


class ConfigError(InputError):
    """A configuration that cannot be used: names the field, its value and the remedy."""


class Parser(argparse.ArgumentParser):
    """Arguments that cannot be read are bad input as any other: one line, without the usage."""

    def error(self, message: str):
        raise InputError(message)


def complain(error: InputError, command: str = "error") -> int:
    """Prints the error to stderr as one line that begins with `command`; returns the exit code."""
    print(f"{command}: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
