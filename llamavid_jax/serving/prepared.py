"""A row that is ready for the engine, the visuals in it, and which of their frames an answer rests on."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from llamavid_jax.shapes import Row

Look = Callable[[np.ndarray, str], np.ndarray]  # features [F, P, E] and a question -> attention [F, S, S]
LOOKED_AT = 8  # frames of a part for which maps of the question's attention are returned


class Shown(NamedTuple):
    """An image or a video: the cache key of its features, the features `[F, P, E]`, and its frames' times `[F]`."""

    key: tuple
    features: np.ndarray
    times: np.ndarray


class Visual(NamedTuple):
    """One visual of a row: which part of the messages it is, what it shows, its visual tokens, and its question."""

    part: int
    shown: Shown
    tokens: int  # how many
    question: str


class Prepared(NamedTuple):
    """A row, the table `[N, D]` of its visual tokens, and its visuals in order."""

    row: Row
    table: np.ndarray
    visuals: list[Visual]

    def rests_on(self, weights: np.ndarray, look: Look) -> list[dict[str, Any]]:
        """Attention `[N]` to the row's visual tokens -> for each part its frames' shares, and maps of the top frames.

        A map shows where the part's last question looks in a frame.  The turns of a chat that show the same part count
        together; all shares sum to 1.
        """
        parts: dict[int, np.ndarray] = {}
        last: dict[int, Visual] = {}
        for one in self.visuals:
            own, weights = weights[: one.tokens].reshape(len(one.shown.times), -1).sum(1), weights[one.tokens :]
            parts[one.part], last[one.part] = parts.get(one.part, 0) + own, one
        total = sum(float(own.sum()) for own in parts.values()) or 1.0
        found = []
        for part, own in sorted(parts.items()):
            strongest = np.sort(np.argsort(own)[-LOOKED_AT:])
            maps = look(last[part].shown.features[strongest], last[part].question)
            seconds = last[part].shown.times.round(3).tolist()
            looked = [
                {"second": seconds[place], "attention": where.round(4).tolist()}
                for place, where in zip(strongest, maps, strict=True)
            ]
            shares = (own / total).round(6).tolist()
            found.append({"part": part, "seconds": seconds, "weights": shares, "looked": looked})
        return found
