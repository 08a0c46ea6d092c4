"""What a run starts from: the model's structure, its trained and frozen parameters on the mesh, and its tokenizers.

Order: weights of `start.model` (or random ones from the seed), over them the adapter of `start.adapter`, over them the
run's own newest checkpoint (`loop.py`).
"""

import dataclasses
import fnmatch
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llamavid_jax.checkpoints.adapter import is_adapter, load_adapter, save_adapter
from llamavid_jax.checkpoints.tokenizers import check_tokenizers, load_tokenizers
from llamavid_jax.checkpoints.weights import (
    WEIGHTS,
    load_part,
    load_weights,
    nest,
    parse_dtype,
    save_part,
    save_weights,
)
from llamavid_jax.config.schema import LLaMAVIDLlavaConfig
from llamavid_jax.errors import ConfigError
from llamavid_jax.media.image_processor import LLaMAVIDLlavaImageProcessor
from llamavid_jax.models.llama_vid import LlamaVid
from llamavid_jax.models.lora import ADAPTERS, TARGETS, LoraConfig, add_lora, merge_lora
from llamavid_jax.parallel.sharding import flat_paths, make_mesh, param_axes, parse_mesh, partition_spec
from llamavid_jax.text.qformer_tokenizer import QFormerTokenizer
from llamavid_jax.text.tokenizer import Tokenizer
from llamavid_jax.training.config import OptimizerConfig, TrainConfig
from llamavid_jax.training.optimizer import make_optimizer
from llamavid_jax.training.step import TrainState
from llamavid_jax.training.structure import Structure
from llamavid_jax.training.trainable import trainable_paths


@dataclasses.dataclass
class Start:
    """The model of a run.  `trained` (float32) and `frozen` (in the type of products) are parameters by path."""

    config: LLaMAVIDLlavaConfig
    structure: Structure
    trained: dict[str, jax.Array]
    frozen: dict[str, jax.Array]
    tokenizer: Tokenizer
    qformer_tokenizer: QFormerTokenizer
    mesh: Mesh
    run: TrainConfig

    def save(self, output: Path, trained: dict[str, jax.Array]) -> None:
        """Writes `output/model`, a whole checkpoint, and `output/adapter`: what was trained alone.

        With LoRA the model holds the updates merged, and the adapter is in PEFT's layout, with whatever else was
        trained beside it in `adapter/weights`.  The adapter, which is small, comes first.
        """
        folder, adapter = output / "model", output / "adapter"
        vision, ratio = self.config.vision_tower_config, self.config.image_aspect_ratio
        if jax.process_index() == 0:
            self.config.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            self.qformer_tokenizer.save_pretrained(folder)
            LLaMAVIDLlavaImageProcessor(vision.image_size, image_aspect_ratio=ratio).save_pretrained(folder)
        dtype, lora = parse_dtype(self.run.training.dtype), self.run.lora
        updates = {path: value for path, value in trained.items() if fnmatch.fnmatchcase(path, ADAPTERS)}
        beside = {path: value for path, value in trained.items() if path not in updates}
        if lora:
            updates = multihost_utils.process_allgather(updates, tiled=True)
            if jax.process_index() == 0:
                save_adapter(adapter, updates, lora, self.config.text_config, base=self.run.start.model)
        if self.frozen and beside:
            save_part(adapter, beside)
        if lora and lora.base != "float":
            params = self._merged_on_host(updates) | beside
        else:
            params = self.frozen | trained
            params = flat_paths(merge_lora(nest(params), lora)) if lora else params
        save_weights(folder, nest({path: value.astype(dtype) for path, value in params.items()}))

    def _merged_on_host(self, updates: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What the run started from, read again, with the updates in its whole kernels.

        QLoRA's devices may have no room for it beside the kernels in few bits; every process makes all of it.
        """
        start, mesh = self.run.start, host_mesh()
        with jax.set_mesh(mesh):
            params = flat_paths(load_weights(start.model, self.config, self.run.training.dtype, mesh))
            merged = merge_lora(nest(with_adapter(params, start.adapter) | updates), self.run.lora)
        return {path: np.asarray(value) for path, value in flat_paths(merged).items()}  # process 0 writes these


def run_mesh(text: str) -> Mesh:
    """The mesh of `fsdp=4,tensor=2`; all devices on `fsdp` where nothing is said."""
    return make_mesh(**(parse_mesh(text) or {"fsdp": jax.device_count()}))


def batch_sharding(mesh: Mesh, field: str = "") -> NamedSharding:
    """Of a field of `Batch`: rows over the copies of the model, and their frames over the chips that share a row."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp"), *(["sequence"] if field == "frames" else [])))


