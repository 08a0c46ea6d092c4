"""Weights on disk: an Orbax checkpoint of the nested dict of parameters, read straight onto a mesh."""

import dataclasses
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from llamavid_jax import buckets
from llamavid_jax.checkpoints.arrays import Arrays, chunk_shape, write_arrays
from llamavid_jax.config.schema import LLaMAVIDLlavaConfig
from llamavid_jax.errors import CheckpointError, ConfigError
from llamavid_jax.files import find, local
from llamavid_jax.models.structure import flat_paths
from llamavid_jax.parallel.mesh import host_mesh, local_mesh
from llamavid_jax.parallel.sharding import param_shardings
from llamavid_jax.weights import inventory
from llamavid_jax.weights.llama import QUANTISED

WEIGHTS = "weights"  # the folder in a checkpoint's directory


def parse_dtype(name: Any) -> jnp.dtype:
    """`"float32"` or `"bfloat16"` (or the type itself) → dtype."""
    text = name if isinstance(name, str) else jnp.dtype(name).name
    if text not in ("float32", "bfloat16"):
        raise ConfigError(f"dtype is {text!r}; use 'float32' or 'bfloat16'")
    return jnp.dtype(text)


def weights_folder(directory: str | Path) -> Path:
    """The full path of the weights, without `..`, which TensorStore rejects."""
    return local(directory).resolve() / WEIGHTS


def save_weights(directory: str | Path, params: Mapping[str, Any]) -> None:
    """Writes `directory/weights`, complete or not at all; every process writes its own shards."""
    try:
        local(directory).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be made ({error.strerror}); give a folder, not a file") from None

    def chunk(value: Any) -> tuple[int, ...]:
        shard = value.sharding.shard_shape(value.shape) if isinstance(value, jax.Array) else value.shape
        return chunk_shape(shard, value.dtype.itemsize)

    write_arrays(weights_folder(directory), params, {path: chunk(value) for path, value in params.items()})


def load_weights(
    directory: str | Path,
    config: LLaMAVIDLlavaConfig,
    dtype: Any = "float32",
    mesh: Mesh | None = None,
    float32: Container[str] = (),
) -> dict[str, jax.Array]:
    """Reads the parameters, by path, as `dtype`: every host its shards on `mesh`, or all onto the default device.

    The paths in `float32` are read as float32 whatever `dtype` is: training keeps what it trains in full precision.
    Kernels that are quantised in `config` but not in the checkpoint are quantised by the host, one at a time: the
    devices never hold them in full precision.  Raises CheckpointError when the weights are missing, damaged, or not
    those of `config`.
    """
    folder = weights_folder(find(directory))
    if buckets.kind(folder) != "directory":
        raise CheckpointError(
            f"{folder} does not exist: {directory} is not a converted checkpoint; "
            "make one with `python -m conversion.torch_to_jax SRC OUT`"
        )
    stored, target = Arrays(folder), abstract_params(config, dtype, mesh, float32)
    plain = dataclasses.replace(config, quantization="none")
    to_quantize = [path for path in stored if f"{path}.qvalue" in target]
    whole = abstract_params(plain, dtype, host_mesh()) if to_quantize else target
    check_params(folder, stored, {path: leaf.shape for path, leaf in whole.items()})
    restored = {path: stored.restore(path, leaf) for path, leaf in target.items() if path in stored}
    for path in to_quantize:
        kernel = stored.restore(path, whole[path])
        restored |= _quantized(path, kernel, config.quantization, target)
    return {path: restored[path] for path in target}


def abstract_params(
    config: LLaMAVIDLlavaConfig,
    dtype: Any = "float32",
    mesh: Mesh | AbstractMesh | None = None,
    float32: Container[str] = (),
) -> dict[str, jax.ShapeDtypeStruct]:
    """Every parameter of a configuration by its path: shape, dtype and sharding on `mesh` or the default device.

    All have `dtype` except quantised values and the paths in `float32`.
    """
    found = {}
    for path, shape in inventory.shapes(config).items():
        kind = jnp.float32 if path in float32 else parse_dtype(dtype)
        kind = jnp.dtype(config.quantization) if path.endswith(".qvalue") else kind
        found[path] = jax.ShapeDtypeStruct(shape, kind)
    places = param_shardings(found, config, mesh or local_mesh())
    return {path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=places[path]) for path, x in found.items()}


def _quantized(
    path: str, kernel: jax.Array, kind: str, target: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """`{path}.qvalue` and `{path}.scale`, on their devices, of a kernel that only the host holds in full precision."""
    from llamavid_jax.models.quantize import quantize_kernels  # Qwix takes a second to import

    parts = flat_paths({path: quantize_kernels(kernel, QUANTISED[path], kind)})
    placed = {part: jax.device_put(value, target[part].sharding) for part, value in parts.items()}
    return jax.block_until_ready(placed)  # before the next kernel is read


def save_part(directory: str | Path, params: Mapping[str, jax.Array]) -> None:
    """Writes some parameters, by path: what a stage trained, without the rest."""
    save_weights(directory, dict(params))


def load_part(directory: str | Path, onto: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Reads what `save_part` wrote, each array with the dtype and sharding of the one at its path in `onto`.

    Raises CheckpointError for a folder without a part, and for parameters that `onto` lacks or has in other shapes.
    """
    folder = weights_folder(directory)
    if buckets.kind(folder) != "directory":
        raise CheckpointError(f"{folder} does not exist; give the `adapter` folder of a training run")
    stored = Arrays(folder, "copy it again")
    known = {path: onto[path] for path in stored if path in onto}
    check_params(
        folder, stored, {path: x.shape for path, x in known.items()}, "give the adapter of a run of this model"
    )
    return {path: stored.restore(path, x) for path, x in known.items()}


def check_params(
    source: Any, given: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], remedy: str = "convert again"
) -> None:
    """Raises CheckpointError unless the arrays of `source` have the configuration's paths and shapes."""
    missing, extra = sorted(shapes.keys() - given.keys()), sorted(given.keys() - shapes.keys())
    if missing or extra:
        raise CheckpointError(
            f"{source} does not hold the weights of the configuration: {len(missing)} missing "
            f"({', '.join(missing[:3])}), {len(extra)} unknown ({', '.join(extra[:3])}); {remedy}"
        )
    for name, shape in shapes.items():
        if tuple(given[name].shape) != shape:
            raise CheckpointError(
                f"{source}: {name} is {tuple(given[name].shape)}, but the configuration asks for {shape}; {remedy}"
            )
