"""EVA ViT's weights: original name, our path, einops pattern (torch -> ours), documented name.

`{l}` is the block.  Letters: e width, m MLP width, n heads, h head size, t = 3 (query, key, value), o c p q the patch
convolution (o = e outputs, c = 3 colours, p q the patch).  EVA has no key bias: the documented form fuses the
query bias, zeros and the value bias into one `qkv.bias`; `[0]` and `[2]` are its first and last third.
"""

from conversion.transforms import Row

_ORIGINAL = "model.vision_tower.vision_tower."
_BLOCK = _ORIGINAL + "blocks.{l}."
_LAYER = "vision_tower.encoder.layers.{l}."

ROWS = (
    Row(_ORIGINAL + "cls_token", "vision.cls_token", "1 1 e -> e", "vision_tower.embeddings.class_embedding"),
    Row(_ORIGINAL + "pos_embed", "vision.position", "1 p e -> p e", "vision_tower.embeddings.position_embedding"),
    Row(
        _ORIGINAL + "patch_embed.proj.weight",
        "vision.patch_embed.kernel",
        "o c p q -> p q c o",
        "vision_tower.embeddings.patch_embedding.weight",
    ),
    Row(
        _ORIGINAL + "patch_embed.proj.bias",
        "vision.patch_embed.bias",
        "e -> e",
        "vision_tower.embeddings.patch_embedding.bias",
    ),
    Row(_BLOCK + "norm1.weight", "vision.blocks.attn_norm.scale", "e -> e", _LAYER + "layer_norm1.weight"),
    Row(_BLOCK + "norm1.bias", "vision.blocks.attn_norm.bias", "e -> e", _LAYER + "layer_norm1.bias"),
    Row(
        _BLOCK + "attn.qkv.weight",
        "vision.blocks.attn.qkv.kernel",
        "(t n h) e -> e t n h",
        _LAYER + "self_attn.qkv.weight",
    ),
    Row(_BLOCK + "attn.q_bias", "vision.blocks.attn.q_bias", "(n h) -> n h", _LAYER + "self_attn.qkv.bias[0]"),
    Row(_BLOCK + "attn.v_bias", "vision.blocks.attn.v_bias", "(n h) -> n h", _LAYER + "self_attn.qkv.bias[2]"),
    Row(
        _BLOCK + "attn.proj.weight",
        "vision.blocks.attn.out.kernel",
        "e (n h) -> n h e",
        _LAYER + "self_attn.projection.weight",
    ),
    Row(_BLOCK + "attn.proj.bias", "vision.blocks.attn.out.bias", "e -> e", _LAYER + "self_attn.projection.bias"),
    Row(_BLOCK + "norm2.weight", "vision.blocks.mlp_norm.scale", "e -> e", _LAYER + "layer_norm2.weight"),
    Row(_BLOCK + "norm2.bias", "vision.blocks.mlp_norm.bias", "e -> e", _LAYER + "layer_norm2.bias"),
    Row(_BLOCK + "mlp.fc1.weight", "vision.blocks.mlp.fc1.kernel", "m e -> e m", _LAYER + "mlp.fc1.weight"),
    Row(_BLOCK + "mlp.fc1.bias", "vision.blocks.mlp.fc1.bias", "m -> m", _LAYER + "mlp.fc1.bias"),
    Row(_BLOCK + "mlp.fc2.weight", "vision.blocks.mlp.fc2.kernel", "e m -> m e", _LAYER + "mlp.fc2.weight"),
    Row(_BLOCK + "mlp.fc2.bias", "vision.blocks.mlp.fc2.bias", "e -> e", _LAYER + "mlp.fc2.bias"),
)
