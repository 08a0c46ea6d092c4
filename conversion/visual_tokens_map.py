"""The projections around the context attention: original name, our path, einops pattern, documented name.

The content projector is a torch `Sequential` of Linear, GELU, Linear, ..., so its linear layers are numbered 0, 2, 4;
one layer alone ("linear") has no number, and "identity" has no weight.  The documented layout knows two layers.
"""

from conversion.transforms import Row


def _linear(original: str, path: str, documented: str) -> tuple[Row, ...]:
    return (
        Row(f"model.{original}.weight", f"visual_tokens.{path}.kernel", "o i -> i o", f"{documented}.weight"),
        Row(f"model.{original}.bias", f"visual_tokens.{path}.bias", "o -> o", f"{documented}.bias"),
    )


def rows(mm_projector_type: str, depth: int) -> tuple[Row, ...]:
    """`depth` linear layers of the content projector."""
    names = ["mm_projector"] if mm_projector_type == "linear" else [f"mm_projector.{2 * i}" for i in range(depth)]
    return (
        *_linear("vlm_att_projector", "query_projector", "vlm_att_projector"),
        *_linear("vlm_att_key_projector", "key_projector", "vlm_att_key_projector"),
        *_linear("vlm_att_val_projector", "value_projector", "vlm_att_val_projector"),
        *(
            row
            for i, name in enumerate(names)
            for row in _linear(name, f"projector.{i}", f"multi_modal_projector.linear_{i + 1}")
        ),
    )
