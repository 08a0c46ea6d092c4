"""Weights on disk: an Orbax checkpoint of the nested dict of parameters, read straight onto a mesh."""

import dataclasses
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import tensorstore
from jax.sharding import AbstractMesh, Mesh

from llamavid_jax.config.schema import LLaMAVIDLlavaConfig
from llamavid_jax.errors import CheckpointError, ConfigError
from llamavid_jax.files import find
from llamavid_jax.models.structure import flat_paths
from llamavid_jax.parallel.mesh import host_mesh, make_mesh
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
    """The full path of the weights, without `..`, which TensorStore does not take."""
    return Path(directory).resolve() / WEIGHTS


def save_weights(directory: str | Path, params: Mapping[str, Any]) -> None:
    """Writes `directory/weights`; Orbax writes aside and renames, so that it is complete or absent."""
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be made ({error.strerror}); give a folder, not a file") from None
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(weights_folder(directory), nest(params), force=True)


def load_weights(
    directory: str | Path,
    config: LLaMAVIDLlavaConfig,
    dtype: Any = "float32",
    mesh: Mesh | None = None,
    float32: Container[str] = (),
) -> dict[str, jax.Array]:
    """Reads the parameters, by path, as `dtype` onto `mesh`, every host only its shards, or onto the default device.

    The paths in `float32` are read so whatever `dtype` is: training keeps what it trains in full precision.
    Kernels that are quantised in `config` but not in the checkpoint are quantised by the host, one at a time: the
    devices never hold them in full precision.
    Raises CheckpointError when the weights are missing, damaged, or not those of `config`.
    """
    path = weights_folder(find(directory))
    if not path.is_dir():
        raise CheckpointError(
            f"{path} does not exist: {directory} is not a converted checkpoint; "
            "make one with `python -m conversion.torch_to_jax SRC OUT`"
        )
    target = abstract_params(config, dtype, mesh, float32)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:

        def restore(some: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
            item = nest(some)
            how = ocp.checkpoint_utils.construct_restore_args(item)
            arguments = ocp.args.PyTreeRestore(item=item, restore_args=how, partial_restore=True)
            return flat_paths(checkpointer.restore(path, args=arguments))

        try:
            if (path / "manifest.ocdbt").exists():  # of a damaged index Orbax prints one traceback an array
                index = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{path}/"}}
                tensorstore.KvStore.open(index).result().list().result()
            stored = checkpointer.metadata(path).item_metadata
            if stored is None:
                raise CheckpointError(f"{path}: its metadata (_METADATA) is missing or damaged; convert again")
            stored = flat_paths(dict(stored.tree))
            plain = dataclasses.replace(config, quantization="none")
            to_quantize = [name for name in stored if f"{name}.qvalue" in target]
            whole = abstract_params(plain, dtype, host_mesh()) if to_quantize else target
            check_params(path, stored, whole)
            restored = restore({name: target[name] for name in stored if name in target})
            for name in to_quantize:
                restored |= _quantized(whole[name], name, restore, config.quantization, target)
        except CheckpointError:
            raise
        except Exception as error:  # Orbax and TensorStore raise many kinds for damaged files
            raise CheckpointError(
                f"{path} is damaged ({type(error).__name__}: {first_line(error)}); convert again"
            ) from error
    return {name: restored[name] for name in target}


def abstract_params(
    config: LLaMAVIDLlavaConfig,
    dtype: Any = "float32",
    mesh: Mesh | AbstractMesh | None = None,
    float32: Container[str] = (),
) -> dict[str, jax.ShapeDtypeStruct]:
    """Every parameter of a configuration by its path: shape, type and place on `mesh` or the default device.

    All have the type `dtype` but quantised values and the paths in `float32`.
    """
    found = {}
    for path, shape in inventory.shapes(config).items():
        kind = jnp.float32 if path in float32 else parse_dtype(dtype)
        kind = jnp.dtype(config.quantization) if path.endswith(".qvalue") else kind
        found[path] = jax.ShapeDtypeStruct(shape, kind)
    places = param_shardings(found, config, mesh or make_mesh())
    return {path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=places[path]) for path, x in found.items()}


def _quantized(
    kernel: jax.ShapeDtypeStruct, name: str, restore: Callable, kind: str, target: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """`{name}.qvalue` and `{name}.scale` in their places, of a kernel that only the host holds in full precision."""
    from llamavid_jax.models.quantize import quantize_kernels  # Qwix takes a second to import

    parts = flat_paths({name: quantize_kernels(restore({name: kernel})[name], QUANTISED[name], kind)})
    placed = {part: jax.device_put(value, target[part].sharding) for part, value in parts.items()}
    return jax.block_until_ready(placed)  # before the next kernel is read


def save_part(directory: str | Path, params: Mapping[str, jax.Array]) -> None:
    """Writes some parameters, by path: what a stage trained, without the rest."""
    save_weights(directory, dict(params))


def load_part(directory: str | Path, onto: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Reads what `save_part` wrote, each array in the type and the place of its namesake in `onto`.

    Raises CheckpointError for a folder without a part, and for parameters that `onto` lacks or has in other shapes.
    """
    path = weights_folder(directory)
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist; give the `adapter` folder of a training run")
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            tree = dict(checkpointer.metadata(path).item_metadata or {})
            stored = flat_paths(tree)
            known = {name: onto[name] for name in stored if name in onto}
            check_params(path, stored, known, "give the adapter of a run of this model")
            target = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for x in known.values()]
            return flat_paths(checkpointer.restore(path, jax.tree.unflatten(jax.tree.structure(tree), target)))
        except CheckpointError:
            raise
        except Exception as error:  # of many kinds, as in load_weights
            raise CheckpointError(
                f"{path} is damaged ({type(error).__name__}: {first_line(error)}); copy it again"
            ) from error


def nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """`{"a.b": x}` → `{"a": {"b": x}}`."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split(".")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = leaf
    return tree


def check_params(source: Any, given: dict[str, Any], expected: dict[str, Any], remedy: str = "convert again") -> None:
    """Raises CheckpointError unless the arrays of `source` have the paths and shapes of the configuration's."""
    missing, extra = sorted(expected.keys() - given.keys()), sorted(given.keys() - expected.keys())
    if missing or extra:
        raise CheckpointError(
            f"{source} does not hold the weights of the configuration: {len(missing)} missing "
            f"({', '.join(missing[:3])}), {len(extra)} unknown ({', '.join(extra[:3])}); {remedy}"
        )
    for name, leaf in expected.items():
        if tuple(given[name].shape) != leaf.shape:
            raise CheckpointError(
                f"{source}: {name} is {tuple(given[name].shape)}, but the configuration asks for {leaf.shape}; {remedy}"
            )


def first_line(error: BaseException) -> str:
    """Of the error that the others were raised from: it names the file and what is wrong with it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or ["no message"])[0][:300]
