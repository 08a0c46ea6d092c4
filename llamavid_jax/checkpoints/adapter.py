"""A folder of LoRA updates as PEFT writes and reads it: adapter_config.json and adapter_model.safetensors.

One A `[r, in]` and one B `[out, r]` a layer and target, under PEFT's names for a transformers LLaMA; here they are
stacked over the layers and transposed, heads before their size on both sides.  Deviation: the original
cannot load what its own training saves; `python -m conversion.merge_lora` merges such folders too.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx

from llamavid_jax.config.schema import LlamaConfig
from llamavid_jax.config.strict import strict
from llamavid_jax.errors import CheckpointError, ConfigError
from llamavid_jax.files import write_files
from llamavid_jax.models.llama import Layer
from llamavid_jax.models.lora import TARGETS, LoraConfig, linears
from llamavid_jax.parallel.sharding import flat_paths

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
MODULES = {  # PEFT's name of a target's module → the target
    "self_attn.q_proj": "q",
    "self_attn.k_proj": "k",
    "self_attn.v_proj": "v",
    "self_attn.o_proj": "o",
    "mlp.gate_proj": "gate",
    "mlp.up_proj": "up",
    "mlp.down_proj": "down",
}
PLAIN = {  # fields of adapter_config.json that would change the product, and the values with which they do not
    "peft_type": ("LORA",),
    "bias": ("none",),
    **dict.fromkeys(("use_rslora", "use_dora", "fan_in_fan_out", "lora_bias"), (False, None)),
    **dict.fromkeys(("rank_pattern", "alpha_pattern", "modules_to_save", "layer_replication"), (None, {}, [])),
}


class PeftTensor(NamedTuple):
    """One tensor of a file, of `shape`: one layer, of shape `ours`, of the parameter at `path`."""

    path: str
    layer: int
    ours: tuple[int, ...]
    shape: tuple[int, int]


def peft_tensors(config: LoraConfig, text_config: LlamaConfig) -> dict[str, PeftTensor]:
    """Every tensor of an adapter by its name in the file."""
    layer = nnx.eval_shape(lambda: Layer(text_config, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0)))
    modules, tensors = {TARGETS[target]: module for module, target in MODULES.items()}, {}
    for path, linear in linears(layer, config.targets):
        ways_in, ways_out = math.prod(linear.in_features), math.prod(linear.out_features)
        for index in range(text_config.num_hidden_layers):
            name, place = f"base_model.model.model.layers.{index}.{modules[path]}", f"llama.layers.{path}.lora"
            a, b = (*linear.in_features, config.rank), (config.rank, *linear.out_features)
            tensors[f"{name}.lora_A.weight"] = PeftTensor(f"{place}.a", index, a, (config.rank, ways_in))
            tensors[f"{name}.lora_B.weight"] = PeftTensor(f"{place}.b", index, b, (ways_out, config.rank))
    return tensors


def save_adapter(
    directory: str | Path, params: dict[str, Any], config: LoraConfig, text_config: LlamaConfig, base: str = ""
) -> None:
    """Writes the updates among `params`, in their type; `base` names the language model that they belong to."""
    leaves = flat_paths(params)
    stacked = {path: np.asarray(leaf) for path, leaf in leaves.items() if ".lora." in path}
    tensors = {
        name: np.ascontiguousarray(stacked[tensor.path][tensor.layer].reshape(tensor.shape[::-1]).T)
        for name, tensor in peft_tensors(config, text_config).items()
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


def load_adapter(directory: str | Path, text_config: LlamaConfig) -> tuple[LoraConfig, dict[str, np.ndarray]]:
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
    tensors = peft_tensors(config, text_config)
    check_tensors(given, tensors, folder)
    layers: dict[str, list[np.ndarray]] = {}
    for name, tensor in tensors.items():
        layers.setdefault(tensor.path, []).append(given[name].T.reshape(tensor.ours))
    return config, {path: np.stack(found) for path, found in layers.items()}


def read_values(folder: Path) -> dict[str, Any]:
    """The object in a folder's adapter_config.json."""
    try:
        values = json.loads((folder / CONFIG_FILE).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{folder / CONFIG_FILE} cannot be read ({error}); give the folder of an adapter"
        ) from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{folder / CONFIG_FILE} holds a JSON {type(values).__name__}; an object is needed")
    return values


def read_peft_config(values: Mapping[str, Any], names: Iterable[str], folder: Path) -> LoraConfig:
    """The LoraConfig of an adapter_config.json.

    The targets are read off the tensors' names: `target_modules` may be a pattern.  Raises CheckpointError for an
    adapter that is more than A and B of one rank (DoRA, biases, whole modules).
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


def check_tensors(given: Mapping[str, Any], expected: Mapping[str, PeftTensor], folder: Path) -> None:
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
