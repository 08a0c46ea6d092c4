"""A run's train step, compiled for a TPU slice from shapes alone: TrainConfig, "v5e:8x8" → Report.

The step, the sharding of its arrays and its batch are those of `training/loop.py`; the rows have the shape of the
config's largest bucket.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llamavid_jax.config.schema import LLaMAVIDLlavaConfig
from llamavid_jax.models.flops import PARTS, flops_done_again, flops_per_step
from llamavid_jax.models.published import share_of_peak
from llamavid_jax.parallel.mesh import FSDP, SEQUENCE, ShardingError, copies, describe, shards
from llamavid_jax.parallel.sharding import specs
from llamavid_jax.precompile.report import Report, compile_report
from llamavid_jax.precompile.topology import chip_of, slice_mesh
from llamavid_jax.shapes import Batch, RowShape
from llamavid_jax.training.config import TrainConfig
from llamavid_jax.training.layout import Layout, batch_sharding, check_rows, lay_out, on_mesh, state_layout
from llamavid_jax.training.optimizer import lr_factors
from llamavid_jax.training.step import make_train_step

REPLICATED = 0.02  # fraction of the parameters that may be replicated on a mesh that could shard them


def check_training(
    config: TrainConfig,
    topology: str,
    mesh: str = "",
    num_slices: int = 1,
    features: bool = False,
    name: str = "",
    machine_code: bool = True,
) -> Report:
    """Compiles the step of `config` for `topology`; without `machine_code`, only as far as `buffers.py` does.

    `mesh` overrides the config's; if neither is set, all devices are on `fsdp` and slices on `data`.  Raises
    InputErrors for settings that do not go together and CompileError for what the compiler refuses; a program that does
    not fit gives a Report.
    """
    device_mesh = slice_mesh(topology, mesh or config.mesh, num_slices)
    config = dataclasses.replace(config, training=on_mesh(config.training, device_mesh))
    shape, loop = largest(config.data.shapes), config.training
    check_rows(config.data.shapes, loop.batch_size, loop.micro_batches, device_mesh)
    with jax.set_mesh(device_mesh):
        layout = lay_out(config, device_mesh)
        replicated = check_replicated(layout, device_mesh)
        step = make_train_step(
            layout.structure,
            config.optimizer,
            loop,
            lr_factors(layout.trained, config.optimizer),
            loop.steps or 1000,
            specs=specs(layout.trained),
        )
        state = state_layout(config.optimizer, layout.trained, device_mesh)
        batch = abstract_batch(config, layout.config, shape, device_mesh, features)
        lowered = step.lower(state, layout.frozen, batch)
        return compile_report(
            lowered,
            chip_of(topology),
            num_slices,
            step_flops(config, layout, shape, features),
            remedy(config, device_mesh, shape),
            flops_done_again(layout.config.text_config, loop.remat, loop.batch_size, shape.tokens),
            machine_code,
            program=f"{name}: {loop.batch_size} rows of {shape.frames} frames and {shape.tokens} tokens, "
            f"{loop.micro_batches} micro-batches, remat={loop.remat}",
            topology=topology if num_slices == 1 else f"{num_slices} × {topology}",
            devices=device_mesh.size,
            mesh=describe(device_mesh.shape) or "one device",
            replicated_mib=replicated,
            published=share_of_peak(chip_of(topology).kind) or 0.0,
        )


def largest(shapes: Sequence[RowShape]) -> RowShape:
    """The bucket that needs most: that with the longest rows; of several, that with the most frames, and so on."""
    return max(shapes, key=lambda shape: (shape.tokens, shape.frames, shape.pairs, shape.questions))


def abstract_batch(
    config: TrainConfig, model: LLaMAVIDLlavaConfig, shape: RowShape, mesh: Mesh, features: bool
) -> Batch:
    """What the loader hands to a step, as shapes."""
    vision = model.vision_tower_config

    def rows(kind: Any, *sizes: int, field: str = "") -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((config.training.batch_size, *sizes), kind, sharding=batch_sharding(mesh, field))

    if features:
        frames = rows(config.training.dtype, shape.frames, vision.num_patches, vision.hidden_size, field="frames")
    else:
        frames = rows(jnp.uint8, shape.frames, vision.image_size, vision.image_size, 3, field="frames")
    of_pairs, of_tokens = rows(jnp.int32, shape.pairs), rows(jnp.int32, shape.tokens)
    segments = of_tokens if config.data.packing else None
    return Batch(
        frames=frames,
        pair_frame=of_pairs,
        pair_question=of_pairs,
        question_ids=rows(jnp.int32, shape.questions, config.data.question_tokens),
        question_mask=rows(jnp.bool_, shape.questions, config.data.question_tokens),
        token_ids=of_tokens,
        visual_index=of_tokens,
        labels=of_tokens,
        segment_ids=segments,
        positions=segments,
    )


def step_flops(config: TrainConfig, layout: Layout, shape: RowShape, features: bool) -> int:
    """FLOPs of a step over all devices, by the formula of `flops.py`."""
    rows = config.training.batch_size
    return flops_per_step(
        layout.config,
        {part: any(path.startswith(part) for path in layout.trained) for part in PARTS},
        frames=0 if features else rows * shape.frames,
        pairs=rows * shape.pairs,
        question_tokens=config.data.question_tokens,
        rows=rows,
        row_tokens=shape.tokens,
    )


def check_replicated(layout: Layout, mesh: Mesh) -> dict[str, float]:
    """The largest parameters that are replicated on all devices, in MiB.

    Raises ShardingError if replicated ones are more than REPLICATED of all parameters on a mesh that should shard them.
    """
    leaves: Mapping[str, jax.ShapeDtypeStruct] = layout.trained | layout.frozen
    whole = {path: leaf for path, leaf in leaves.items() if leaf.sharding.is_fully_replicated}
    by_size = sorted(whole, key=lambda path: -whole[path].size)[:5]
    part = sum(leaf.size for leaf in whole.values()) / sum(leaf.size for leaf in leaves.values())
    if shards(mesh.shape, "embed") * shards(mesh.shape, "heads") > 1 and part > REPLICATED:
        raise ShardingError(
            f"{part:.1%} of the parameters are replicated, {by_size[0]} {whole[by_size[0]].shape} first; "
            f"at most {REPLICATED:.0%} may be: choose axes that divide them, not {describe(mesh.shape)}"
        )
    return {path: whole[path].size * whole[path].dtype.itemsize / 2**20 for path in by_size}


def remedy(config: TrainConfig, mesh: Mesh, shape: RowShape) -> str:
    """What to change if the step does not fit."""
    loop, batch_shards = config.training, copies(mesh)
    tries = [] if loop.remat == "full" else ["training.remat=full"]
    if loop.batch_size // loop.micro_batches > batch_shards:
        tries.append(f"training.micro_batches={min(2 * loop.micro_batches, loop.batch_size // batch_shards)}")
    if mesh.shape[FSDP] < mesh.size:
        tries.append(f"more of the mesh on {FSDP}")
    elif shape.tokens >= 8192:
        tries.append(f"{SEQUENCE}={2 * mesh.shape[SEQUENCE]}")
    return f"try {' or '.join(tries)}" if tries else "try a larger slice, or a generation with more memory"