def check_rows(config: TrainConfig, mesh: Mesh) -> None:
    """Raises ConfigError unless micro-batches divide over the copies of the model, and rows over `sequence`."""
    shares = mesh.shape["sequence"]
    for number, shape in enumerate(config.data.shapes):
        for name in ("frames", "pairs", "tokens"):
            if getattr(shape, name) % shares:
                raise ConfigError(
                    f"data.buckets[{number}].{name} is {getattr(shape, name)}, which the mesh's sequence={shares} does "
                    f"not divide; use a multiple of {shares}, or another mesh"
                )
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = config.training.batch_size // config.training.micro_batches
    if rows % ways:
        raise ConfigError(
            f"training.batch_size is {config.training.batch_size} in {config.training.micro_batches} micro-batches of "
            f"{rows} rows, which data × fsdp = {ways} does not divide; use a multiple of "
            f"{ways * config.training.micro_batches}, or another mesh"
        )


def host_mesh() -> Mesh:
    """This process's CPU."""
    try:
        return make_mesh(jax.local_devices(backend="cpu"))
    except RuntimeError:
        raise ConfigError(
            f"JAX_PLATFORMS is {jax.config.jax_platforms}, but lora.base other than 'float' is merged on the CPU; "
            f"use {jax.config.jax_platforms},cpu"
        ) from None


def with_adapter(params: dict[str, jax.Array], adapter: str) -> dict[str, jax.Array]:
    """`params` with those of a run's `adapter` folder in their places; LoRA's updates are not among them."""
    if not adapter or (is_adapter(adapter) and not (Path(adapter) / WEIGHTS).is_dir()):
        return params
    return params | load_part(adapter, params)


def read_updates(config: TrainConfig, model_config: LLaMAVIDLlavaConfig) -> dict[str, np.ndarray]:
    """The updates in the folder `start.adapter`; none where a run without LoRA left it."""
    folder, lora = config.start.adapter, config.lora
    if not folder or not is_adapter(folder):
        return {}
    if lora is None:
        raise ConfigError(
            f"start.adapter is {folder}, which holds LoRA updates, but lora is null; set lora as it was there, or "
            "merge them with `python -m conversion.merge_lora BASE ADAPTER OUT` and start from OUT"
        )
    found, updates = load_adapter(folder, model_config.text_config)
    for name in ("rank", "alpha", "targets"):
        there, here = getattr(found, name), getattr(lora, name)
        if there != here and (name != "targets" or set(there) != set(here)):
            raise ConfigError(f"lora.{name} is {here}, but {there} in start.adapter, {folder}; set it so")
    return updates


def check_lora_trains(lora: LoraConfig, trains: Container[str]) -> None:
    """Raises ConfigError for a kernel that would train itself under its update, or in few bits."""
    for target in lora.targets if lora.base == "float" else TARGETS:
        kernel = f"llama.layers.{TARGETS[target]}.kernel"
        if kernel in trains:
            raise ConfigError(
                f"trainable: {kernel} trains, but lora holds it fixed; set its pattern to false, such as llama.*: false"
            )


@dataclasses.dataclass(frozen=True)
class Layout:
    """A run's model before it has any values: `trained` and `frozen` are ShapeDtypeStructs with shardings, by path."""

    config: LLaMAVIDLlavaConfig
    structure: Structure
    trained: dict[str, jax.ShapeDtypeStruct]
    frozen: dict[str, jax.ShapeDtypeStruct]


def lay_out(config: TrainConfig, mesh: Mesh) -> Layout:
    """The model of a run on `mesh`.  Raises ConfigError or ShardingError; allocates nothing."""
    model_config, dtype = config.model_config(), parse_dtype(config.training.dtype)
    positions = model_config.qformer_config.max_position_embeddings
    if config.data.question_tokens > positions:
        raise ConfigError(
            f"data.question_tokens is {config.data.question_tokens}, but the Q-Former has {positions} positions; "
            f"use {positions} or fewer"
        )
    structure = Structure(nnx.eval_shape(lambda: make_model(config, model_config)))
    adapters = {path for path in structure.shapes if fnmatch.fnmatchcase(path, ADAPTERS)}
    trains = trainable_paths([path for path in structure.shapes if path not in adapters], config.trainable) | adapters
    if config.lora:
        check_lora_trains(config.lora, trains)
        if config.lora.base != "float":
            host_mesh()  # for the end
    axes = param_axes({path: leaf.shape for path, leaf in structure.shapes.items()}, model_config)
    leaves = {
        path: jax.ShapeDtypeStruct(
            leaf.shape,
            jnp.float32 if path in trains else dtype,
            sharding=NamedSharding(mesh, partition_spec(leaf.shape, axes[path], mesh)),
        )
        for path, leaf in structure.shapes.items()
    }
    return Layout(
        model_config,
        structure,
        {path: leaf for path, leaf in leaves.items() if path in trains},
        {path: leaf for path, leaf in leaves.items() if path not in trains},
    )


