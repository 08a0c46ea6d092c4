"""Base + LoRA → one checkpoint: `python -m conversion.merge_lora BASE ADAPTER OUT`.

BASE is a converted checkpoint.  ADAPTER is a folder written by PEFT, `train.py` or the original's training.  It holds
adapter_config.json, adapter_model.safetensors or .bin, and the weights that were trained in full: `weights` from
`train.py`, non_lora_trainables.bin from the original, which cannot load its own folders.  OUT is BASE with B·A·α/r
added to the kernels in float32 and with the fully trained weights in place of its own, all in BASE's types.  PiSSA and
OLoRA subtract a part of every kernel before they train; it is subtracted here too.  Memory holds one weight at a time.
"""

import logging
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llamavid_jax import copies
from llamavid_jax.checkpoints.adapter import (
    REBUILT_STARTS,
    check_tensors,
    peft_tensors,
    read_peft_config,
    read_values,
    require_finite,
)
from llamavid_jax.checkpoints.arrays import Arrays
from llamavid_jax.checkpoints.weights import WEIGHTS, check_params
from llamavid_jax.config.schema import LLaMAVIDLlavaConfig
from llamavid_jax.errors import CheckpointError, Parser, command
from llamavid_jax.files import check_sums, find, local
from llamavid_jax.models.lora import LoraConfig
from llamavid_jax.weights import inventory
from llamavid_jax.weights.files import EMPTY, Weight, to_jax, to_torch, weight_table

from . import folder
from .orbax_store import LayerWriter
from .read_torch import read_file
from .stored_tensor import StoredTensor

PREFIX = "base_model.model."  # PEFT puts it before every name of the model that it wraps
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
FULL_MODULES = "non_lora_trainables.bin"


def read_adapter(source: Path, config: LLaMAVIDLlavaConfig) -> tuple[LoraConfig, dict[str, StoredTensor], Any]:
    """An adapter's configuration, its tensors, `model....lora_A.weight` → tensor, and its `init_lora_weights`.

    Raises CheckpointError if there is no file of weights, and for weights of another model.
    """
    file = next((source / name for name in ADAPTER_FILES if (source / name).is_file()), None)
    if file is None:
        raise CheckpointError(f"{source} holds no {' or '.join(ADAPTER_FILES)}; give the folder of an adapter")
    tensors = {name.replace(".default.", "."): tensor for name, tensor in read_file(file).items()}
    values = read_values(source)
    lora = read_peft_config(values, tensors, source, rebuilt=REBUILT_STARTS)
    check_sums(source)
    check_tensors(tensors, peft_tensors(lora, config), source)
    updates = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    return lora, updates, values.get("init_lora_weights")


def read_full_modules(source: Path, table: list[Weight]) -> dict[str, StoredTensor]:
    """The tensors of non_lora_trainables.bin under the names of the table; empty if there is no such file."""
    file, shapes = source / FULL_MODULES, {weight.name: weight.shape for weight in table}
    tensors = read_file(file) if file.is_file() else {}
    full = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    for name, tensor in full.items():
        if 0 in tensor.shape:
            raise CheckpointError(f"{file}: {name} {EMPTY}")
        if shapes.get(name) != tensor.shape:
            raise CheckpointError(
                f"{file}: {name} has shape {tensor.shape}, the base {shapes.get(name, 'no such weight')}; "
                "give the base that it was trained on"
            )
    return full


def read_full_parameters(source: Path, shapes: Mapping[str, tuple[int, ...]]) -> Arrays | None:
    """The parameters that `train.py` trained in full; None if there are none."""
    directory = source / WEIGHTS
    if not directory.is_dir():
        return None
    arrays = Arrays(directory, "copy it again")
    known = {path: shapes[path] for path in arrays if path in shapes}
    check_params(directory, arrays, known, "give the base that it was trained on")
    return arrays


def plain_files(base: Path) -> list[Path]:
    """The files beside the weights, as paths within `base`.

    Raises CheckpointError for what cannot be copied or has no end: pipes, devices, links to nothing or to a folder.
    """
    found = []
    for path in sorted(base.rglob("*")):
        inside = path.relative_to(base)
        if inside.parts[0] == WEIGHTS:
            continue
        if path.is_file():
            found.append(inside)
        elif path.is_symlink() or not path.is_dir():
            raise CheckpointError(f"{path} is no file that can be copied; remove it")
    return found


