"""The projections around the context attention, and the content projector.

The latter is a torch `Sequential` of Linear, GELU, Linear, ..., so its linear layers are numbered 0, 2, 4; one layer
alone ("linear") has no number, and "identity" has no weight.  The documented layout knows two layers.
"""

from llamavid_jax.config.schema import LLaMAVIDLlavaConfig, projector_depth
from llamavid_jax.weights.row import W, linear


def rows(config: LLaMAVIDLlavaConfig) -> tuple[W, ...]:
    depth, alone = projector_depth(config.mm_projector_type), config.mm_projector_type == "linear"
    names = ["mm_projector"] if alone else [f"mm_projector.{2 * i}" for i in range(depth)]
    return (
        *_linear("query_projector", "qformer_embed", "context", "vlm_att_projector"),
        *_linear("key_projector", "vision_embed", "context", "vlm_att_key_projector"),
        *_linear("value_projector", "vision_embed", "hidden", "vlm_att_val_projector"),
        *(row for i, name in enumerate(names) for row in _content(i, name)),
    )


def _content(i: int, name: str) -> tuple[W, W]:
    documented = f"multi_modal_projector.linear_{i + 1}"
    return _linear(f"projector.{i}", "embed" if i else "vision_embed", "hidden", name, documented)


def _linear(path: str, inputs: str, outputs: str, name: str, documented: str = "") -> tuple[W, W]:
    return linear(f"visual_tokens.{path}", "", inputs, outputs, f"model.{name}", documented or name)


def sizes(config: LLaMAVIDLlavaConfig) -> dict[str, int]:
    return {"context": config.vision_tower_config.hidden_size, "hidden": config.text_config.hidden_size}
