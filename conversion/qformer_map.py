"""The Q-Former's weights: original name, our path, einops pattern (torch -> ours), documented name.

`{l}` is the layer; `{c}` counts the layers with cross-attention, which the files number 0, f, 2f, ...  Letters: c
width, e width of the vision features, n heads, h head size, m MLP width, q queries.  The queries and the norm of the
memory, which the original keeps beside the encoder (`vlm_att_query`, `vlm_att_ln`), belong to it here.
"""

from .transforms import Row

_ORIGINAL = "model.vlm_att_encoder.bert."
_DOCUMENTED = "qformer."


def _norm(name: str, path: str, documented: str | None = None) -> tuple[Row, ...]:
    documented = documented or name
    return (
        Row(f"{_ORIGINAL}{name}.weight", f"{path}.scale", "c -> c", f"{_DOCUMENTED}{documented}.weight"),
        Row(f"{_ORIGINAL}{name}.bias", f"{path}.bias", "c -> c", f"{_DOCUMENTED}{documented}.bias"),
    )


def _linear(name: str, path: str, kernel: str, bias: str, documented: str | None = None) -> tuple[Row, ...]:
    documented = documented or name
    return (
        Row(f"{_ORIGINAL}{name}.weight", f"{path}.kernel", kernel, f"{_DOCUMENTED}{documented}.weight"),
        Row(f"{_ORIGINAL}{name}.bias", f"{path}.bias", bias, f"{_DOCUMENTED}{documented}.bias"),
    )


def _attention(name: str, path: str, memory: str) -> tuple[Row, ...]:
    """One attention with its output projection and norm; `memory` is the letter of the keys' input width."""
    inputs = {"query": "c", "key": memory, "value": memory}
    projections = tuple(
        row
        for part, width in inputs.items()
        for row in _linear(
            f"{name}.self.{part}",
            f"{path}.{part}",
            f"(n h) {width} -> {width} n h",
            "(n h) -> n h",
            f"{name}.attention.{part}",
        )
    )
    return (
        *projections,
        *_linear(f"{name}.output.dense", f"{path}.out", "c (n h) -> n h c", "c -> c"),
        *_norm(f"{name}.output.LayerNorm", f"{path}.norm"),
    )


def _mlp(first: str, second: str, path: str) -> tuple[Row, ...]:
    return (
        *_linear(f"{first}.dense", f"{path}.fc1", "m c -> c m", "m -> m"),
        *_linear(f"{second}.dense", f"{path}.fc2", "c m -> m c", "c -> c"),
        *_norm(f"{second}.LayerNorm", f"{path}.norm"),
    )


_LAYER = "encoder.layer.{l}."
ROWS = (
    Row("model.vlm_att_query", "qformer.query", "1 q c -> q c", "query_tokens"),
    Row("model.vlm_att_ln.weight", "qformer.memory_norm.scale", "e -> e", "vision_tower.post_layernorm.weight"),
    Row("model.vlm_att_ln.bias", "qformer.memory_norm.bias", "e -> e", "vision_tower.post_layernorm.bias"),
    Row(
        f"{_ORIGINAL}embeddings.word_embeddings.weight",
        "qformer.word_embeddings.embedding",
        "v c -> v c",
        f"{_DOCUMENTED}embeddings.word_embeddings.weight",
    ),
    Row(
        f"{_ORIGINAL}embeddings.position_embeddings.weight",
        "qformer.position_embeddings.embedding",
        "p c -> p c",
        f"{_DOCUMENTED}embeddings.position_embeddings.weight",
    ),
    *_norm("embeddings.LayerNorm", "qformer.embeddings_norm", "embeddings.layernorm"),
    *_attention(_LAYER + "attention", "qformer.layers.self_attention", "c"),
    *_mlp(_LAYER + "intermediate", _LAYER + "output", "qformer.layers.text_mlp"),
    *_mlp(_LAYER + "intermediate_query", _LAYER + "output_query", "qformer.layers.query_mlp"),
    *_attention("encoder.layer.{c}.crossattention", "qformer.cross_attention", "e"),
)
