"""LLaMA-VID in JAX and Flax NNX.  The public classes load on first use, so that importing the package costs nothing.

model = LLaMAVIDLlavaForConditionalGeneration.from_pretrained(FOLDER)
session = Session(model, LLaMAVIDLlavaImageProcessor.from_pretrained(FOLDER), videos=["walk.mp4"])
print(session.ask("What happens?").text)
"""

import gc
import importlib
from typing import Any

from llamavid_jax import auto

_HOMES = {
    "LLaMAVIDLlavaConfig": "config.schema",
    "LLaMAVIDLlavaVisionConfig": "config.schema",
    "LLaMAVIDLlavaQFormerConfig": "config.schema",
    "LLaMAVIDLlavaImageProcessor": "media.image_processor",
    "LLaMAVIDLlavaProcessor": "inference.processor",
    "LLaMAVIDLlavaForConditionalGeneration": "inference.model",
    "Session": "inference.session",
}
__all__ = list(_HOMES)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"llamavid_jax has no {name!r}; it has {', '.join(_HOMES)}")
    collects = gc.isenabled()
    gc.disable()  # imported objects stay alive; collecting garbage meanwhile takes a quarter of the import's time
    try:
        return getattr(importlib.import_module(f"llamavid_jax.{_HOMES[name]}"), name)
    finally:
        if collects:
            gc.enable()


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]


auto.install()
