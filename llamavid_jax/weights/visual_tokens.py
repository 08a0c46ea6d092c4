"""The projections around the context attention, and the content projector.

The content projector is a torch `Sequential` of Linear, GELU, Linear, ..., so its linear layers are numbered 0, 2, 4;
one layer alone ("linear") has no number, and "identity" has no weight.  The documented layout knows two layers.
"""

from llamavid_jax.weights.row import W, linear


def _linear(path: str, inputs: str, outputs: str, name: str, documented: str = "") -> tuple[W, W]:
    return linear(f"visual_tokens.{path}", "", inputs, outputs, f"model.{name}", documented or name)


def rows(mm_projector_type: str, depth: int, projects_memory: bool) -> tuple[W, ...]:
    """`depth` linear layers of the content projector; `projects_memory` where the text decoder has another width."""
    names = ["mm_projector"] if mm_projector_type == "linear" else [f"mm_projector.{2 * i}" for i in range(depth)]
    memory = (
        _linear("memory_projector", "vision_embed", "memory_hidden", "vlm_att_bert_proj") if projects_memory else ()
    )
    content = (
        row
        for i, name in enumerate(names)
        for row in _linear(
            f"projector.{i}", "embed" if i else "vision_embed", "hidden", name, f"multi_modal_projector.linear_{i + 1}"
        )
    )
    return (
        *memory,
        *_linear("query_projector", "qformer_embed", "context", "vlm_att_projector"),
        *_linear("key_projector", "vision_embed", "context", "vlm_att_key_projector"),
        *_linear("value_projector", "vision_embed", "hidden", "vlm_att_val_projector"),
        *content,
    )
