"""Weights on disk: an Orbax checkpoint of the nested dict of parameters, read straight onto a mesh."""

import dataclasses
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import tensorstore
from jax.sharding import Mesh

from llamavid_jax.config.schema import LLaMAVIDLlavaConfig
from llamavid_jax.errors import CheckpointError, ConfigError
from llamavid_jax.models.llama_vid import abstract_params
from llamavid_jax.parallel.sharding import flat_paths, make_mesh, param_shardings

WEIGHTS = "weights"  # the folder in a checkpoint's directory


def parse_dtype(name: Any) -> jnp.dtype:
    """`"float32"` or `"bfloat16"` (or the type itself) → dtype."""
    text = name if isinstance(name, str) else jnp.dtype(name).name
    if text not in ("float32", "bfloat16"):
        raise ConfigError(f"dtype is {text!r}; use 'float32' or 'bfloat16'")
    return jnp.dtype(text)


def weights_folder(directory: str | Path) -> Path:
    """Its full path, without the `..` that TensorStore does not take."""
    return Path(directory).resolve() / WEIGHTS


def save_weights(directory: str | Path, params: dict[str, Any]) -> None:
    """Writes `directory/weights`; Orbax writes aside and renames, so that it is whole or absent."""
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be made ({error.strerror}); give a folder, not a file") from None
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(weights_folder(directory), string_keys(params), force=True)


def load_weights(
    directory: str | Path,
    config: LLaMAVIDLlavaConfig,
    dtype: Any = "float32",
    mesh: Mesh | None = None,
    float32: Container[str] = (),
) -> dict[str, Any]:
    """Reads the parameters as `dtype` onto `mesh`, every host only its shards, or onto the default device.

    The paths in `float32` are read so whatever `dtype` is: training keeps what it trains in full precision.
    Kernels that `config` has quantised and the checkpoint whole are quantised by the host, one at a time: only their
    few bits reach the devices.
    Raises CheckpointError when the weights are missing, damaged, or not those of `config`.
    """
    path = weights_folder(directory)
    if not path.is_dir():
        raise CheckpointError(
            f"{path} does not exist: {directory} is not a converted checkpoint; "
            "make one with `python -m conversion.torch_to_jax SRC OUT`"
        )
    dtype = parse_dtype(dtype)
    abstract = abstract_params(config, dtype)
    if mesh is None:
        mesh = make_mesh()
    shardings = flat_paths(param_shardings(abstract, config, mesh))
    kinds = {name: jnp.float32 if name in float32 else leaf.dtype for name, leaf in flat_paths(abstract).items()}
    target = {
        name: jax.ShapeDtypeStruct(leaf.shape, kinds[name], sharding=shardings[name])
        for name, leaf in flat_paths(abstract).items()
    }
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
            whole = flat_paths(abstract if plain == config else abstract_params(plain, dtype))
            to_quantize = [name for name in stored if f"{name}.qvalue" in target]
            check_params(path, stored, whole if to_quantize else target)
            restored = restore({name: target[name] for name in stored if name in target})
            for name in to_quantize:
                restored |= _quantized(name, whole[name], restore, config.quantization, shardings)
        except CheckpointError:
            raise
        except Exception as error:  # Orbax and TensorStore raise many kinds for damaged files
            raise CheckpointError(
                f"{path} is damaged ({type(error).__name__}: {first_line(error)}); convert again"
            ) from error
    return jax.tree.unflatten(jax.tree.structure(abstract), [restored[name] for name in target])


def _quantized(
    name: str, kernel: jax.ShapeDtypeStruct, restore: Callable, kind: str, shardings: dict[str, Any]
) -> dict[str, jax.Array]:
    """`{name}.qvalue` and `{name}.scale` in their places, of a kernel that only the host sees whole."""
    from llamavid_jax.models.quantize import quantize_kernels  # Qwix takes a second to import

    host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    read = restore({name: jax.ShapeDtypeStruct(kernel.shape, kernel.dtype, sharding=host)})
    parts = flat_paths({name: quantize_kernels(read[name], name, kind)})
    placed = {part: jax.device_put(value, shardings[part]) for part, value in parts.items()}
    return jax.block_until_ready(placed)  # before the next kernel is read


def save_part(directory: str | Path, params: Mapping[str, jax.Array]) -> None:
    """Writes some parameters, by path: what a stage trained, without the rest."""
    save_weights(directory, dict(params))


def load_part(directory: str | Path, onto: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Reads what `save_part` wrote, each array in the type and the place of its namesake in `onto`.

    Raises CheckpointError for a folder without such a part, and for parameters that `onto` lacks or shapes otherwise.
    """
    path = weights_folder(directory)
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist; give the `adapter` folder of a training run")
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            stored = dict(checkpointer.metadata(path).item_metadata or {})
        except Exception as error:  # of many kinds, as in load_weights
            raise CheckpointError(
                f"{path} is damaged ({type(error).__name__}: {first_line(error)}); copy it again"
            ) from error
        known = {name: onto[name] for name in stored if name in onto}
        check_params(path, flat_paths(stored), known, "give the adapter of a run of this model")
        target = {
            name: jax.ShapeDtypeStruct(onto[name].shape, onto[name].dtype, sharding=onto[name].sharding)
            for name in stored
        }
        try:
            return checkpointer.restore(path, target)
        except Exception as error:
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


def string_keys(tree: Any) -> Any:
    """Orbax keeps string keys only; lists of layers have integers."""
    return {str(key): string_keys(value) for key, value in tree.items()} if isinstance(tree, dict) else tree


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
