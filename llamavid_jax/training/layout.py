"""A run's model without values: which parameters it has, which of them train, and how each one is sharded.

recipe ─ lay_out ─▶ Layout: structure, trained and frozen shapes ─ state_layout ─▶ shapes of the train state
"""

import dataclasses
import fnmatch
from collections.abc import Container, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llamavid_jax.checkpoints.weights import parse_dtype
from llamavid_jax.config.schema import LLaMAVIDLlavaConfig
from llamavid_jax.errors import ConfigError
from llamavid_jax.models.llama_vid import LlamaVid
from llamavid_jax.models.lora import ADAPTERS, TARGETS, LoraConfig, add_lora
from llamavid_jax.models.structure import Structure
from llamavid_jax.parallel.mesh import FSDP, copies, host_mesh, make_mesh, parse_mesh, row_shards, spec_of
from llamavid_jax.parallel.sharding import param_shardings
from llamavid_jax.shapes import RowShape
from llamavid_jax.training.config import LoopConfig, OptimizerConfig, TrainConfig
from llamavid_jax.training.optimizer import make_optimizer
from llamavid_jax.training.step import TrainState
from llamavid_jax.training.trainable import trainable_paths


def run_mesh(text: str) -> Mesh:
    """The mesh for a text such as `fsdp=4,tensor=2`; for an empty one, all devices on `fsdp`."""
    return make_mesh(**(parse_mesh(text) or {FSDP: jax.device_count()}))


def batch_sharding(mesh: Mesh, field: str = "") -> NamedSharding:
    """The sharding of a field of `Batch`: rows over `data` and `fsdp`, and `frames` also over `sequence`."""
    return NamedSharding(mesh, spec_of("batch", *(["sequence"] if field == "frames" else [])))


def check_rows(shapes: Sequence[RowShape], batch_size: int, micro_batches: int, mesh: Mesh) -> None:
    """Raises ConfigError unless `data` × `fsdp` divides the micro-batches, and `sequence` the rows."""
    shards, batch_shards, rows = row_shards(mesh), copies(mesh), batch_size // micro_batches
    for number, shape in enumerate(shapes):
        for name in ("frames", "pairs", "tokens"):
            if getattr(shape, name) % shards:
                raise ConfigError(
                    f"data.buckets[{number}].{name} is {getattr(shape, name)}, which the mesh's sequence={shards} does "
                    f"not divide; use a multiple of {shards}, or another mesh"
                )
    if rows % batch_shards:
        raise ConfigError(
            f"training.batch_size is {batch_size} in {micro_batches} micro-batches of {rows} rows, which data × fsdp = "
            f"{batch_shards} does not divide; use a multiple of {batch_shards * micro_batches}, or another mesh"
        )


def on_mesh(loop: LoopConfig, mesh: Mesh) -> LoopConfig:
    """`loop` with the fewest `micro_batches` that give a device of `mesh` at most `device_rows` rows at a time."""
    if not loop.device_rows:
        return loop
    least = -(-loop.batch_size // (loop.device_rows * copies(mesh)))
    fitting = (number for number in range(least, loop.batch_size) if loop.batch_size % (number * copies(mesh)) == 0)
    return dataclasses.replace(loop, device_rows=0, micro_batches=next(fitting, loop.batch_size))


@dataclasses.dataclass(frozen=True)
class Layout:
    """A run's model without values: `trained` and `frozen` are ShapeDtypeStructs with shardings, by path."""

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
    structure = Structure(nnx.eval_shape(lambda: make_model(model_config, config.training, config.lora)))
    adapters = {path for path in structure.shapes if fnmatch.fnmatchcase(path, ADAPTERS)}
    trains = trainable_paths([path for path in structure.shapes if path not in adapters], config.trainable) | adapters
    if config.lora:
        check_lora_trains(config.lora, trains)
        if config.lora.base != "float":
            host_mesh()  # raises now if the CPU, which merges at the end, is missing
    places = param_shardings(structure.shapes, model_config, mesh)
    leaves = {
        path: jax.ShapeDtypeStruct(leaf.shape, jnp.float32 if path in trains else dtype, sharding=places[path])
        for path, leaf in structure.shapes.items()
    }
    return Layout(
        model_config,
        structure,
        {path: leaf for path, leaf in leaves.items() if path in trains},
        {path: leaf for path, leaf in leaves.items() if path not in trains},
    )


def make_model(config: LLaMAVIDLlavaConfig, loop: LoopConfig, lora: LoraConfig | None) -> LlamaVid:
    """The model with random float32 parameters."""
    rngs = nnx.Rngs(loop.seed)
    model = LlamaVid(config, rngs=rngs, dtype=parse_dtype(loop.dtype), remat=loop.remat)
    if lora:
        add_lora(model.llama, lora, rngs)
    return model


def state_layout(optimizer: OptimizerConfig, trained: Mapping[str, Any], mesh: Mesh) -> TrainState:
    """Shapes and shardings of the train state; the optimiser's state is sharded like the parameters.

    `trained` are arrays, or ShapeDtypeStructs with shardings.
    """
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


def initial_state(optimizer: OptimizerConfig, trained: dict[str, jax.Array], mesh: Mesh) -> TrainState:
    """The train state at step 0; the optimiser's state is sharded like the parameters."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state_layout(optimizer, trained, mesh))
    init = jax.jit(make_optimizer(optimizer).init, out_shardings=shardings.optimizer)
    return TrainState(jax.device_put(np.int32(0), shardings.step), trained, init(trained))


def check_lora_trains(lora: LoraConfig, trains: Container[str]) -> None:
    """Raises ConfigError if a kernel that LoRA updates, or that is quantised, is itself trained."""
    for target in lora.targets if lora.base == "float" else TARGETS:
        kernel = f"llama.layers.{TARGETS[target]}.kernel"
        if kernel in trains:
            raise ConfigError(
                f"trainable: {kernel} trains, but lora holds it fixed; set its pattern to false, such as llama.*: false"
            )
