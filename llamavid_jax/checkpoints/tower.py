"""Which vision tower features are of: a hash of its weights."""

import dataclasses
import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

PREFIX = "vision."  # of the tower's parameters


class TowerHash:
    """SHA-256 of a model's tower, configuration and weights; worked out once for the same arrays.

    `model` has `params` and a `config`.  Where several processes share the weights all of them ask for it.
    """

    def __init__(self, model: Any):
        self._model, self._arrays = model, []
        self._known: dict[Any, str] = {}

    def exact(self) -> str:
        """Of the weights as they are."""
        return self._of(None)

    def rounded(self) -> str:
        """Of the weights rounded to bfloat16: the same whatever type they were loaded as."""
        return self._of(jnp.dtype("bfloat16"))

    def _of(self, dtype: Any) -> str:
        params = self._model.params
        names = sorted(name for name in params if name.startswith(PREFIX))
        arrays = [params[name] for name in names]
        if len(arrays) != len(self._arrays) or any(a is not b for a, b in zip(arrays, self._arrays, strict=True)):
            self._arrays, self._known = arrays, {}
        if dtype not in self._known:
            vision = dataclasses.asdict(self._model.config.vision_tower_config)
            whole = hashlib.sha256(json.dumps(vision, sort_keys=True).encode())
            for name, array in zip(names, arrays, strict=True):
                whole.update(f"{name} {array.shape} {dtype or array.dtype}".encode())
                for digest in _digests(_whole(array), dtype or array.dtype):
                    whole.update(digest)
            self._known[dtype] = whole.hexdigest()
        return self._known[dtype]


def _whole(array: jax.Array) -> np.ndarray:
    is_here = array.is_fully_addressable or array.is_fully_replicated
    return np.asarray(array if is_here else multihost_utils.process_allgather(array, tiled=True))


def _digests(array: np.ndarray, dtype: Any) -> list[bytes]:
    """One for each layer of stacked weights, each in a thread: 2 GB of ViT-g are read at the speed of all cores."""

    def digest(part: np.ndarray) -> bytes:
        return hashlib.sha256(part.astype(dtype).tobytes()).digest()

    with ThreadPoolExecutor() as threads:
        return list(threads.map(digest, array if array.ndim > 1 else [array]))
