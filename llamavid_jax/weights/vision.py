"""The vision tower's weights.

EVA has no key bias: the documented layout fuses the query's bias, zeros and the value's into one `qkv.bias`.
"""

from llamavid_jax.config.schema import LLaMAVIDLlavaConfig
from llamavid_jax.weights.row import W, linear, norm

_TOWER, _EMBEDDINGS = "model.vision_tower.vision_tower.", "vision_tower.embeddings."
_BLOCK, _LAYER = _TOWER + "blocks.{l}.", "vision_tower.encoder.layers.{l}."
_WIDTH, _HEADS, _MLP = "vision_embed", "vision_heads vision_head_dim", "vision_mlp"


def rows(config: LLaMAVIDLlavaConfig) -> tuple[W, ...]:
    kernel = "patch_row patch_column channels vision_embed", "vision_embed channels patch_row patch_column"
    patch, fused = ("patch_embed.proj", "patch_embedding"), "self_attn.qkv"
    return (
        _embedding("cls_token", _WIDTH, f"1 1 {_WIDTH}", "cls_token", "class_embedding"),
        _embedding("position", f"positions {_WIDTH}", f"1 positions {_WIDTH}", "pos_embed", "position_embedding"),
        _embedding("patch_embed.kernel", *kernel, *(f"{name}.weight" for name in patch)),
        _embedding("patch_embed.bias", _WIDTH, _WIDTH, *(f"{name}.bias" for name in patch)),
        *_norm("attn_norm", "norm1", "layer_norm1"),
        _block(
            "attn.qkv.kernel",
            f"{_WIDTH} qkv {_HEADS}",
            f"(qkv {_HEADS}) {_WIDTH}",
            "attn.qkv.weight",
            f"{fused}.weight",
        ),
        _block("attn.q_bias", _HEADS, f"({_HEADS})", "attn.q_bias", f"{fused}.bias[0]"),
        _block("attn.v_bias", _HEADS, f"({_HEADS})", "attn.v_bias", f"{fused}.bias[2]"),
        *_linear("attn.out", _HEADS, _WIDTH, "attn.proj", "self_attn.projection"),
        *_norm("mlp_norm", "norm2", "layer_norm2"),
        *_linear("mlp.fc1", _WIDTH, _MLP, "mlp.fc1", "mlp.fc1"),
        *_linear("mlp.fc2", _MLP, _WIDTH, "mlp.fc2", "mlp.fc2"),
    )


def _embedding(path: str, axes: str, torch: str, name: str, documented: str) -> W:
    return W(f"vision.{path}", axes, torch, _TOWER + name, _EMBEDDINGS + documented)


def _block(path: str, axes: str, torch: str, name: str, documented: str) -> W:
    return W(f"vision.blocks.{path}", f"vision_layers {axes}", torch, _BLOCK + name, _LAYER + documented)


def _linear(path: str, inputs: str, outputs: str, name: str, documented: str) -> tuple[W, W]:
    return linear(f"vision.blocks.{path}", "vision_layers", inputs, outputs, _BLOCK + name, _LAYER + documented)


def _norm(path: str, name: str, documented: str) -> tuple[W, W]:
    return norm(f"vision.blocks.{path}", "vision_layers", _WIDTH, _BLOCK + name, _LAYER + documented)


def sizes(config: LLaMAVIDLlavaConfig) -> dict[str, int]:
    vision = config.vision_tower_config
    return {
        "vision_layers": vision.num_hidden_layers,
        "vision_embed": vision.hidden_size,
        "vision_heads": vision.num_attention_heads,
        "vision_head_dim": vision.hidden_size // vision.num_attention_heads,
        "vision_mlp": vision.intermediate_size,
        "qkv": 3,
        "patch_row": vision.patch_size,
        "patch_column": vision.patch_size,
        "channels": 3,
        "positions": 1 + vision.num_patches,
    }
