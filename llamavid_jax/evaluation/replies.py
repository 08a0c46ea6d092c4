"""What a judge's reply says: as the original reads it, and by default.

read_original   the whole reply a Python literal, kept as JSON
read_leniently  the first dictionary in it
"""

import ast
import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from llamavid_jax.files import LITERAL

LONGEST = 10_000  # characters of a reply that is read


class Verdict(NamedTuple):
    """What a judge said.  `yes` is None where only a score is asked for, or where neither was said."""

    yes: bool | None
    score: float
    reply: Any  # as it was read


class UnreadError(Exception):
    """A reply that cannot be used.  `is_final`: the original does not ask again, and stops at it later."""

    def __init__(self, is_final: bool = False):
        self.is_final = is_final


def literal(reply: str) -> Any:
    """The Python literal that a whole reply is, as the file of judgements holds it; UnreadError for any other."""
    if len(reply) > LONGEST:
        raise UnreadError
    try:
        with LITERAL:
            value = ast.literal_eval(reply)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise UnreadError from None
    try:
        return json.loads(json.dumps(value))
    except (ValueError, TypeError, RecursionError):  # a set, bytes
        raise UnreadError(is_final=True) from None


def first_literal(reply: str) -> Any:
    """The first dictionary in a reply: between code fences, behind a sentence, in Python's or JSON's words.

    Also with the two quotes of the example in Video-ChatGPT's messages: "{''score': 4.8}".
    """
    reply = reply.rpartition("</think>")[2]  # what a model thinks quotes the messages' example
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
    """As the original: the whole reply a literal, the score as a whole number, "yes" or "no" anywhere in the word.

    `keys` are those that the word may have, none where only a score is asked for.  Without `needs_word` a word that is
    neither leaves only the score.
    """
    value = literal(reply)
    try:
        score = float(int(value["score"]))  # one too long for a float stops the original too
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
    """By default: the first dictionary in the reply, a score from 0 to 5 as it stands, and words that say yes or no."""
    value = {str(key).lower(): one for key, one in first_literal(reply).items()}
    try:
        score = float(value["score"])
    except (KeyError, TypeError, ValueError, OverflowError):
        raise UnreadError from None
    if not 0 <= score <= 5 or isinstance(value["score"], bool):  # also what is no number
        raise UnreadError
    if not keys:
        return Verdict(None, score, value)
    words = str(next((value[key] for key in keys if key in value), "")).lower()
    said = {word in ("yes", "true") for word in re.findall(r"\b(?:yes|no|true|false)\b", words)}
    if len(said) != 1:
        raise UnreadError
    return Verdict(said.pop(), score, value)
