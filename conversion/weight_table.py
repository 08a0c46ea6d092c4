"""The four tables together: every parameter of a configured model, and every weight of a PyTorch file that fills it."""

import functools

import jax

from conversion import eva_vit_map, llama_map, qformer_map, visual_tokens_map
from conversion.transforms import Weight, weights
from llamavid_jax.config.schema import LLaMAVIDLlavaConfig, projector_depth
from llamavid_jax.models.llama_vid import abstract_params


@functools.cache  # to trace the model takes longer than to convert a small one
def parameter_shapes(config: LLaMAVIDLlavaConfig) -> dict[str, tuple[int, ...]]:
    """Dotted path → shape of every parameter, stacked layers on axis 0; nothing is allocated."""
    leaves = jax.tree_util.tree_leaves_with_path(abstract_params(config))
    return {".".join(str(key.key) for key in path): tuple(leaf.shape) for path, leaf in leaves}


def weight_table(config: LLaMAVIDLlavaConfig, layout: str) -> list[Weight]:
    """Every weight of a file in `layout` ("original" or "documented")."""
    rows = (
        *eva_vit_map.ROWS,
        *qformer_map.ROWS,
        *visual_tokens_map.rows(config.mm_projector_type, projector_depth(config.mm_projector_type)),
        *llama_map.rows(config.text_config.tie_word_embeddings),
    )
    return weights(rows, layout, parameter_shapes(config), config.qformer_config.cross_attention_frequency)
