"""What the engine is given, keeps of it while it works, and tells as it comes."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from llamavid_jax.inference.request import Settings
from llamavid_jax.inference.stopping import RowText
from llamavid_jax.models.kv_cache import KeysValues
from llamavid_jax.shapes import Row


class Scores(NamedTuple):
    """Log-probabilities `[n]` of an answer's ids, the most likely ids `[n, K]` in their places, and theirs."""

    chosen: list[float]
    likely: list[list[int]]
    values: list[list[float]]


@dataclasses.dataclass(frozen=True)
class Piece:
    """What is new of an answer.  `finish` is None before its end, then "stop", "length" or "error".

    With the last one of a job that wants them come `evidence` `[n]`, the answer's attention to each visual token, and
    `scores` of the answer's `ids`.
    """

    text: str
    tokens: int  # so far
    finish: str | None = None
    evidence: np.ndarray | None = None
    ids: Sequence[int] = ()
    scores: Scores | None = None


@dataclasses.dataclass(eq=False)
class Job:
    """One answer that is wanted.  `on_piece` is called in the engine's thread and must return at once.

    Whoever no longer wants it sets `cancelled`: its slot is then free within a block.
    """

    row: Row
    table: np.ndarray  # [N, D], which the row's visual_index points into
    settings: Settings
    on_piece: Callable[[Piece], None]
    evidence: bool = False
    scores: bool = False
    cancelled: bool = False


@dataclasses.dataclass(eq=False)
class Running:
    """A job with a slot: its prompt's keys and values while it is prefilled, its text after that."""

    job: Job
    slot: int
    text: RowText
    size: int  # positions of the prompt as the batch keeps it: one of `Engine.sizes`
    prompt: KeysValues | None = None
    token: jax.Array | None = None  # [1], the answer's first behind the whole prompt
    start: int = 0  # positions of the prompt that have been run
    new: int = 0  # ids of the answer that have been looked at
