"""A folder of LoRA updates as PEFT writes and reads it: adapter_config.json and adapter_model.safetensors.

Safetensors have no checksums: `save_adapter` writes SHA256SUMS beside the two files, and loading checks it if it
exists.

One A `[r, in]` and one B `[out, r]` a layer and target, under PEFT's names for a transformers LLaMA; here they are
stacked over the layers and transposed, with heads before head size on both sides.  Deviation: the original cannot load
what its own training saves; `python -m conversion.merge_lora` merges such folders too.
"""

import json
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from llamavid_jax.config.schema import LLaMAVIDLlavaConfig
from llamavid_jax.config.strict import strict
from llamavid_jax.errors import CheckpointError, ConfigError
from llamavid_jax.files import check_sums, find, read_object, with_sums, write_files
from llamavid_jax.models.lora import LoraConfig
from llamavid_jax.weights import inventory
from llamavid_jax.weights.files import EMPTY, Weight, expand, to_jax, to_torch
from llamavid_jax.weights.llama import KERNELS
from llamavid_jax.weights.row import low_rank

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
MODULES = {row.name.split(".{l}.")[1].removesuffix(".weight"): target for target, row in KERNELS.items()}
PLAIN = {"peft_type": ("LORA",), "bias": ("none",)}  # field → values with which the adapter is plain LoRA
# fields that never change that; every other field must be absent or off
FREE = {"r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
FREE |= {"base_model_name_or_path", "revision", "task_type", "inference_mode", "auto_mapping", "peft_version"}
FREE |= {"init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config"}
FREE |= {"megatron_core", "qalora_group_size", "runtime_config"}
OFF = (None, False, "", [], {})
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # init_lora_weights that do not change the base
REBUILT_STARTS = ("pissa", "olora")  # those whose change can be recomputed from base and rank
FLOATS = ("float64", "float32", "float16", "bfloat16")


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
    config_text = json.dumps(values, indent=1) + "\n"
    files = {WEIGHTS_FILE: safetensors.numpy.save(tensors, {"format": "pt"}), CONFIG_FILE: config_text.encode()}
    write_files(directory, with_sums(files))


def is_adapter(directory: str | Path) -> bool:
    return (find(directory) / CONFIG_FILE).exists()


def load_adapter(directory: str | Path, model: LLaMAVIDLlavaConfig) -> tuple[LoraConfig, dict[str, np.ndarray]]:
    """An adapter's configuration and its stacked parameters by dotted path, in the stored type.

    Raises CheckpointError for a missing or damaged file and for what `read_peft_config` and `check_tensors` refuse.
    """
    folder = find(directory)
    values = read_values(folder)
    if not find(folder / WEIGHTS_FILE).is_file():
        raise CheckpointError(f"{folder / WEIGHTS_FILE} does not exist or is no plain file; save the adapter again")
    try:
        with safetensors.safe_open(folder / WEIGHTS_FILE, framework="numpy") as file:
            given = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{folder / WEIGHTS_FILE} cannot be read ({error}); save the adapter again") from None
    config = read_peft_config(values, given, folder)
    tensors = peft_tensors(config, model)
    check_sums(folder)
    check_tensors(given, tensors, folder)
    layers: dict[str, list[np.ndarray]] = {}
    for name, tensor in tensors.items():
        require_finite(given[name], name, folder)
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


def read_peft_config(
    values: Mapping[str, Any], names: Iterable[str], folder: Path, rebuilt: Collection[str] = ()
) -> LoraConfig:
    """The LoraConfig of an adapter_config.json.

    The targets are read off the tensors' names: `target_modules` may be a pattern.  Raises CheckpointError for an
    adapter that is more than A and B of one rank (DoRA, biases, full modules), and for one whose initialisation changed
    the base (`init_lora_weights`), unless `rebuilt` names it: the caller then repeats the change.
    """
    for field, value in values.items():
        if field not in FREE and value not in PLAIN.get(field, OFF):
            raise CheckpointError(
                f"{folder}: {field} is {value!r} in {CONFIG_FILE}, which is more than LoRA; merge it with PEFT"
            )
    start = values.get("init_lora_weights", True)
    if start not in (*PLAIN_STARTS, *rebuilt):
        remedy = "merge it with PEFT, onto the base that it saved"
        if start in REBUILT_STARTS:
            remedy = "merge it first: python -m conversion.merge_lora BASE ADAPTER OUT"
        raise CheckpointError(
            f"{folder}: init_lora_weights is {start!r}, which changed the base before the training; {remedy}"
        )
    names = list(names)
    targets = [target for module, target in MODULES.items() if any(f".{module}.lora_" in name for name in names)]
    if not targets:
        raise CheckpointError(f"{folder} {_updates(names)}; merge it with PEFT, and convert the result")
    alpha = values.get("lora_alpha")
    fields = {
        "rank": values.get("r"),
        "alpha": int(alpha) if type(alpha) is float and alpha.is_integer() and abs(alpha) < 2**31 else alpha,
        "dropout": values.get("lora_dropout", 0),
        "targets": targets,
    }
    try:
        return strict(LoraConfig, fields, "lora.")
    except ConfigError as error:
        raise CheckpointError(f"{folder}: {CONFIG_FILE} or the tensors' names do not fit: {error}") from None


def _updates(names: Iterable[str]) -> str:
    """Part of an error: the modules of these tensors, which cannot be updated here."""
    modules = sorted({re.sub(r"^base_model\.model\.|\.lora_.*|\.weight$", "", name) for name in names})
    return (
        f"updates {', '.join(modules[:3]) or 'nothing'}, and here the decoder's {', '.join(MODULES)} alone are updated"
    )


def check_tensors(given: Mapping[str, Any], expected: Mapping[str, Weight], folder: Path) -> None:
    """Raises CheckpointError unless a file holds exactly the tensors of an adapter of this model."""
    missing, unknown = sorted(expected.keys() - given.keys()), sorted(given.keys() - expected.keys())
    if others := [name for name in unknown if not any(f".{module}.lora_" in name for module in MODULES)]:
        raise CheckpointError(f"{folder} {_updates(others)}; merge it with PEFT, and convert the result")
    with_updates = {tensor.index for name, tensor in expected.items() if name in given}
    without = {expected[name].index for name in missing}
    if missing and not unknown and with_updates.isdisjoint(without):
        raise CheckpointError(
            f"{folder} updates {len(with_updates)} of {len(with_updates | without)} layers (layers_to_transform), and "
            "here every layer is updated; merge it with PEFT, or give the model that it was trained on"
        )
    if missing or unknown:
        raise CheckpointError(
            f"{folder} is no adapter of this model: {len(missing)} tensors missing ({', '.join(missing[:2])}), "
            f"{len(unknown)} unknown ({', '.join(unknown[:2])}); give the model that it was trained on"
        )
    for name, tensor in expected.items():
        if 0 in given[name].shape:
            raise CheckpointError(f"{folder}: {name} {EMPTY}")
        if tuple(given[name].shape) != tensor.shape:
            raise CheckpointError(
                f"{folder}: {name} is {tuple(given[name].shape)}, but the model asks for {tensor.shape}; "
                "give the model that it was trained on"
            )
        if str(given[name].dtype) not in FLOATS:
            raise CheckpointError(f"{folder}: {name} is of {given[name].dtype}; updates are {', '.join(FLOATS)}")


def require_finite(value: np.ndarray, name: str, folder: Path) -> None:
    """Raises CheckpointError for an update with NaN or infinite numbers, which would spread to its kernel."""
    with np.errstate(invalid="ignore"):
        if np.isfinite(value).all():
            return
    raise CheckpointError(
        f"{folder}: {name} holds numbers that are NaN or infinite; its training diverged, or the file is damaged: "
        "give an earlier adapter"
    )
