"""EVA ViT's weights.

EVA's keys have no bias: the documented form fuses the query bias, zeros and the value bias into one `qkv.bias`.
"""

from llamavid_jax.weights.row import W

_NAME, _DOCUMENTED = "model.vision_tower.vision_tower.", "vision_tower."
_E, _LAYERS = "vision_embed", "vision_layers"


def _w(path: str, axes: str, torch: str, name: str, documented: str) -> W:
    return W(f"vision.{path}", axes, torch, _NAME + name, f"{_DOCUMENTED}{documented}")


def _b(path: str, axes: str, torch: str, name: str, documented: str) -> W:
    """The row of a weight of every block."""
    place = f"blocks.{{l}}.{name}", f"encoder.layers.{{l}}.{documented}"
    return _w(f"blocks.{path}", f"{_LAYERS} {axes}", torch, *place)


_NH = "vision_heads vision_head_dim"
ROWS = (
    _w("cls_token", _E, f"1 1 {_E}", "cls_token", "embeddings.class_embedding"),
    _w("position", f"positions {_E}", f"1 positions {_E}", "pos_embed", "embeddings.position_embedding"),
    _w(
        "patch_embed.kernel",
        f"patch_row patch_column channels {_E}",
        f"{_E} channels patch_row patch_column",
        "patch_embed.proj.weight",
        "embeddings.patch_embedding.weight",
    ),
    _w("patch_embed.bias", _E, _E, "patch_embed.proj.bias", "embeddings.patch_embedding.bias"),
    _b("attn_norm.scale", _E, _E, "norm1.weight", "layer_norm1.weight"),
    _b("attn_norm.bias", _E, _E, "norm1.bias", "layer_norm1.bias"),
    _b("attn.qkv.kernel", f"{_E} qkv {_NH}", f"(qkv {_NH}) {_E}", "attn.qkv.weight", "self_attn.qkv.weight"),
    _b("attn.q_bias", _NH, f"({_NH})", "attn.q_bias", "self_attn.qkv.bias[0]"),
    _b("attn.v_bias", _NH, f"({_NH})", "attn.v_bias", "self_attn.qkv.bias[2]"),
    _b("attn.out.kernel", f"{_NH} {_E}", f"{_E} ({_NH})", "attn.proj.weight", "self_attn.projection.weight"),
    _b("attn.out.bias", _E, _E, "attn.proj.bias", "self_attn.projection.bias"),
    _b("mlp_norm.scale", _E, _E, "norm2.weight", "layer_norm2.weight"),
    _b("mlp_norm.bias", _E, _E, "norm2.bias", "layer_norm2.bias"),
    _b("mlp.fc1.kernel", f"{_E} vision_mlp", f"vision_mlp {_E}", "mlp.fc1.weight", "mlp.fc1.weight"),
    _b("mlp.fc1.bias", "vision_mlp", "vision_mlp", "mlp.fc1.bias", "mlp.fc1.bias"),
    _b("mlp.fc2.kernel", f"vision_mlp {_E}", f"{_E} vision_mlp", "mlp.fc2.weight", "mlp.fc2.weight"),
    _b("mlp.fc2.bias", _E, _E, "mlp.fc2.bias", "mlp.fc2.bias"),
)  # fmt: skip
