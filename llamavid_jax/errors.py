"""The one base of every error that bad input causes: commands print it as one line and exit with 2."""

import argparse


class InputError(ValueError):
    """Input that cannot be used.  The message names the thing, the value and the remedy."""


class Parser(argparse.ArgumentParser):
    """Arguments that cannot be read are bad input as any other: one line, without the usage."""

    def error(self, message: str):
        raise InputError(message)
