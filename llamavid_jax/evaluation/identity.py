"""What identifies a result: the model by a hash of its files, the questions, the settings, the versions."""

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import llamavid_jax
from llamavid_jax.buckets import listing, url
from llamavid_jax.errors import InputError
from llamavid_jax.evaluation.items import Item
from llamavid_jax.evaluation.sets import Set
from llamavid_jax.files import find, read_object

PACKAGES = "jax", "jaxlib", "flax", "numpy", "av", "pillow"
TEMPLATE = "vicuna_v1"
FPS = 1.0
# Sampling of the original's video scripts.  What they do not pass has the checkpoint's default; these are the defaults
# of the published checkpoints and of transformers.
TEMPERATURE, TOP_P, TOP_K = 0.2, 0.6, 50


def settings(one: Set, model: Path, original: bool, dtype: str, quantize: str | None) -> dict[str, Any]:
    """How the questions of a set are asked."""
    sampled = original and one.original_samples
    sampling: dict[str, Any] = {"temperature": 0.0, "top_p": 1.0, "top_k": 0}
    if sampled:
        sampling = {"temperature": TEMPERATURE, "top_p": TOP_P, "top_k": TOP_K} | _checkpoint_defaults(model)
    return {
        **sampling,
        "max_new_tokens": one.max_new_tokens,
        "template": TEMPLATE,
        "fps": FPS,
        "image_aspect_ratio": "crop" if original and one.original_crops else "as the checkpoint says",
        "dtype": dtype,
        "quantize": quantize,
    }


def _checkpoint_defaults(model: Path) -> dict[str, Any]:
    """top_p and top_k from the checkpoint's generation_config.json, if it has one."""
    folder = find(model)
    try:
        values = read_object(folder / "generation_config.json")
    except (OSError, ValueError):
        return {}
    return {name: values[name] for name in ("top_p", "top_k") if isinstance(values.get(name), int | float)}


def model_identity(folder: str | Path) -> dict[str, str]:
    """A checkpoint's name, and one SHA-256 over the names and contents of all its files."""
    root = find(folder)
    if url(root):  # hashes the objects' versions instead of their contents, which are not on disk
        objects = sorted(listing(root).items())
        return {"name": root.name, "sha256": hashlib.sha256(json.dumps(objects).encode()).hexdigest()}
    files = sorted(path for path in root.rglob("*") if path.is_file()) if root.is_dir() else []
    if not files:
        raise InputError(f"--model {folder} holds no file; give the folder of a converted checkpoint")

    def digest(path: Path) -> bytes:
        with path.open("rb") as content:
            return path.relative_to(root).as_posix().encode() + hashlib.file_digest(content, "sha256").digest()

    with ThreadPoolExecutor(8) as pool:
        total = hashlib.sha256(b"".join(pool.map(digest, files)))
    return {"name": root.resolve().name, "sha256": total.hexdigest()}


def data_identity(items: Sequence[Item]) -> dict[str, Any]:
    """A hash of the questions, without their images and videos."""
    lines = [[item.id, item.text, item.question] for item in items]
    return {"questions": len(items), "sha256": hashlib.sha256(json.dumps(lines).encode()).hexdigest()}


def media_name(item: Item) -> str | None:
    """A name of an image or video that is the same on every machine."""
    if isinstance(item.media, str):
        return hashlib.sha256(item.media.encode()).hexdigest()[:16]
    return None if item.media is None else "/".join(item.media.parts[-2:])


def versions() -> dict[str, str]:
    found = {"llamavid_jax": llamavid_jax.__version__, "python": platform.python_version()}
    return found | {name: importlib.metadata.version(name) for name in PACKAGES}
