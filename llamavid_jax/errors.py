"""The one base of every error that bad input causes: commands print it as one line and exit with 2."""


class InputError(ValueError):
    """Input that cannot be used.  The message names the thing, the value and the remedy."""