def trained_base(kernel: np.ndarray, start: Any, lora: LoraConfig) -> np.ndarray:
    """The kernel `[out, in]` that an adapter was trained on.

    PiSSA moves the `rank` largest singular components of the kernel into the adapter; OLoRA does so with the first
    columns and rows of its QR decomposition.  Neither depends on the signs that a decomposition is free to choose.
    """
    if start == "pissa":
        if kernel.shape[0] > kernel.shape[1]:
            return trained_base(kernel.T, start, lora).T
        wide = kernel.astype(np.float64)
        _, vectors = np.linalg.eigh(wide @ wide.T)  # in ascending order; a quarter of the time of an SVD of `wide`
        largest = vectors[:, -lora.rank :]
        return (wide - largest @ (largest.T @ wide)).astype(np.float32)
    if start == "olora":
        q, r = np.linalg.qr(kernel)
        return kernel - lora.scale * (q[:, : lora.rank] @ r[: lora.rank])
    return kernel


def merged(
    base: np.ndarray,
    weight: Weight,
    lora: LoraConfig,
    start: Any,
    updates: Mapping[str, StoredTensor],
    full: Mapping[str, StoredTensor],
) -> np.ndarray:
    """One weight of the base, in our layout: with its update added, or replaced by the fully trained one."""
    if weight.name in full:
        return to_jax(full[weight.name].read(), weight).astype(base.dtype)
    name = weight.name.removesuffix(".weight")
    if f"{name}.lora_A.weight" not in updates:
        return base
    a, b = (updates[f"{name}.lora_{part}.weight"].read().astype(np.float32) for part in "AB")
    for part, value in (("A", a), ("B", b)):
        require_finite(value, f"{name}.lora_{part}.weight", updates[f"{name}.lora_{part}.weight"].file)
    kernel = base.astype(np.float32)
    if start in REBUILT_STARTS:
        kernel = to_jax(trained_base(to_torch(kernel, weight.pattern), start, lora), weight)
    with np.errstate(over="ignore", invalid="ignore"):  # the caller checks for it
        return (kernel + to_jax(lora.scale * (b @ a), weight)).astype(base.dtype)


def merge(base: Path, adapter: Path, out: Path) -> None:
    """Writes the folder `out`.  Raises InputError, and then leaves nothing at `out`."""
    base = find(base)
    find(base / "qformer_tokenizer")
    copies.fetch_all(adapter)
    config = LLaMAVIDLlavaConfig.from_pretrained(base).require_whole(base)
    table, arrays = weight_table(config, "original"), Arrays(base / WEIGHTS)
    lora, updates, how = read_adapter(adapter, config)
    beside = plain_files(base)
    shapes = inventory.shapes(config)
    full, own = read_full_modules(adapter, table), read_full_parameters(adapter, shapes)
    replaced = set(own or ())
    check_params(arrays.folder, arrays, shapes)
    with folder.whole_folder(out) as partial:
        for inside in beside:
            (partial / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(base / inside, partial / inside)
        dtypes = {path: arrays[path].dtype.numpy_dtype for path in shapes}
        stacked = {weight.path for weight in table if weight.index is not None}
        empty = {path: jax.ShapeDtypeStruct(shape, dtypes[path]) for path, shape in shapes.items()}
        written = LayerWriter(partial / WEIGHTS, empty, stacked)
        for weight in table:
            start = (own if weight.path in replaced else arrays).read(weight.path, weight.index)
            start = start.astype(dtypes[weight.path])
            value = merged(start, weight, lora, how, updates, full)
            if value is not start or weight.path in replaced:  # the product of finite numbers may overflow
                require_finite(value, f"{weight.name}, merged,", adapter)
            written.write(weight.path, weight.index, value)
    count = len(full) + sum(weight.path in replaced for weight in table)
    print(f"{out}: {len(updates) // 2} kernels updated, {count} weights replaced")


@command()
def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="python -m conversion.merge_lora", description=__doc__)
    parser.add_argument("base", metavar="BASE", type=local, help="a converted checkpoint")
    parser.add_argument("adapter", metavar="ADAPTER", type=local, help="the folder of a LoRA adapter")
    parser.add_argument("out", metavar="OUT", type=local, help="the folder to make")
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax reports its own steps as warnings
    options = parser.parse_args(arguments)
    merge(options.base, options.adapter, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
