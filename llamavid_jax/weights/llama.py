"""LLaMA's weights.  The documented names are the original's behind `language_model.`.

Rotary pairs are (i, i + h/2) on both sides, so q and k keep their order.
"""

from llamavid_jax.config.schema import LlamaConfig
from llamavid_jax.weights.row import W


def _layer(path: str, axes: str, torch: str, name: str) -> W:
    return W(f"llama.layers.{path}", f"layers {axes}", torch, f"model.layers.{{l}}.{name}")


_LINEAR = (  # what LoRA updates and quantisation replaces
    _layer("attn.q.kernel", "embed heads head_dim", "(heads head_dim) embed", "self_attn.q_proj.weight"),
    _layer("attn.k.kernel", "embed kv_heads head_dim", "(kv_heads head_dim) embed", "self_attn.k_proj.weight"),
    _layer("attn.v.kernel", "embed kv_heads head_dim", "(kv_heads head_dim) embed", "self_attn.v_proj.weight"),
    _layer("attn.out.kernel", "heads head_dim embed", "embed (heads head_dim)", "self_attn.o_proj.weight"),
    _layer("mlp.gate.kernel", "embed mlp", "mlp embed", "mlp.gate_proj.weight"),
    _layer("mlp.up.kernel", "embed mlp", "mlp embed", "mlp.up_proj.weight"),
    _layer("mlp.down.kernel", "mlp embed", "embed mlp", "mlp.down_proj.weight"),
)
_ROWS = (
    W("llama.embed.embedding", "vocab embed", "vocab embed", "model.embed_tokens.weight"),
    _layer("attn_norm.scale", "embed", "embed", "input_layernorm.weight"),
    *_LINEAR,
    _layer("mlp_norm.scale", "embed", "embed", "post_attention_layernorm.weight"),
    W("llama.norm.scale", "embed", "embed", "model.norm.weight"),
)
_HEAD = W("llama.lm_head.kernel", "embed vocab", "vocab embed", "lm_head.weight")

KERNELS = {row.path: row for row in _LINEAR}
TARGETS = {row.name.split(".")[-2].removesuffix("_proj"): row for row in _LINEAR}  # LoRA's: q, k, v, o, gate, up, down


def rows(config: LlamaConfig) -> tuple[W, ...]:
    """A tied head is the embedding itself and has no row."""
    table = _ROWS if config.tie_word_embeddings else (*_ROWS, _HEAD)
    return tuple(row._replace(documented=f"language_model.{row.name}") for row in table)


def sizes(config: LlamaConfig) -> dict[str, int]:
    return {
        "layers": config.num_hidden_layers,
        "embed": config.hidden_size,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "mlp": config.intermediate_size,
        "vocab": config.vocab_size,
    }