def make_model(config: TrainConfig, model_config: LLaMAVIDLlavaConfig) -> LlamaVid:
    """The model with random float32 parameters."""
    rngs = nnx.Rngs(config.training.seed)
    model = LlamaVid(model_config, rngs=rngs, dtype=parse_dtype(config.training.dtype), remat=config.training.remat)
    if config.lora:
        add_lora(model, config.lora, rngs)
    return model


def state_layout(optimizer: OptimizerConfig, trained: Mapping[str, Any], mesh: Mesh) -> TrainState:
    """The train state of parameters that are placed, or that have shardings: the optimiser's sharded as they are."""
    replicated = NamedSharding(mesh, PartitionSpec())

    def place(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        parameter = trained.get(getattr(path[-1], "key", None))
        sharding = replicated if parameter is None else parameter.sharding
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    params = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in trained.items()}
    state = TrainState(
        jax.ShapeDtypeStruct((), jnp.int32), params, jax.eval_shape(make_optimizer(optimizer).init, params)
    )
    return jax.tree.map_with_path(place, state)


def load_start(config: TrainConfig, mesh: Mesh) -> Start:
    """Raises ConfigError or CheckpointError before anything is computed."""
    if config.start.adapter and not Path(config.start.adapter).is_dir():
        raise ConfigError(
            f"start.adapter is {config.start.adapter}, which does not exist; run the stage that leaves it, or give "
            "another folder, or start.adapter= for none"
        )
    layout = lay_out(config, mesh)
    updates = read_updates(config, layout.config)
    folder = config.data.tokenizer or config.start.model
    tokenizers = load_tokenizers(folder)
    check_tokenizers(layout.config, *tokenizers, folder)
    if not folder or None in tokenizers:
        raise ConfigError(
            f"{folder or 'the run'} has not both tokenizers, LLaMA's and the Q-Former's; give a folder with them: "
            "start.model, or data.tokenizer"
        )
    leaves, structure = layout.trained | layout.frozen, layout.structure

    def random(paths: Container[str]) -> dict[str, jax.Array]:
        def init() -> dict[str, jax.Array]:
            params = flat_paths(nnx.state(make_model(config, layout.config), nnx.Param))
            return {path: value.astype(leaves[path].dtype) for path, value in params.items() if path in paths}

        return jax.jit(init, out_shardings={path: leaves[path].sharding for path in leaves if path in paths})()

    if config.start.model:
        dtype = parse_dtype(config.training.dtype)
        params = flat_paths(load_weights(config.start.model, layout.config, dtype, mesh, float32=layout.trained))
        adapters = {path for path in leaves if fnmatch.fnmatchcase(path, ADAPTERS)}
        params |= random(adapters) if adapters else {}
    else:
        params = random(leaves)
    params = with_adapter(params, config.start.adapter)
    params |= {
        path: jax.device_put(value.astype(jnp.float32), leaves[path].sharding) for path, value in updates.items()
    }
    if config.lora and config.lora.base != "float":
        structure, params = quantized(structure, params, config.lora.base)
    return Start(
        layout.config,
        structure,
        {path: value for path, value in params.items() if path in layout.trained},
        {path: value for path, value in params.items() if path not in layout.trained},
        *tokenizers,
        mesh,
        config,
    )


def quantized(structure: Structure, params: dict[str, jax.Array], kind: str) -> tuple[Structure, dict[str, jax.Array]]:
    """The same model with LLaMA's kernels in few bits (QLoRA).

    Empties `params`: a whole kernel goes when its few bits are there, so that the two models are never both whole.
    """
    from llamavid_jax.models.quantize import quantize_base  # Qwix takes a second to import

    model = structure.model(params)
    params.clear()
    quantize_base(model, kind)
    return Structure(model), flat_paths(nnx.state(model, nnx.Param))
