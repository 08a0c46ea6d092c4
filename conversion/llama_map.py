"""LLaMA's weights: original name, our path, einops pattern (torch layout -> ours; swap the sides for the inverse).

`{l}` is the layer.  Letters: D width, n query heads, k key/value heads, h head size, m MLP width, v vocabulary.  The
documented names are the original's behind `language_model.`.  Rotary pairs are (i, i + h/2) on both sides, so q and k
keep their order.
"""

from .transforms import Row

_ROWS = (
    ("model.embed_tokens.weight", "llama.embed.embedding", "v d -> v d"),
    ("model.layers.{l}.input_layernorm.weight", "llama.layers.attn_norm.scale", "d -> d"),
    ("model.layers.{l}.self_attn.q_proj.weight", "llama.layers.attn.q.kernel", "(n h) d -> d n h"),
    ("model.layers.{l}.self_attn.k_proj.weight", "llama.layers.attn.k.kernel", "(k h) d -> d k h"),
    ("model.layers.{l}.self_attn.v_proj.weight", "llama.layers.attn.v.kernel", "(k h) d -> d k h"),
    ("model.layers.{l}.self_attn.o_proj.weight", "llama.layers.attn.out.kernel", "d (n h) -> n h d"),
    ("model.layers.{l}.post_attention_layernorm.weight", "llama.layers.mlp_norm.scale", "d -> d"),
    ("model.layers.{l}.mlp.gate_proj.weight", "llama.layers.mlp.gate.kernel", "m d -> d m"),
    ("model.layers.{l}.mlp.up_proj.weight", "llama.layers.mlp.up.kernel", "m d -> d m"),
    ("model.layers.{l}.mlp.down_proj.weight", "llama.layers.mlp.down.kernel", "d m -> m d"),
    ("model.norm.weight", "llama.norm.scale", "d -> d"),
)
_LM_HEAD = ("lm_head.weight", "llama.lm_head.kernel", "v d -> d v")


def rows(tied: bool) -> tuple[Row, ...]:
    """A tied head is the embedding itself and has no row."""
    table = _ROWS if tied else (*_ROWS, _LM_HEAD)
    return tuple(Row(name, path, pattern, f"language_model.{name}") for name, path, pattern in table)
