"""Which vision tower features are of: a hash of its weights, and what its pixels went through."""

import dataclasses
import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax.numpy as jnp
import numpy as np

from llamavid_jax.media.image_processor import LLaMAVIDLlavaImageProcessor

PREFIX = "vision."  # of the tower's parameters


class TowerHash:
    """SHA-256 of a model's tower, configuration and weights; worked out once for the same arrays."""

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
                for digest in _digests(np.asarray(array), dtype or array.dtype):
                    whole.update(digest)
            self._known[dtype] = whole.hexdigest()
        return self._known[dtype]


def _digests(array: np.ndarray, dtype: Any) -> list[bytes]:
    """One for each layer of stacked weights, each in a thread: 2 GB of ViT-g are read at the speed of all cores."""

    def digest(part: np.ndarray) -> bytes:
        return hashlib.sha256(part.astype(dtype).tobytes()).digest()

    with ThreadPoolExecutor() as threads:
        return list(threads.map(digest, array if array.ndim > 1 else [array]))


def processing(images: LLaMAVIDLlavaImageProcessor) -> dict[str, Any]:
    """What a video's frames go through before the tower, for a feature file and for the key of a stored one."""
    return {"size": images.size, "mean": list(images.image_mean), "std": list(images.image_std), "aspect": "crop"}
