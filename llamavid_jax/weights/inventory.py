"""The inventory: every weight of a configured model, its shape and its axes.

Sharding, size checks, conversion in both directions, adapters and quantised kernels use it, so that no model has to be
built to learn its shapes.
"""

import math
from collections.abc import Mapping

from llamavid_jax.config.schema import LLaMAVIDLlavaConfig, projector_depth
from llamavid_jax.errors import CheckpointError
from llamavid_jax.weights import llama, qformer, vision, visual_tokens
from llamavid_jax.weights.row import W, in_blocks, low_rank

BLOCK = 64  # inputs of a quantised kernel that share a scale
Axes = tuple[str | None, ...]


def rows(config: LLaMAVIDLlavaConfig) -> tuple[W, ...]:
    """One row a weight, in the order of the dataflow, without adapters and quantisation."""
    projector = config.mm_projector_type
    return (
        *vision.rows(config.vision_tower_config),
        *qformer.rows(config.bert_type),
        *visual_tokens.rows(projector, projector_depth(projector), config.projects_memory),
        *llama.rows(config.text_config.tie_word_embeddings),
    )


def shapes(config: LLaMAVIDLlavaConfig) -> dict[str, tuple[int, ...]]:
    """Dotted path → shape of every parameter; of quantised kernels, their `qvalue` and `scale`."""
    sizes, found = axis_sizes(config), {}
    quantised = {} if config.quantization == "none" else llama.QUANTISED
    for row in rows(config):
        shape = tuple(sizes[name] for name in row.axes.split())
        found |= block_shapes(row, shape) if row.path in quantised else {row.path: shape}
    return found


def block_shapes(row: W, shape: tuple[int, ...], block: int | None = None) -> dict[str, tuple[int, ...]]:
    """Path → shape of a quantised kernel's values and scales; `block` inputs share one scale."""
    at = row.input_axes
    block = block or math.gcd(BLOCK, shape[at])
    before, after = (*shape[:at], shape[at] // block), shape[at + 1 :]
    return {f"{row.path}.qvalue": (*before, block, *after), f"{row.path}.scale": (*before, 1, *after)}


def axes(config: LLaMAVIDLlavaConfig, given: Mapping[str, tuple[int, ...]]) -> dict[str, Axes]:
    """The axis names of every path of `given`, path → shape.

    Kernels may be quantised, with None for the inputs of a block, and may have low-rank updates, all of one rank.
    Raises CheckpointError for a path without a row, a row without a path, and a shape that is not the row's.
    """
    sizes = axis_sizes(config)
    sizes["rank"] = next((shape[-1] for path, shape in given.items() if path.endswith(".lora.a")), 0)
    known = {row.path: row for row in rows(config)}
    unused = set(known)
    updates = {update.path: update for row in llama.KERNELS.values() for update in low_rank(row)}
    found: dict[str, Axes] = {}
    for path, shape in given.items():
        kernel, _, part = path.rpartition(".")
        if part in ("qvalue", "scale") and kernel in llama.QUANTISED:
            found[path] = _axes_in_blocks(known[kernel], path, tuple(shape), sizes)
            unused.discard(kernel)
            continue
        row = known.get(path) or updates.get(path)
        if row is None:
            raise CheckpointError(f"parameter {path} {tuple(shape)} has no row in llamavid_jax/weights; add one")
        names = tuple(row.axes.split())
        expected = tuple(sizes[name] for name in names)
        if expected != tuple(shape):
            raise CheckpointError(f"{path} is {' '.join(names)} = {expected} by its row, but {tuple(shape)} here")
        unused.discard(path)
        found[path] = names
    if unused:
        raise CheckpointError(f"the row {min(unused)} of llamavid_jax/weights matches no parameter")
    return found


def _axes_in_blocks(row: W, path: str, shape: tuple[int, ...], sizes: Mapping[str, int]) -> Axes:
    """The axes of a quantised kernel's `qvalue` or `scale`, which must be those of complete blocks."""
    whole, at = tuple(sizes[name] for name in row.axes.split()), row.input_axes
    number = shape[at] if len(shape) > len(whole) and shape[at] and whole[at] % shape[at] == 0 else 1
    if shape != block_shapes(row, whole, whole[at] // number)[path]:
        raise CheckpointError(f"{path}: all of {row.axes} = {whole} by its row; {shape} is not its blocks")
    return in_blocks(row)


def axis_sizes(config: LLaMAVIDLlavaConfig) -> dict[str, int]:
    """The size of every axis name."""
    vision, qformer, text = config.vision_tower_config, config.qformer_config, config.text_config
    return {
        "layers": text.num_hidden_layers,
        "embed": text.hidden_size,
        "hidden": text.hidden_size,
        "heads": text.num_attention_heads,
        "kv_heads": text.num_key_value_heads,
        "head_dim": text.head_dim,
        "mlp": text.intermediate_size,
        "vocab": text.vocab_size,
        "vision_layers": vision.num_hidden_layers,
        "vision_embed": vision.hidden_size,
        "memory": config.memory_width,
        "memory_hidden": config.memory_width,
        "context": vision.hidden_size,
        "vision_heads": vision.num_attention_heads,
        "vision_head_dim": vision.hidden_size // vision.num_attention_heads,
        "vision_mlp": vision.intermediate_size,
        "qkv": 3,
        "patch_row": vision.patch_size,
        "patch_column": vision.patch_size,
        "channels": 3,
        "positions": 1 + vision.num_patches,
        "qformer_layers": qformer.num_hidden_layers,
        "qformer_cross_layers": qformer.num_cross_attention_layers,
        "qformer_embed": qformer.hidden_size,
        "qformer_heads": qformer.num_attention_heads,
        "qformer_head_dim": qformer.hidden_size // qformer.num_attention_heads,
        "qformer_mlp": qformer.intermediate_size,
        "qformer_types": 2,
        "qformer_vocab": qformer.vocab_size,
        "qformer_positions": qformer.max_position_embeddings,
        "queries": config.num_query,
    }
