"""The Q-Former's weights.

The queries and the norm of the memory, which the original keeps beside the encoder (`vlm_att_query`, `vlm_att_ln`),
belong to it here.
"""

from llamavid_jax.weights.row import W

_NAME, _DOCUMENTED = "model.vlm_att_encoder.bert.", "qformer."
_WIDTH, _HEADS, _MLP = "qformer_embed", "qformer_heads qformer_head_dim", "qformer_mlp"


def _w(path: str, axes: str, torch: str, name: str, documented: str = "") -> W:
    return W(f"qformer.{path}", axes, torch, _NAME + name, _DOCUMENTED + (documented or name))


def _linear(path: str, layers: str, inputs: str, outputs: str, name: str, documented: str = "") -> tuple[W, W]:
    """A linear layer; several axes on one side are one in the files."""
    left, right = (f"({axes})" if " " in axes else axes for axes in (outputs, inputs))
    documented = documented or name
    kernel = f"{layers} {inputs} {outputs}", f"{left} {right}"
    return (
        _w(f"{path}.kernel", *kernel, f"{name}.weight", f"{documented}.weight"),
        _w(f"{path}.bias", f"{layers} {outputs}", left, f"{name}.bias", f"{documented}.bias"),
    )  # fmt: skip


def _norm(path: str, layers: str, name: str, documented: str = "") -> tuple[W, W]:
    axes, documented = f"{layers} {_WIDTH}".strip(), documented or name
    return (
        _w(f"{path}.scale", axes, _WIDTH, f"{name}.weight", f"{documented}.weight"),
        _w(f"{path}.bias", axes, _WIDTH, f"{name}.bias", f"{documented}.bias"),
    )


def _attention(path: str, layers: str, memory: str, name: str) -> tuple[W, ...]:
    """Keys and values are made of `memory`."""
    return (
        *_linear(f"{path}.query", layers, _WIDTH, _HEADS, f"{name}.self.query", f"{name}.attention.query"),
        *_linear(f"{path}.key", layers, memory, _HEADS, f"{name}.self.key", f"{name}.attention.key"),
        *_linear(f"{path}.value", layers, memory, _HEADS, f"{name}.self.value", f"{name}.attention.value"),
        *_linear(f"{path}.out", layers, _HEADS, _WIDTH, f"{name}.output.dense"),
        *_norm(f"{path}.norm", layers, f"{name}.output.LayerNorm"),
    )


def _mlp(path: str, name: str) -> tuple[W, ...]:
    """`name` is "" for the text's, "_query" for the queries'."""
    first, second = f"encoder.layer.{{l}}.intermediate{name}", f"encoder.layer.{{l}}.output{name}"
    return (
        *_linear(f"{path}.fc1", "qformer_layers", _WIDTH, _MLP, f"{first}.dense"),
        *_linear(f"{path}.fc2", "qformer_layers", _MLP, _WIDTH, f"{second}.dense"),
        *_norm(f"{path}.norm", "qformer_layers", f"{second}.LayerNorm"),
    )


_MEMORY = "model.vlm_att_ln.{}", "vision_tower.post_layernorm.{}"
ROWS = (
    W("qformer.query", f"queries {_WIDTH}", f"1 queries {_WIDTH}", "model.vlm_att_query", "query_tokens"),
    W("qformer.memory_norm.scale", "vision_embed", "vision_embed", *(name.format("weight") for name in _MEMORY)),
    W("qformer.memory_norm.bias", "vision_embed", "vision_embed", *(name.format("bias") for name in _MEMORY)),
    _w("word_embeddings.embedding", *[f"qformer_vocab {_WIDTH}"] * 2, "embeddings.word_embeddings.weight"),
    _w("position_embeddings.embedding", *[f"qformer_positions {_WIDTH}"] * 2, "embeddings.position_embeddings.weight"),
    *_norm("embeddings_norm", "", "embeddings.LayerNorm", "embeddings.layernorm"),
    *_attention("layers.self_attention", "qformer_layers", _WIDTH, "encoder.layer.{l}.attention"),
    *_mlp("layers.text_mlp", ""),
    *_mlp("layers.query_mlp", "_query"),
    *_attention("cross_attention", "qformer_cross_layers", "vision_embed", "encoder.layer.{c}.crossattention"),
)
