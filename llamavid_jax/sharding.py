"""Where every array lives on a device mesh: one table from parameter path to axis names, one from axis to mesh axes.

The mesh has four axes: `data` (copies of the model; across slices), `fsdp` (parameters cut along their width),
`tensor` (heads and MLP cut) and `sequence` (long rows cut).  Modules know nothing of it but `constrain`.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from llamavid_jax.config import LLaMAVIDLlavaConfig
from llamavid_jax.errors import InputError

MESH_AXES = ("data", "fsdp", "tensor", "sequence")

AXIS_RULES: Mapping[str, str | tuple[str, ...] | None] = {
    # activations
    "batch": ("data", "fsdp"),
    "frames": ("data", "fsdp", "tensor", "sequence"),
    "sequence": "sequence",
    # llama
    "layers": None,
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "vocab": "tensor",
    "rank": None,
    # vision
    "vision_layers": None,
    "vision_embed": "fsdp",
    "vision_heads": "tensor",
    "vision_head_dim": None,
    "vision_mlp": "tensor",
    "context": "tensor",
    "qkv": None,
    "patch_row": None,
    "patch_column": None,
    "channels": None,
    "positions": None,
    # q-former
    "qformer_layers": None,
    "qformer_cross_layers": None,
    "qformer_embed": "fsdp",
    "qformer_heads": "tensor",
    "qformer_head_dim": None,
    "qformer_mlp": "tensor",
    "qformer_vocab": None,
    "qformer_positions": None,
    "queries": None,
    "hidden": "tensor",
}

_NORM = ("scale", "bias")
PARAM_AXES: dict[str, str] = {
    "vision.patch_embed.kernel": "patch_row patch_column channels vision_embed",
    "vision.patch_embed.bias": "vision_embed",
    "vision.cls_token": "vision_embed",
    "vision.position": "positions vision_embed",
    **{
        f"vision.blocks.{norm}.{part}": "vision_layers vision_embed"
        for norm in ("attn_norm", "mlp_norm")
        for part in _NORM
    },
    "vision.blocks.attn.qkv.kernel": "vision_layers vision_embed qkv vision_heads vision_head_dim",
    "vision.blocks.attn.q_bias": "vision_layers vision_heads vision_head_dim",
    "vision.blocks.attn.v_bias": "vision_layers vision_heads vision_head_dim",
    "vision.blocks.attn.out.kernel": "vision_layers vision_heads vision_head_dim vision_embed",
    "vision.blocks.attn.out.bias": "vision_layers vision_embed",
    "vision.blocks.mlp.fc1.kernel": "vision_layers vision_embed vision_mlp",
    "vision.blocks.mlp.fc1.bias": "vision_layers vision_mlp",
    "vision.blocks.mlp.fc2.kernel": "vision_layers vision_mlp vision_embed",
    "vision.blocks.mlp.fc2.bias": "vision_layers vision_embed",
    "qformer.query": "queries qformer_embed",
    **{f"qformer.memory_norm.{part}": "vision_embed" for part in _NORM},
    "qformer.word_embeddings.embedding": "qformer_vocab qformer_embed",
    "qformer.position_embeddings.embedding": "qformer_positions qformer_embed",
    **{f"qformer.embeddings_norm.{part}": "qformer_embed" for part in _NORM},
    "qformer.layers.self_attention.query.kernel": "qformer_layers qformer_embed qformer_heads qformer_head_dim",
    "qformer.layers.self_attention.key.kernel": "qformer_layers qformer_embed qformer_heads qformer_head_dim",
    "qformer.layers.self_attention.value.kernel": "qformer_layers qformer_embed qformer_heads qformer_head_dim",
    **{
        f"qformer.layers.self_attention.{part}.bias": "qformer_layers qformer_heads qformer_head_dim"
        for part in ("query", "key", "value")
    },
    "qformer.layers.self_attention.out.kernel": "qformer_layers qformer_heads qformer_head_dim qformer_embed",
    "qformer.layers.self_attention.out.bias": "qformer_layers qformer_embed",
    **{f"qformer.layers.self_attention.norm.{part}": "qformer_layers qformer_embed" for part in _NORM},
    "qformer.cross_attention.query.kernel": "qformer_cross_layers qformer_embed qformer_heads qformer_head_dim",
    "qformer.cross_attention.key.kernel": "qformer_cross_layers vision_embed qformer_heads qformer_head_dim",
    "qformer.cross_attention.value.kernel": "qformer_cross_layers vision_embed qformer_heads qformer_head_dim",
    **{
        f"qformer.cross_attention.{part}.bias": "qformer_cross_layers qformer_heads qformer_head_dim"
        for part in ("query", "key", "value")
    },
    "qformer.cross_attention.out.kernel": "qformer_cross_layers qformer_heads qformer_head_dim qformer_embed",
    "qformer.cross_attention.out.bias": "qformer_cross_layers qformer_embed",
    **{f"qformer.cross_attention.norm.{part}": "qformer_cross_layers qformer_embed" for part in _NORM},
    **{
        f"qformer.layers.{mlp}.{part}": axes
        for mlp in ("query_mlp", "text_mlp")
        for part, axes in {
            "fc1.kernel": "qformer_layers qformer_embed qformer_mlp",
            "fc1.bias": "qformer_layers qformer_mlp",
            "fc2.kernel": "qformer_layers qformer_mlp qformer_embed",
            "fc2.bias": "qformer_layers qformer_embed",
            "norm.scale": "qformer_layers qformer_embed",
            "norm.bias": "qformer_layers qformer_embed",
        }.items()
    },
    "visual_tokens.query_projector.kernel": "qformer_embed context",
    "visual_tokens.query_projector.bias": "context",
    "visual_tokens.key_projector.kernel": "vision_embed context",
    "visual_tokens.key_projector.bias": "context",
    "visual_tokens.value_projector.kernel": "vision_embed hidden",
    "visual_tokens.value_projector.bias": "hidden",
    "visual_tokens.projector.0.kernel": "vision_embed hidden",
    "visual_tokens.projector.*.kernel": "embed hidden",  # the second layer and on
    "visual_tokens.projector.*.bias": "hidden",
    "llama.embed.embedding": "vocab embed",
    "llama.layers.attn_norm.scale": "layers embed",
    "llama.layers.mlp_norm.scale": "layers embed",
    "llama.layers.attn.q.kernel": "layers embed heads head_dim",
    "llama.layers.attn.k.kernel": "layers embed kv_heads head_dim",
    "llama.layers.attn.v.kernel": "layers embed kv_heads head_dim",
    "llama.layers.attn.out.kernel": "layers heads head_dim embed",
    "llama.layers.mlp.gate.kernel": "layers embed mlp",
    "llama.layers.mlp.up.kernel": "layers embed mlp",
    "llama.layers.mlp.down.kernel": "layers mlp embed",
    "llama.norm.scale": "embed",
    "llama.lm_head.kernel": "embed vocab",
}


def _adapter_axes(path: str, axes: str) -> dict[str, str]:
    """The rows of a kernel's low-rank update (`lora.py`): the axes on either side of the product, and the rank.

    One side of every product is the hidden state: "embed" alone.
    """
    layers, *inner = axes.split()
    cut, place = 1 if inner[0] == "embed" else -1, path.removesuffix("kernel") + "lora"
    return {
        f"{place}.a": " ".join([layers, *inner[:cut], "rank"]),
        f"{place}.b": " ".join([layers, "rank", *inner[cut:]]),
    }


ADAPTER_AXES = {
    row: axes
    for path, kernel_axes in PARAM_AXES.items()
    if path.startswith("llama.layers.") and path.endswith(".kernel")
    for row, axes in _adapter_axes(path, kernel_axes).items()
}
OPTIONAL_ROWS = {  # tied embeddings have no head, an identity projector no layers, a linear one no second layer
    "llama.lm_head.kernel",
    "visual_tokens.projector.0.kernel",
    "visual_tokens.projector.*.kernel",
    "visual_tokens.projector.*.bias",
}


class ShardingError(InputError):
    """A mesh or a table row that does not fit: names it, the sizes and the remedy."""


def axis_sizes(config: LLaMAVIDLlavaConfig) -> dict[str, int]:
    """The size of every axis name that a parameter may carry."""
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
        "qformer_vocab": qformer.vocab_size,
        "qformer_positions": qformer.max_position_embeddings,
        "queries": config.num_query,
    }


def parse_mesh(text: str) -> dict[str, int]:
    """`"fsdp=4,tensor=2"` → axis sizes.  Raises ShardingError on an unknown axis or a size that is not a number."""
    sizes = {}
    for part in text.replace(",", " ").split():
        name, _, size = part.partition("=")
        if name not in MESH_AXES or name in sizes or not size.isdecimal() or not 1 <= int(size) < 2**31:
            raise ShardingError(
                f"mesh part {part!r} is not AXIS=SIZE with AXIS one of {', '.join(MESH_AXES)}, each once"
            )
        sizes[name] = int(size)
    return sizes


def make_mesh(devices: list[jax.Device] | None = None, **sizes: int) -> Mesh:
    """A mesh of the four axes; axes that are not named have size 1."""
    unknown = sorted(set(sizes) - set(MESH_AXES))
    if unknown:
        raise ShardingError(f"{unknown[0]!r} is no mesh axis; the axes are {', '.join(MESH_AXES)}")
    for axis, size in sizes.items():
        if type(size) is not int or size < 1:
            raise ShardingError(f"mesh axis {axis} has size {size!r}; use a whole number of 1 or more")
    devices = jax.devices() if devices is None else devices
    shape = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
    needed = math.prod(shape)
    if needed > len(devices):
        asked = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
        raise ShardingError(f"a mesh of {asked} needs {needed} devices; {len(devices)} are there")
    return jax.make_mesh(shape, MESH_AXES, devices=devices[:needed], axis_types=(AxisType.Auto,) * len(MESH_AXES))


def param_axes(shapes: Mapping[str, tuple[int, ...]], config: LLaMAVIDLlavaConfig) -> dict[str, tuple[str, ...]]:
    """Axis names of every parameter path.  Updates of the linear layers may be there or not, all of one rank.

    Strict both ways: a path without a row, a row without a path and a row whose axes have other sizes are errors.
    """
    sizes, rows, unused, axes = axis_sizes(config), PARAM_AXES | ADAPTER_AXES, set(PARAM_AXES) - OPTIONAL_ROWS, {}
    sizes["rank"] = next((shape[-1] for path, shape in shapes.items() if path.endswith(".lora.a")), 0)
    for path, shape in shapes.items():
        row = path if path in rows else ".".join("*" if part.isdigit() else part for part in path.split("."))
        if row not in rows:
            raise ShardingError(f"parameter {path} {shape} has no row in PARAM_AXES; add one")
        names = tuple(rows[row].split())
        expected = tuple(sizes[name] for name in names)
        if expected != tuple(shape):
            raise ShardingError(f"PARAM_AXES says {path} is {' '.join(names)} = {expected}, but it is {tuple(shape)}")
        unused.discard(row)
        axes[path] = names
    if unused:
        raise ShardingError(f"PARAM_AXES row {min(unused)} matches no parameter; remove it")
    return axes


def partition_spec(shape: tuple[int, ...], names: tuple[str | None, ...], mesh: Any) -> PartitionSpec:
    """Mesh axes of an array; a dimension is cut by those of its mesh axes, first to last, that divide it."""
    spec = []
    for size, name in zip(shape, names, strict=True):
        axes = []
        for axis in np.atleast_1d(AXIS_RULES[name] or []) if name else []:
            if mesh.shape[axis] > 1 and size % mesh.shape[axis] == 0:
                axes.append(str(axis))
                size //= mesh.shape[axis]
        spec.append(tuple(axes) if len(axes) > 1 else axes[0] if axes else None)
    return PartitionSpec(*spec)


def flat_paths(state: Any) -> dict[str, Any]:
    """`{"llama.norm.scale": leaf}` of a state or a nested dict."""
    return {
        ".".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path): leaf
        for path, leaf in jax.tree.flatten_with_path(
            nnx.to_pure_dict(state) if isinstance(state, nnx.State) else state
        )[0]
    }


def param_shardings(params: Any, config: LLaMAVIDLlavaConfig, mesh: Mesh) -> Any:
    """A NamedSharding for every parameter of a pure nested dict (arrays or ShapeDtypeStructs)."""
    paths = flat_paths(params)
    axes = param_axes({path: leaf.shape for path, leaf in paths.items()}, config)
    shardings = [NamedSharding(mesh, partition_spec(leaf.shape, axes[path], mesh)) for path, leaf in paths.items()]
    return jax.tree.unflatten(jax.tree.structure(params), shardings)


def activation_spec(shape: tuple[int, ...], *names: str | None) -> PartitionSpec:
    """The spec of an activation on the mesh in context; replicated without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return PartitionSpec(*[None] * len(shape)) if mesh.empty else partition_spec(shape, names, mesh)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Pins an activation's axes to the mesh in context; nothing without one."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, activation_spec(x.shape, *names))
