"""LLaMA-VID in JAX and Flax NNX.  The public classes load on first use, so that importing the package costs nothing."""

import importlib
from typing import Any

_HOMES = {
    "LLaMAVIDLlavaConfig": "config.schema",
    "LLaMAVIDLlavaVisionConfig": "config.schema",
    "LLaMAVIDLlavaQFormerConfig": "config.schema",
    "LLaMAVIDLlavaImageProcessor": "media.image_processor",
    "LLaMAVIDLlavaProcessor": "inference.processor",
    "LLaMAVIDLlavaForConditionalGeneration": "inference.model",
}
__all__ = list(_HOMES)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"llamavid_jax has no {name!r}; it has {', '.join(_HOMES)}")
    return getattr(importlib.import_module(f"llamavid_jax.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
