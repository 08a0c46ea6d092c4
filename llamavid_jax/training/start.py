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
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llamavid_jax.checkpoint import load_part, load_weights, nest, parse_dtype, save_part, save_weights
from llamavid_jax.config import ConfigError, LLaMAVIDLlavaConfig
from llamavid_jax.data.qformer_tokenizer import QFormerTokenizer
from llamavid_jax.data.tokenize import Tokenizer
from llamavid_jax.image_processor import LLaMAVIDLlavaImageProcessor
from llamavid_jax.lora import ADAPTERS, add_lora, merge_lora
from llamavid_jax.models.llama_vid import LlamaVid
from llamavid_jax.peft_adapter import save_adapter
from llamavid_jax.processor import check_tokenizers, load_tokenizers
from llamavid_jax.sharding import flat_paths, make_mesh, param_axes, parse_mesh, partition_spec
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
        """Writes `output/model`, a whole checkpoint, and `output/adapter`: what was trained alone (T10).

        With LoRA the model holds the updates merged, and the adapter is in PEFT's layout, with whatever else was
        trained beside it in `adapter/weights`.
        """
        folder, adapter = output / "model", output / "adapter"
        vision, ratio = self.config.vision_tower_config, self.config.image_aspect_ratio
        if jax.process_index() == 0:
            self.config.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            self.qformer_tokenizer.save_pretrained(folder)
            LLaMAVIDLlavaImageProcessor(vision.image_size, image_aspect_ratio=ratio).save_pretrained(folder)
        dtype, lora = parse_dtype(self.run.training.dtype), self.run.lora
        params = self.frozen | trained
        if lora:
            if lora.base != "float":  # the updates go into the kernels as they were
                params = flat_paths(load_weights(self.run.start.model, self.config, dtype, self.mesh)) | trained
            params = flat_paths(merge_lora(nest(params), lora))
            updates = {path: value for path, value in trained.items() if fnmatch.fnmatchcase(path, ADAPTERS)}
            updates = multihost_utils.process_allgather(updates, tiled=True)
            if jax.process_index() == 0:
                save_adapter(adapter, updates, lora, self.config.text_config)
            trained = {path: value for path, value in trained.items() if path not in updates}
        save_weights(folder, nest({path: value.astype(dtype) for path, value in params.items()}))
        if self.frozen and trained:
            save_part(adapter, trained)


def run_mesh(text: str) -> Mesh:
    """The mesh of `fsdp=4,tensor=2`; all devices on `fsdp` where nothing is said."""
    return make_mesh(**(parse_mesh(text) or {"fsdp": jax.device_count()}))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over the copies of the model."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def check_rows(config: TrainConfig, mesh: Mesh) -> None:
    """Raises ConfigError unless each micro-batch divides over the devices that hold rows."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = config.training.batch_size // config.training.micro_batches
    if rows % ways:
        raise ConfigError(
            f"training.batch_size is {config.training.batch_size} in {config.training.micro_batches} micro-batches of "
            f"{rows} rows, which data × fsdp = {ways} does not divide; use a multiple of "
            f"{ways * config.training.micro_batches}, or another mesh"
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
    structure = Structure(nnx.eval_shape(lambda: make_model(config, model_config)))
    adapters = {path for path in structure.shapes if fnmatch.fnmatchcase(path, ADAPTERS)}
    trains = trainable_paths([path for path in structure.shapes if path not in adapters], config.trainable) | adapters
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
    """Raises ConfigError or WeightsError before anything is computed."""
    layout = lay_out(config, mesh)
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
    if config.start.adapter:
        params |= load_part(config.start.adapter, params)
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
    """The same model with LLaMA's kernels in few bits (QLoRA, T9)."""
    from llamavid_jax.quantize import quantize_base  # Qwix takes a second to import

    model = structure.model(params)
    quantize_base(model, kind)
    return Structure(model), flat_paths(nnx.state(model, nnx.Param))
