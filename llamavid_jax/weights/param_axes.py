"""What the dimensions of every parameter are called: path → axis names, and the size of each name.

`parallel/sharding.py` maps the names to mesh axes; here nothing is known of devices.
"""

from llamavid_jax.config.schema import LLaMAVIDLlavaConfig

PARAM_AXES: dict[str, str] = {
    # vision
    "vision.patch_embed.kernel": "patch_row patch_column channels vision_embed",
    "vision.patch_embed.bias": "vision_embed",
    "vision.cls_token": "vision_embed",
    "vision.position": "positions vision_embed",
    "vision.blocks.attn_norm.scale": "vision_layers vision_embed",
    "vision.blocks.attn_norm.bias": "vision_layers vision_embed",
    "vision.blocks.mlp_norm.scale": "vision_layers vision_embed",
    "vision.blocks.mlp_norm.bias": "vision_layers vision_embed",
    "vision.blocks.attn.qkv.kernel": "vision_layers vision_embed qkv vision_heads vision_head_dim",
    "vision.blocks.attn.q_bias": "vision_layers vision_heads vision_head_dim",
    "vision.blocks.attn.v_bias": "vision_layers vision_heads vision_head_dim",
    "vision.blocks.attn.out.kernel": "vision_layers vision_heads vision_head_dim vision_embed",
    "vision.blocks.attn.out.bias": "vision_layers vision_embed",
    "vision.blocks.mlp.fc1.kernel": "vision_layers vision_embed vision_mlp",
    "vision.blocks.mlp.fc1.bias": "vision_layers vision_mlp",
    "vision.blocks.mlp.fc2.kernel": "vision_layers vision_mlp vision_embed",
    "vision.blocks.mlp.fc2.bias": "vision_layers vision_embed",
    # q-former
    "qformer.query": "queries qformer_embed",
    "qformer.memory_norm.scale": "vision_embed",
    "qformer.memory_norm.bias": "vision_embed",
    "qformer.word_embeddings.embedding": "qformer_vocab qformer_embed",
    "qformer.position_embeddings.embedding": "qformer_positions qformer_embed",
    "qformer.embeddings_norm.scale": "qformer_embed",
    "qformer.embeddings_norm.bias": "qformer_embed",
    "qformer.layers.self_attention.key.kernel": "qformer_layers qformer_embed qformer_heads qformer_head_dim",
    "qformer.layers.self_attention.value.kernel": "qformer_layers qformer_embed qformer_heads qformer_head_dim",
    "qformer.cross_attention.key.kernel": "qformer_cross_layers vision_embed qformer_heads qformer_head_dim",
    "qformer.cross_attention.value.kernel": "qformer_cross_layers vision_embed qformer_heads qformer_head_dim",
    "qformer.layers.self_attention.query.kernel": "qformer_layers qformer_embed qformer_heads qformer_head_dim",
    "qformer.layers.self_attention.query.bias": "qformer_layers qformer_heads qformer_head_dim",
    "qformer.layers.self_attention.key.bias": "qformer_layers qformer_heads qformer_head_dim",
    "qformer.layers.self_attention.value.bias": "qformer_layers qformer_heads qformer_head_dim",
    "qformer.layers.self_attention.out.kernel": "qformer_layers qformer_heads qformer_head_dim qformer_embed",
    "qformer.layers.self_attention.out.bias": "qformer_layers qformer_embed",
    "qformer.layers.self_attention.norm.scale": "qformer_layers qformer_embed",
    "qformer.layers.self_attention.norm.bias": "qformer_layers qformer_embed",
    "qformer.cross_attention.query.kernel": "qformer_cross_layers qformer_embed qformer_heads qformer_head_dim",
    "qformer.cross_attention.query.bias": "qformer_cross_layers qformer_heads qformer_head_dim",
    "qformer.cross_attention.key.bias": "qformer_cross_layers qformer_heads qformer_head_dim",
    "qformer.cross_attention.value.bias": "qformer_cross_layers qformer_heads qformer_head_dim",
    "qformer.cross_attention.out.kernel": "qformer_cross_layers qformer_heads qformer_head_dim qformer_embed",
    "qformer.cross_attention.out.bias": "qformer_cross_layers qformer_embed",
    "qformer.cross_attention.norm.scale": "qformer_cross_layers qformer_embed",
    "qformer.cross_attention.norm.bias": "qformer_cross_layers qformer_embed",
    "qformer.layers.query_mlp.fc1.kernel": "qformer_layers qformer_embed qformer_mlp",
    "qformer.layers.query_mlp.fc1.bias": "qformer_layers qformer_mlp",
    "qformer.layers.query_mlp.fc2.kernel": "qformer_layers qformer_mlp qformer_embed",
    "qformer.layers.query_mlp.fc2.bias": "qformer_layers qformer_embed",
    "qformer.layers.query_mlp.norm.scale": "qformer_layers qformer_embed",
    "qformer.layers.query_mlp.norm.bias": "qformer_layers qformer_embed",
    "qformer.layers.text_mlp.fc1.kernel": "qformer_layers qformer_embed qformer_mlp",
    "qformer.layers.text_mlp.fc1.bias": "qformer_layers qformer_mlp",
    "qformer.layers.text_mlp.fc2.kernel": "qformer_layers qformer_mlp qformer_embed",
    "qformer.layers.text_mlp.fc2.bias": "qformer_layers qformer_embed",
    "qformer.layers.text_mlp.norm.scale": "qformer_layers qformer_embed",
    "qformer.layers.text_mlp.norm.bias": "qformer_layers qformer_embed",
    # visual tokens
    "visual_tokens.query_projector.kernel": "qformer_embed context",
    "visual_tokens.query_projector.bias": "context",
    "visual_tokens.key_projector.kernel": "vision_embed context",
    "visual_tokens.key_projector.bias": "context",
    "visual_tokens.value_projector.kernel": "vision_embed hidden",
    "visual_tokens.value_projector.bias": "hidden",
    "visual_tokens.projector.0.kernel": "vision_embed hidden",
    "visual_tokens.projector.*.kernel": "embed hidden",  # the second layer and on
    "visual_tokens.projector.*.bias": "hidden",
    # llama
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


def input_axes(axes: str) -> int:
    """How many axes of a stacked kernel are summed over: the hidden state, "embed" alone, is one side of a product."""
    _, first, *inner = axes.split()
    return 1 if first.endswith("embed") else len(inner)


def in_blocks(axes: str) -> tuple[str | None, ...]:
    """A kernel's axes where quantisation has cut its last input axis into blocks: None for the inputs of a block."""
    names, inner = axes.split(), input_axes(axes)
    return (*names[: 1 + inner], None, *names[1 + inner :])


def _adapter_axes(path: str, axes: str) -> dict[str, str]:
    """The rows of a kernel's low-rank update: the axes on either side of the product, and the rank."""
    layers, *inner = axes.split()
    cut, place = input_axes(axes), path.removesuffix("kernel") + "lora"
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
