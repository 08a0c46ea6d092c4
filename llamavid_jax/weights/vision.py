"""The vision tower's weights.

EVA's keys have no bias: the documented form fuses the query bias, zeros and the value bias into one `qkv.bias`.  CLIP
has the same names in both layouts.
"""

from llamavid_jax.config.schema import LLaMAVIDLlavaVisionConfig
from llamavid_jax.weights.row import W, linear, norm

_NAME, _DOCUMENTED = "model.vision_tower.vision_tower.", "vision_tower."
_E, _NH = "vision_embed", "vision_heads vision_head_dim"
_KERNEL = "patch_row patch_column channels vision_embed", "vision_embed channels patch_row patch_column"


def rows(config: LLaMAVIDLlavaVisionConfig) -> tuple[W, ...]:
    return {"eva": _EVA, "clip": _CLIP}[config.kind]


def _w(path: str, axes: str, torch: str, name: str, documented: str) -> W:
    return W(f"vision.{path}", axes, torch, _NAME + name, _DOCUMENTED + documented)


def _blocks(make, path: str, *axes: str, names: tuple[str, str]) -> tuple[W, W]:
    """Kernel or scale, and bias, of every block."""
    return make(f"vision.blocks.{path}", "vision_layers", *axes, _NAME + names[0], _DOCUMENTED + names[1])


def _block(path: str, axes: str, torch: str, name: str, documented: str) -> W:
    return _w(
        f"blocks.{path}", f"vision_layers {axes}", torch, f"blocks.{{l}}.{name}", f"encoder.layers.{{l}}.{documented}"
    )


def _eva(make, path: str, *axes: str, name: str, documented: str = "") -> tuple[W, W]:
    return _blocks(make, path, *axes, names=(f"blocks.{{l}}.{name}", f"encoder.layers.{{l}}.{documented or name}"))


_EVA = (
    _w("cls_token", _E, f"1 1 {_E}", "cls_token", "embeddings.class_embedding"),
    _w("position", f"positions {_E}", f"1 positions {_E}", "pos_embed", "embeddings.position_embedding"),
    _w("patch_embed.kernel", *_KERNEL, "patch_embed.proj.weight", "embeddings.patch_embedding.weight"),
    _w("patch_embed.bias", _E, _E, "patch_embed.proj.bias", "embeddings.patch_embedding.bias"),
    *_eva(norm, "attn_norm", _E, name="norm1", documented="layer_norm1"),
    _block("attn.qkv.kernel", f"{_E} qkv {_NH}", f"(qkv {_NH}) {_E}", "attn.qkv.weight", "self_attn.qkv.weight"),
    _block("attn.q_bias", _NH, f"({_NH})", "attn.q_bias", "self_attn.qkv.bias[0]"),
    _block("attn.v_bias", _NH, f"({_NH})", "attn.v_bias", "self_attn.qkv.bias[2]"),
    *_eva(linear, "attn.out", _NH, _E, name="attn.proj", documented="self_attn.projection"),
    *_eva(norm, "mlp_norm", _E, name="norm2", documented="layer_norm2"),
    *_eva(linear, "mlp.fc1", _E, "vision_mlp", name="mlp.fc1"),
    *_eva(linear, "mlp.fc2", "vision_mlp", _E, name="mlp.fc2"),
)


def _clip(make, path: str, *axes: str, name: str) -> tuple[W, W]:
    return _blocks(make, path, *axes, names=(f"vision_model.encoder.layers.{{l}}.{name}",) * 2)


def _whole(path: str, axes: str, torch: str, name: str) -> W:
    return _w(path, axes, torch, *(f"vision_model.{name}",) * 2)


_NORMS = tuple(
    row
    for ours, theirs in (("pre_norm", "pre_layrnorm"), ("post_norm", "post_layernorm"))  # "pre_layrnorm" is CLIP's own
    for row in norm(f"vision.{ours}", "", _E, *(f"{start}vision_model.{theirs}" for start in (_NAME, _DOCUMENTED)))
)
_CLIP = (
    _whole("cls_token", _E, _E, "embeddings.class_embedding"),
    _whole("position", f"positions {_E}", f"positions {_E}", "embeddings.position_embedding.weight"),
    _whole("patch_embed.kernel", *_KERNEL, "embeddings.patch_embedding.weight"),
    *_NORMS,
    *_clip(norm, "attn_norm", _E, name="layer_norm1"),
    *_clip(linear, "attn.q", _E, _NH, name="self_attn.q_proj"),
    *_clip(linear, "attn.k", _E, _NH, name="self_attn.k_proj"),
    *_clip(linear, "attn.v", _E, _NH, name="self_attn.v_proj"),
    *_clip(linear, "attn.out", _NH, _E, name="self_attn.out_proj"),
    *_clip(norm, "mlp_norm", _E, name="layer_norm2"),
    *_clip(linear, "mlp.fc1", _E, "vision_mlp", name="mlp.fc1"),
    *_clip(linear, "mlp.fc2", "vision_mlp", _E, name="mlp.fc2"),
)
