"""A recorded checkpoint: its weights as torch reads them, its conversion, and checks of the result."""

import functools
import io
import json
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import safetensors.torch
import torch
from paths import GOLDEN
from rich.console import Console

from conversion import jax_to_torch, torch_to_jax
from llamavid_jax.config.schema import LLaMAVIDLlavaConfig
from llamavid_jax.weights.files import to_torch, weight_table

ORIGINAL = GOLDEN / "short_video_mean"
CONFIG = LLaMAVIDLlavaConfig.from_pretrained(ORIGINAL)
COMPUTED = ("inv_freq", "position_ids")  # buffers, which converted checkpoints do not contain


@functools.cache
def state_dict() -> dict[str, torch.Tensor]:
    return tensors(ORIGINAL)


def save_folder(folder: Path, values: dict[str, torch.Tensor], config_values: dict) -> Path:
    """A checkpoint in one file."""
    folder.mkdir(exist_ok=True)
    torch.save(values, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(config_values))
    return folder


def convert(source: Path, out: Path, **options) -> str:
    """Converts and returns the report."""
    console = Console(file=io.StringIO(), width=200)
    torch_to_jax.convert(source, out, console=console, **options)
    return console.file.getvalue()


def back(source, out, layout, **options) -> dict[str, torch.Tensor]:
    """Converts back and reads `out` with the libraries that users have."""
    jax_to_torch.convert(source, out, layout=layout, **options)
    return tensors(out)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(folder.iterdir()):
        if file.suffix == ".bin":
            found |= torch.load(file, weights_only=True)
        elif file.suffix == ".safetensors":
            found |= safetensors.torch.load_file(file)
    return found


def assert_bit_equal(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    expected = {name: value for name, value in expected.items() if not name.endswith(COMPUTED)}
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        assert torch.equal(actual[name].view(torch.uint8), value.contiguous().view(torch.uint8)), name


def restore(out: Path) -> dict[str, np.ndarray]:
    """Dotted path → array, read by Orbax."""
    with ocp.StandardCheckpointer() as checkpointer:
        leaves = jax.tree_util.tree_leaves_with_path(checkpointer.restore(out / "weights"))
    return {".".join(key.key for key in path): np.asarray(leaf) for path, leaf in leaves}


def as_torch(params: dict[str, np.ndarray], config: LLaMAVIDLlavaConfig) -> dict[str, np.ndarray]:
    """Parameters with the original's names and layout."""
    found = {}
    for weight in weight_table(config, "original"):
        value = params[weight.path] if weight.index is None else params[weight.path][weight.index]
        found[weight.name] = to_torch(value, weight.pattern)
    return found


def assert_equal(params: dict[str, np.ndarray], expected: dict[str, torch.Tensor], config=CONFIG) -> None:
    """Asserts that every parameter equals the weights of its torch name."""
    for name, value in as_torch(params, config).items():
        np.testing.assert_array_equal(value, expected[name].float().numpy(), err_msg=name)
