"""Reads a judge's reply, as the original does or by default.

read_original   the whole reply is a Python literal, kept as JSON
read_leniently  the first dictionary in the reply
"""

import ast
import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from llamavid_jax.files import LITERAL

LONGEST = 10_000  # characters; a longer reply is not read


class Verdict(NamedTuple):
    """A judge's verdict.  `yes` is None if only a score was requested, or the reply says neither yes nor no."""

    yes: bool | None
    score: float
    reply: Any  # as read


class UnreadError(Exception):
    """An unusable reply.  `is_final`: the original does not request another, and crashes at this one later."""

    def __init__(self, is_final: bool = False):
        self.is_final = is_final


def literal(reply: str) -> Any:
    """The Python literal that the whole reply is, converted to JSON types; UnreadError if it is none."""
    if len(reply) > LONGEST:
        raise UnreadError
    try:
        with LITERAL:
            value = ast.literal_eval(reply)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise UnreadError from None
    try:
        return json.loads(json.dumps(value))
    except (ValueError, TypeError, RecursionError):  # a set or bytes
        raise UnreadError(is_final=True) from None


def first_literal(reply: str) -> Any:
    """The first dictionary in a reply: in code fences, after a sentence, in Python or JSON.

    Also with two single quotes, as in the example of Video-ChatGPT's messages: "{''score': 4.8}".
    """
    reply = reply.rpartition("</think>")[2]  # a model's thoughts may quote the messages' example
    if len(reply) > LONGEST or "<think>" in reply:
        raise UnreadError
    for found in re.findall(r"\{[^{}]*\}", reply):
        for read, text in (
            (ast.literal_eval, found),
            (json.loads, found),
            (ast.literal_eval, found.replace("''", "'")),
        ):
            try:
                with LITERAL:
                    value = read(text)
                value = json.loads(json.dumps(value))
            except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
                continue
            if isinstance(value, dict):
                return value
    raise UnreadError


def read_original(reply: str, keys: Sequence[str] = (), needs_word: bool = True) -> Verdict:
    """As the original: the whole reply a literal, the score truncated to an integer, "yes" or "no" within the word.

    `keys` are the possible names of the word, empty if only a score was requested.  Without `needs_word` a word that is
    neither leaves only the score.
    """
    value = literal(reply)
    try:
        score = float(int(value["score"]))  # a number too large for a float stops the original too
        if not keys:
            return Verdict(None, score, value)
        word = value[next((key for key in keys if key in value), keys[-1])].lower()
        yes = True if "yes" in word else False if "no" in word else None
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        raise UnreadError(is_final=True) from None
    if yes is None and needs_word:
        raise UnreadError(is_final=True)
    return Verdict(yes, score, value)


def read_leniently(reply: str, keys: Sequence[str] = ()) -> Verdict:
    """By default: the first dictionary in the reply, its score from 0 to 5 as it is, and yes, no, true or false."""
    value = {str(key).lower(): one for key, one in first_literal(reply).items()}
    try:
        score = float(value["score"])
    except (KeyError, TypeError, ValueError, OverflowError):
        raise UnreadError from None
    if not 0 <= score <= 5 or isinstance(value["score"], bool):  # also rejects NaN
        raise UnreadError
    if not keys:
        return Verdict(None, score, value)
    words = str(next((value[key] for key in keys if key in value), "")).lower()
    said = {word in ("yes", "true") for word in re.findall(r"\b(?:yes|no|true|false)\b", words)}
    if len(said) != 1:
        raise UnreadError
    return Verdict(said.pop(), score, value)
