"""A hash of a vision tower's weights, which tells what tower stored features come from."""

import dataclasses
import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from llamavid_jax.checkpoints.arrays import Arrays
from llamavid_jax.checkpoints.weights import abstract_params, check_params, weights_folder
from llamavid_jax.config.schema import LLaMAVIDLlavaConfig
from llamavid_jax.files import find
from llamavid_jax.parallel.mesh import host_mesh

PREFIX = "vision."  # of the tower's parameters


class TowerHash:
    """SHA-256 of a model's tower, configuration and weights; computed once for the same arrays.

    `model` has `params` and a `config`.  Where several processes share the weights, all of them must call it.
    """

    def __init__(self, model: Any):
        self._model, self._arrays = model, []
        self._known: dict[Any, str] = {}

    def exact(self) -> str:
        """The hash of the weights as they are."""
        return self._of(None)

    def rounded(self) -> str:
        """The hash of the weights rounded to bfloat16: the same whatever dtype they were loaded as."""
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


def stored_tower(directory: str | Path, config: LLaMAVIDLlavaConfig) -> str:
    """`TowerHash.rounded` of a checkpoint folder; only the tower is read.  Raises CheckpointError."""
    stored, wanted = Arrays(weights_folder(find(directory))), abstract_params(config, "bfloat16", host_mesh())
    held, wanted = ({path: one[path] for path in one if path.startswith(PREFIX)} for one in (stored, wanted))
    check_params(stored.folder, held, {path: leaf.shape for path, leaf in wanted.items()})
    params = {path: stored.restore(path, leaf) for path, leaf in wanted.items()}
    return TowerHash(SimpleNamespace(params=params, config=config)).rounded()


def _whole(array: jax.Array) -> np.ndarray:
    is_here = array.is_fully_addressable or array.is_fully_replicated
    return np.asarray(array if is_here else multihost_utils.process_allgather(array, tiled=True))


def _digests(array: np.ndarray, dtype: Any) -> list[bytes]:
    """One for each layer of stacked weights, each in a thread: 2 GB of ViT-g are read at the speed of all cores."""

    def digest(part: np.ndarray) -> bytes:
        return hashlib.sha256(part.astype(dtype).tobytes()).digest()

    with ThreadPoolExecutor() as threads:
        return list(threads.map(digest, array if array.ndim > 1 else [array]))
