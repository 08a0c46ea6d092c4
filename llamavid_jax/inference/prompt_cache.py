"""Keeps a prompt's keys and values for the next prompt, which begins in the same way.

    row     system │ question 1, its frames' tokens │ answer 1 │ question 2, ...
    next    system │ question 1, its frames' tokens │ answer 1 │ question 2, ... │ answer 2 │ question 3, ...
            ───────────────────────── in the cache ──────────────────────────────┘

Text is the same if its ids are equal, visual tokens if they are the same array object: a conversation passes the
arrays of earlier questions again.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from llamavid_jax.models.kv_cache import KeysValues
from llamavid_jax.shapes import TEXT, Row


class PromptCache:
    """For one conversation; `model.generate(..., cache=cache)` reads and fills it."""

    def __init__(self):
        self._blocks: Sequence[np.ndarray] = ()  # held, so that no other array gets the id of one of them
        self._signature: Int[np.ndarray, "2 T"] = np.zeros((2, 0), np.int64)
        self._keys_values: KeysValues | None = None

    def take(self, row: Row, blocks: Sequence[np.ndarray]) -> tuple[int, KeysValues] | None:
        """How many first positions of `row` are cached, and their keys and values, which leave the cache.

        None if there are none.  `row.visual_index` indexes the concatenated `blocks`, one array `[n, D]` a placeholder.
        """
        keys_values, self._keys_values = self._keys_values, None
        if keys_values is None:
            return None
        new, old = _signature(row, blocks), self._signature
        # the last position is always run: it gives the first token of the answer
        length = min(new.shape[1] - 1, old.shape[1])
        differ = np.flatnonzero((new[:, :length] != old[:, :length]).any(axis=0))
        shared = int(differ[0]) if len(differ) else length
        return (shared, keys_values) if shared else None

    def put(self, row: Row, blocks: Sequence[np.ndarray], keys_values: KeysValues) -> None:
        """Stores the keys and values of `row` in place of the previous ones."""
        self._blocks, self._signature, self._keys_values = tuple(blocks), _signature(row, blocks), keys_values


def _signature(row: Row, blocks: Sequence[np.ndarray]) -> Int[np.ndarray, "2 T"]:
    """For every position: its array (0 for text), and the text's token id or the index in the array."""
    sizes = [len(block) for block in blocks]
    owners = np.repeat(np.array([id(block) for block in blocks], np.int64), sizes)
    places = np.concatenate([np.arange(size) for size in sizes] or [np.zeros(0, np.int64)])
    visual = row.visual_index != TEXT
    signature = np.stack([np.zeros(len(visual), np.int64), row.token_ids.astype(np.int64)])
    signature[:, visual] = np.stack([owners, places])[:, row.visual_index[visual]]
    return signature
