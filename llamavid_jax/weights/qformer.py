"""The Q-Former's weights.

The queries and the norm of the memory, which the original keeps beside the encoder (`vlm_att_query`, `vlm_att_ln`),
belong to it here.  The layers with cross-attention are a stack of their own; the files number them 0, f, 2f, ...
"""

from llamavid_jax.config.schema import LLaMAVIDLlavaConfig
from llamavid_jax.weights import row
from llamavid_jax.weights.row import W

_ORIGINAL, _DOCUMENTED = "model.vlm_att_encoder.bert.", "qformer."
_HEADS, _WIDTH = "qformer_heads qformer_head_dim", "qformer_embed"


def rows(config: LLaMAVIDLlavaConfig) -> tuple[W, ...]:
    every = config.qformer_config.cross_attention_frequency
    layer = "encoder.layer.{l}."
    return (
        W("qformer.query", f"queries {_WIDTH}", f"1 queries {_WIDTH}", "model.vlm_att_query", "query_tokens"),
        *row.norm("qformer.memory_norm", "", "vision_embed", "model.vlm_att_ln", "vision_tower.post_layernorm"),
        _embedding("word_embeddings", "qformer_vocab"),
        _embedding("position_embeddings", "qformer_positions"),
        *_norm("embeddings_norm", "", "embeddings.LayerNorm", "embeddings.layernorm"),
        *_attention("layers.self_attention", "qformer_layers", _WIDTH, f"{layer}attention"),
        *_mlp("layers.text_mlp", f"{layer}intermediate", f"{layer}output"),
        *_mlp("layers.query_mlp", f"{layer}intermediate_query", f"{layer}output_query"),
        *_attention("cross_attention", "qformer_cross_layers", "vision_embed", f"{layer}crossattention", every),
    )


def _embedding(name: str, length: str) -> W:
    axes, file_name = f"{length} {_WIDTH}", f"embeddings.{name}.weight"
    return W(f"qformer.{name}.embedding", axes, axes, _ORIGINAL + file_name, _DOCUMENTED + file_name)


def _linear(path: str, layers: str, inputs: str, outputs: str, name: str, every: int = 1) -> tuple[W, ...]:
    names = _ORIGINAL + name, _DOCUMENTED + name.replace("attention.self.", "attention.attention.")
    return row.linear(f"qformer.{path}", layers, inputs, outputs, *names, every)


def _norm(path: str, layers: str, name: str, documented: str = "", every: int = 1) -> tuple[W, ...]:
    return row.norm(f"qformer.{path}", layers, _WIDTH, _ORIGINAL + name, _DOCUMENTED + (documented or name), every)


def _attention(path: str, layers: str, memory: str, name: str, every: int = 1) -> tuple[W, ...]:
    """One attention with its output projection and norm; `memory` is the axis of what the keys are made of."""
    return (
        *_linear(f"{path}.query", layers, _WIDTH, _HEADS, f"{name}.self.query", every),
        *_linear(f"{path}.key", layers, memory, _HEADS, f"{name}.self.key", every),
        *_linear(f"{path}.value", layers, memory, _HEADS, f"{name}.self.value", every),
        *_linear(f"{path}.out", layers, _HEADS, _WIDTH, f"{name}.output.dense", every),
        *_norm(f"{path}.norm", layers, f"{name}.output.LayerNorm", every=every),
    )


def _mlp(path: str, first: str, second: str) -> tuple[W, ...]:
    return (
        *_linear(f"{path}.fc1", "qformer_layers", _WIDTH, "qformer_mlp", f"{first}.dense"),
        *_linear(f"{path}.fc2", "qformer_layers", "qformer_mlp", _WIDTH, f"{second}.dense"),
        *_norm(f"{path}.norm", "qformer_layers", f"{second}.LayerNorm"),
    )


def sizes(config: LLaMAVIDLlavaConfig) -> dict[str, int]:
    qformer = config.qformer_config
    return {
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
