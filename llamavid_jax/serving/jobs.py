"""What the engine takes and returns: jobs, their state while they run, and the pieces of their answers."""

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
    """Log-probabilities `[n]` of an answer's ids, and the most likely ids `[n, K]` at each position with theirs."""

    chosen: list[float]
    likely: list[list[int]]
    values: list[list[float]]


@dataclasses.dataclass(frozen=True)
class Piece:
    """The new text of an answer.  `finish` is None before its end, then "stop", "length" or "error".

    If the job wants them, the last piece also has `evidence` `[N]`, the answer's attention to each visual token, and
    the `scores` of the answer's `ids`.
    """

    text: str
    tokens: int  # so far
    finish: str | None = None
    evidence: np.ndarray | None = None
    ids: Sequence[int] = ()
    scores: Scores | None = None


@dataclasses.dataclass(eq=False)
class Job:
    """A request for one answer.  `on_piece` is called in the engine's thread and must return at once.

    Set `cancelled` if the answer is no longer wanted: its slot is then free within a block.
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
    """A job with a slot: it has its prompt's keys and values during prefill, its text after that."""

    job: Job
    slot: int
    text: RowText
    size: int  # padded length of the prompt in the batch: one of `Engine.sizes`
    prompt: KeysValues | None = None
    token: jax.Array | None = None  # [1], the answer's first, once the whole prompt was run
    start: int = 0  # positions of the prompt that have been run
    new: int = 0  # ids of the answer that have been processed
