"""A folder of LoRA updates as PEFT writes and reads it: adapter_config.json and adapter_model.safetensors.

One A `[r, in]` and one B `[out, r]` a layer and target, under PEFT's names for a transformers LLaMA; here they are
stacked over the layers and transposed, heads before their size on both sides.  Deviation: the original
cannot load what its own training saves; `python -m conversion.merge_lora` merges such folders too.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from llamavid_jax.config.schema import LLaMAVIDLlavaConfig
from llamavid_jax.config.strict import strict
from llamavid_jax.errors import CheckpointError, ConfigError
from llamavid_jax.files import read_object, write_files
from llamavid_jax.models.lora import LoraConfig
from llamavid_jax.weights import inventory
from llamavid_jax.weights.files import Weight, expand, to_jax, to_torch
from llamavid_jax.weights.llama import KERNELS
from llamavid_jax.weights.row import low_rank

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
MODULES = {row.name.split(".{l}.")[1].removesuffix(".weight"): target for target, row in KERNELS.items()}
PLAIN = {  # fields of adapter_config.json that would change the product, and the values with which they do not
    "peft_type": ("LORA",),
    "bias": ("none",),
    **dict.fromkeys(("use_rslora", "use_dora", "fan_in_fan_out", "lora_bias"), (False, None)),
    **dict.fromkeys(("rank_pattern", "alpha_pattern", "modules_to_save", "layer_replication"), (None, {}, [])),
}


def peft_tensors(config: LoraConfig, model_config: LLaMAVIDLlavaConfig) -> dict[str, Weight]:
    """Every tensor of an adapter by its name in the file: A `[rank, in]` and B `[out, rank]` of each layer."""
    rows = [row for target in config.targets for row in low_rank(KERNELS[target])]
    sizes = inventory.axis_sizes(model_config) | {"rank": config.rank}
    return {weight.name: weight for weight in expand(rows, "original", sizes)}


def save_adapter(
    directory: str | Path, params: Mapping[str, Any], config: LoraConfig, model: LLaMAVIDLlavaConfig, base: str = ""
) -> None:
    """Writes the updates among `params`, in their type; `base` names the language model that they belong to."""
    stacked = {path: np.asarray(leaf) for path, leaf in params.items() if ".lora." in path}
    tensors = {
        name: np.ascontiguousarray(to_torch(stacked[tensor.path][tensor.index], tensor.pattern))
        for name, tensor in peft_tensors(config, model).items()
    }
    values = {
        "base_model_name_or_path": base,
        "bias": "none",
        "inference_mode": True,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "peft_type": "LORA",
        "r": config.rank,
        "target_modules": [module.split(".")[1] for module, target in MODULES.items() if target in config.targets],
        "task_type": "CAUSAL_LM",
    }
    files = {WEIGHTS_FILE: safetensors.numpy.save(tensors, {"format": "pt"})}
    write_files(directory, files | {CONFIG_FILE: (json.dumps(values, indent=1) + "\n").encode()})


def is_adapter(directory: str | Path) -> bool:
    return (Path(directory) / CONFIG_FILE).exists()


def load_adapter(directory: str | Path, model: LLaMAVIDLlavaConfig) -> tuple[LoraConfig, dict[str, np.ndarray]]:
    """An adapter's configuration and its stacked parameters by dotted path, in the stored type.

    Raises CheckpointError for a missing or damaged file and for what `read_peft_config` and `check_tensors` refuse.
    """
    folder = Path(directory)
    values = read_values(folder)
    try:
        with safetensors.safe_open(folder / WEIGHTS_FILE, framework="numpy") as file:
            given = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{folder / WEIGHTS_FILE} cannot be read ({error}); save the adapter again") from None
    config = read_peft_config(values, given, folder)
    tensors = peft_tensors(config, model)
    check_tensors(given, tensors, folder)
    layers: dict[str, list[np.ndarray]] = {}
    for name, tensor in tensors.items():
        layers.setdefault(tensor.path, []).append(to_jax(given[name], tensor))
    return config, {path: np.stack(found) for path, found in layers.items()}


def read_values(folder: Path) -> dict[str, Any]:
    """The object in a folder's adapter_config.json."""
    try:
        return read_object(folder / CONFIG_FILE)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder / CONFIG_FILE} cannot be read ({error}); give the folder of an adapter"
        ) from None


def read_peft_config(values: Mapping[str, Any], names: Iterable[str], folder: Path) -> LoraConfig:
    """The LoraConfig of an adapter_config.json.

    The targets are read off the tensors' names: `target_modules` may be a pattern.  Raises CheckpointError for an
    adapter that is more than A and B of one rank (DoRA, biases, full modules).
    """
    for field, plain in PLAIN.items():
        if values.get(field, plain[0]) not in plain:
            raise CheckpointError(
                f"{folder}: {field} is {values[field]!r} in {CONFIG_FILE}, which is more than LoRA; merge it with PEFT"
            )
    targets = [target for module, target in MODULES.items() if any(f".{module}.lora_" in name for name in names)]
    alpha = values.get("lora_alpha")
    fields = {
        "rank": values.get("r"),
        "alpha": int(alpha) if type(alpha) is float and alpha.is_integer() else alpha,
        "dropout": values.get("lora_dropout", 0),
        "targets": targets,
    }
    try:
        return strict(LoraConfig, fields, "lora.")
    except ConfigError as error:
        raise CheckpointError(f"{folder}: {CONFIG_FILE} or the tensors' names do not fit: {error}") from None


def check_tensors(given: Mapping[str, Any], expected: Mapping[str, Weight], folder: Path) -> None:
    """Raises CheckpointError unless a file holds just the tensors of an adapter of this model."""
    missing, unknown = sorted(expected.keys() - given.keys()), sorted(given.keys() - expected.keys())
    if missing or unknown:
        raise CheckpointError(
            f"{folder} is no adapter of this model: {len(missing)} tensors missing ({', '.join(missing[:2])}), "
            f"{len(unknown)} unknown ({', '.join(unknown[:2])}); give the model that it was trained on"
        )
    for name, tensor in expected.items():
        if tuple(given[name].shape) != tensor.shape:
            raise CheckpointError(
                f"{folder}: {name} is {tuple(given[name].shape)}, but the model asks for {tensor.shape}; "
                "give the model that it was trained on"
            )
