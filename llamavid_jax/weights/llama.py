"""LLaMA's weights.  The documented names are the original's with the prefix `language_model.`.

Rotary pairs are (i, i + H/2) on both sides, so queries and keys keep their order.
"""

from llamavid_jax.weights.row import W

TARGETS = {  # what LoRA may update: target → where it is in a layer
    "q": "attn.q",
    "k": "attn.k",
    "v": "attn.v",
    "o": "attn.out",
    "gate": "mlp.gate",
    "up": "mlp.up",
    "down": "mlp.down",
}


def _w(path: str, axes: str, torch: str, name: str) -> W:
    return W(f"llama.{path}", axes, torch, name, f"language_model.{name}")


def _l(path: str, axes: str, torch: str, name: str) -> W:
    """The row of a weight of every layer."""
    return _w(f"layers.{path}", f"layers {axes}", torch, f"model.layers.{{l}}.{name}.weight")


_ROWS = (
    _w("embed.embedding", "vocab embed", "vocab embed", "model.embed_tokens.weight"),
    _l("attn_norm.scale", "embed", "embed", "input_layernorm"),
    _l("attn.q.kernel", "embed heads head_dim", "(heads head_dim) embed", "self_attn.q_proj"),
    _l("attn.k.kernel", "embed kv_heads head_dim", "(kv_heads head_dim) embed", "self_attn.k_proj"),
    _l("attn.v.kernel", "embed kv_heads head_dim", "(kv_heads head_dim) embed", "self_attn.v_proj"),
    _l("attn.out.kernel", "heads head_dim embed", "embed (heads head_dim)", "self_attn.o_proj"),
    _l("mlp_norm.scale", "embed", "embed", "post_attention_layernorm"),
    _l("mlp.gate.kernel", "embed mlp", "mlp embed", "mlp.gate_proj"),
    _l("mlp.up.kernel", "embed mlp", "mlp embed", "mlp.up_proj"),
    _l("mlp.down.kernel", "mlp embed", "embed mlp", "mlp.down_proj"),
    _w("norm.scale", "embed", "embed", "model.norm.weight"),
)
_LM_HEAD = _w("lm_head.kernel", "embed vocab", "vocab embed", "lm_head.weight")
_PLACES = {f"llama.layers.{place}.kernel": target for target, place in TARGETS.items()}
KERNELS = {_PLACES[row.path]: row for row in _ROWS if row.path in _PLACES}  # target → the row of its kernel


QUANTISED = {row.path: row for row in KERNELS.values()}  # path → the row of a kernel that may be quantised


def rows(tied: bool) -> tuple[W, ...]:
    """A tied head is the embedding itself and has no row."""
    return _ROWS if tied else (*_ROWS, _LM_HEAD)
