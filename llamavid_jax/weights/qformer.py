"""The text decoder's weights: the Q-Former's, or BERT's.

The queries and the norm of the memory, which the original keeps beside the encoder (`vlm_att_query`, `vlm_att_ln`),
belong to it here.
"""

from llamavid_jax.weights.row import W, linear, norm

_NAME, _DOCUMENTED = "model.vlm_att_encoder.bert.", "qformer."
_WIDTH, _HEADS, _MLP = "qformer_embed", "qformer_heads qformer_head_dim", "qformer_mlp"


def rows(bert_type: str) -> tuple[W, ...]:
    """BERT has token-type embeddings (the first is used); the Q-Former has queries with separate feed-forwards.

    A pretrained Q-Former also has a norm on its memory.
    """
    if bert_type == "raw_bert":
        return (*_EMBEDDINGS, _embedding("token_type", "qformer_types"), *_LAYERS)
    return (
        _QUERY,
        *(_MEMORY if bert_type == "qformer_pretrain" else ()),
        *_EMBEDDINGS,
        *_LAYERS,
        *_mlp("query_mlp", "_query"),
    )


def _named(make, path: str, layers: str, *axes: str, name: str, documented: str = "") -> tuple[W, W]:
    return make(f"qformer.{path}", layers, *axes, _NAME + name, _DOCUMENTED + (documented or name))


def _attention(path: str, layers: str, memory: str, name: str) -> tuple[W, ...]:
    """`memory` names the input axis of keys and values."""
    return (
        *_input(path, layers, "query", _WIDTH, name),
        *_input(path, layers, "key", memory, name),
        *_input(path, layers, "value", memory, name),
        *_named(linear, f"{path}.out", layers, _HEADS, _WIDTH, name=f"{name}.output.dense"),
        *_named(norm, f"{path}.norm", layers, _WIDTH, name=f"{name}.output.LayerNorm"),
    )


def _input(path: str, layers: str, part: str, width: str, name: str) -> tuple[W, W]:
    names = {"name": f"{name}.self.{part}", "documented": f"{name}.attention.{part}"}
    return _named(linear, f"{path}.{part}", layers, width, _HEADS, **names)


def _mlp(path: str, name: str) -> tuple[W, ...]:
    """`name` is "" for the text's, "_query" for the queries'."""
    first, second, path = (
        f"encoder.layer.{{l}}.intermediate{name}",
        f"encoder.layer.{{l}}.output{name}",
        f"layers.{path}",
    )
    return (
        *_named(linear, f"{path}.fc1", "qformer_layers", _WIDTH, _MLP, name=f"{first}.dense"),
        *_named(linear, f"{path}.fc2", "qformer_layers", _MLP, _WIDTH, name=f"{second}.dense"),
        *_named(norm, f"{path}.norm", "qformer_layers", _WIDTH, name=f"{second}.LayerNorm"),
    )


def _embedding(name: str, length: str) -> W:
    axes, file = f"{length} {_WIDTH}", f"embeddings.{name}_embeddings.weight"
    return W(f"qformer.{name}_embeddings.embedding", axes, axes, _NAME + file, _DOCUMENTED + file)


_QUERY = W("qformer.query", f"queries {_WIDTH}", f"1 queries {_WIDTH}", "model.vlm_att_query", "query_tokens")
_MEMORY = norm("qformer.memory_norm", "", "memory", "model.vlm_att_ln", "vision_tower.post_layernorm")
_EMBEDDINGS = (
    _embedding("word", "qformer_vocab"),
    _embedding("position", "qformer_positions"),
    *_named(norm, "embeddings_norm", "", _WIDTH, name="embeddings.LayerNorm", documented="embeddings.layernorm"),
)
_LAYERS = (
    *_attention("layers.self_attention", "qformer_layers", _WIDTH, "encoder.layer.{l}.attention"),
    *_mlp("text_mlp", ""),
    *_attention("cross_attention", "qformer_cross_layers", "memory", "encoder.layer.{c}.crossattention"),
)
