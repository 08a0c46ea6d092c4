"""What a run leaves at its end: `model`, a complete checkpoint, and `adapter`, the trained parameters alone.

Each folder is written under another name and renamed when complete, so that a full disk leaves no partial folder.
"""

import contextlib
import dataclasses
import fnmatch
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from llamavid_jax import buckets, uploads
from llamavid_jax.checkpoints.adapter import save_adapter
from llamavid_jax.checkpoints.weights import load_weights, parse_dtype, save_part, save_weights
from llamavid_jax.errors import InputError
from llamavid_jax.media.image_processor import LLaMAVIDLlavaImageProcessor
from llamavid_jax.models.lora import ADAPTERS, LoraConfig, merge_lora
from llamavid_jax.models.structure import Params
from llamavid_jax.parallel.mesh import host_mesh
from llamavid_jax.training.config import StartConfig
from llamavid_jax.training.start import Start, with_adapter


def save_result(
    output: Path, start: Start, trained: Params, dtype: str, lora: LoraConfig | None, source: StartConfig, fps: float
) -> None:
    """Writes `output/adapter`, which is small, then `output/model` in `dtype`; `fps` becomes the model's sampling rate.

    With LoRA the model has the updates merged in, and the adapter is in PEFT's layout, with any other trained
    parameters in `adapter/weights`.  Raises InputError if they cannot be written.
    """
    updates = {path: value for path, value in trained.items() if fnmatch.fnmatchcase(path, ADAPTERS)}
    beside = {path: value for path, value in trained.items() if path not in updates}
    if lora:
        updates = multihost_utils.process_allgather(updates, tiled=True)
    if lora or (start.frozen and beside):
        with replaced(output / "adapter") as folder:
            if lora and jax.process_index() == 0:
                save_adapter(folder, updates, lora, start.config, base=source.model)
            if start.frozen and beside:
                save_part(folder, beside)
    if lora and lora.base != "float":
        params = merged_on_host(start, source, updates, dtype, lora) | beside
    else:
        params = start.frozen | trained
        params = merge_lora(params, lora) if lora else params
    with replaced(output / "model") as folder:
        if jax.process_index() == 0:
            for part in (start.tokenizer, start.qformer_tokenizer):
                part.save_pretrained(folder)
            images = LLaMAVIDLlavaImageProcessor.of(start.config)
            dataclasses.replace(images, fps=fps).save_pretrained(folder)
        save_weights(folder, {path: value.astype(parse_dtype(dtype)) for path, value in params.items()})
        if jax.process_index() == 0:
            start.config.save_pretrained(folder)  # last: a folder without it is not a model


def merged_on_host(
    start: Start, source: StartConfig, updates: dict[str, np.ndarray], dtype: str, lora: LoraConfig
) -> dict[str, np.ndarray]:
    """The weights that the run started from, read again, with the updates merged into the full-precision kernels.

    It runs on the CPU: QLoRA's devices may not have room for these beside the quantised kernels.  Every process makes
    all of them.
    """
    mesh = host_mesh()
    with jax.set_mesh(mesh):
        params = load_weights(source.model, start.config, dtype, mesh)
        merged = merge_lora(with_adapter(params, source.adapter) | updates, lora)
    return {path: np.asarray(value) for path, value in merged.items()}  # process 0 writes these


@contextlib.contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, for all processes, which replaces it once all have left the block.

    In a bucket, where folders cannot be renamed, it is the folder itself, emptied.
    """
    in_bucket, first = buckets.url(folder) is not None, jax.process_index() == 0
    aside = folder if in_bucket else folder.with_name(f"{folder.name}.incomplete")
    try:
        if first:
            if in_bucket:
                uploads.delete(folder, first="config.json")
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        multihost_utils.sync_global_devices(f"{aside} made")
        yield aside
        multihost_utils.sync_global_devices(f"{aside} written")
        if first and not in_bucket:
            if folder.exists():
                shutil.rmtree(folder)
            aside.rename(folder)
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error}); free space there, and run the same again") from None
    finally:
        if first and not in_bucket:
            shutil.rmtree(aside, ignore_errors=True)
