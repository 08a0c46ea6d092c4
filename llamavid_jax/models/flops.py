"""How much work a train step is: model FLOPs from the configuration, and what a device can do at its best.

The numerator and the denominator of the model-FLOPs utilisation (PaLM, appendix B): what the algorithm needs, so
neither rematerialisation nor the embedding's gather nor element-wise operations count.
"""

from collections.abc import Mapping

from llamavid_jax.config.schema import LLaMAVIDLlavaConfig, projector_depth

PARTS = ("vision", "qformer", "visual_tokens", "llama")  # in the order in which values flow


def flops_per_step(
    config: LLaMAVIDLlavaConfig,
    trains: Mapping[str, bool],
    *,
    frames: int,
    pairs: int,
    question_tokens: int,
    rows: int,
    row_tokens: int,
    updates: int = 0,
) -> int:
    """FLOPs of one train step over all devices.

        Σ over parts of 2 · (M · (1 + through + trains) + A · (1 + 2 · through))

    M: multiply-adds of one forward pass with weights; A: those of two activations (attention's scores and weighted
    sums, in LLaMA half of them because it is causal).  `trains`: whether the part's weights train, which costs a
    matmul for their gradient.  `through`: whether anything in the part or before it trains, so that the gradient of
    the activations is computed, one matmul for M and two for A.  A frozen part after a trained one, such as LLaMA in
    stage 1, costs 2 forward passes, a trained one 3, a frozen tower at the start 1.

    `frames` go through the vision tower (0: ready features); `pairs` of a frame and a question of `question_tokens`
    through the Q-Former; `rows` of `row_tokens` through LLaMA, packed samples counted as if they saw each other.
    `updates`: the parameters of LLaMA's low-rank updates (`models/lora.py`), each a multiply-add a token.  They train,
    and the kernels below them need no gradient of their own.
    """
    work = {
        "vision": _times(frames, _vision(config)),
        "qformer": _times(pairs, _qformer(config, question_tokens, has_cls=frames > 0)),
        "visual_tokens": _times(pairs, _visual_tokens(config)),
        "llama": _times(rows, _llama(config, row_tokens)),
    }
    total, through = 6 * rows * row_tokens * updates, False
    for part in PARTS:
        through = through or trains[part] or (part == "llama" and updates > 0)
        weighted, attention = work[part]
        total += 2 * (weighted * (1 + through + trains[part]) + attention * (1 + 2 * through))
    return total


def _times(number: int, work: tuple[int, int]) -> tuple[int, int]:
    return number * work[0], number * work[1]


def _vision(config: LLaMAVIDLlavaConfig) -> tuple[int, int]:
    """(M, A) of one frame."""
    vision = config.vision_tower_config
    width, tokens = vision.hidden_size, 1 + vision.num_patches
    block = tokens * (4 * width * width + 2 * width * vision.intermediate_size)
    embed = vision.num_patches * 3 * vision.patch_size**2 * width
    return embed + vision.num_hidden_layers * block, vision.num_hidden_layers * 2 * tokens * tokens * width


def _qformer(config: LLaMAVIDLlavaConfig, question_tokens: int, has_cls: bool) -> tuple[int, int]:
    """(M, A) of one pair: self-attention of all, cross-attention of the queries, a feed-forward for each token."""
    if config.frame_tokens == "content":
        return 0, 0  # what nobody asks for is not computed
    qformer, queries = config.qformer_config, config.num_query
    width, memory_width = qformer.hidden_size, config.vision_tower_config.hidden_size
    tokens, memory = queries + question_tokens, config.vision_tower_config.num_patches + has_cls
    layers, crosses = qformer.num_hidden_layers, qformer.num_cross_attention_layers
    layer = tokens * (4 * width * width + 2 * width * qformer.intermediate_size)
    cross = 2 * queries * width * width + 2 * memory * memory_width * width
    return (
        layers * layer + crosses * cross,
        layers * 2 * tokens * tokens * width + crosses * 2 * queries * memory * width,
    )


def _visual_tokens(config: LLaMAVIDLlavaConfig) -> tuple[int, int]:
    """(M, A) of one pair."""
    vision, text = config.vision_tower_config.hidden_size, config.text_config.hidden_size
    patches, depth = config.vision_tower_config.num_patches, projector_depth(config.mm_projector_type)
    context = config.frame_tokens != "content"
    queries = context * config.num_query
    attend = queries * config.qformer_config.hidden_size * vision
    attend += context * (patches * vision * vision + vision * text)
    content = (config.tokens_per_frame - context) * (vision * text + (depth - 1) * text * text if depth else 0)
    return attend + content, (queries + context) * patches * vision


def _llama(config: LLaMAVIDLlavaConfig, tokens: int) -> tuple[int, int]:
    """(M, A) of one row."""
    text = config.text_config
    width, heads = text.hidden_size, text.num_attention_heads * text.head_dim
    projections = 2 * width * heads + 2 * width * text.num_key_value_heads * text.head_dim
    layer = projections + 3 * width * text.intermediate_size
    weighted = tokens * (text.num_hidden_layers * layer + width * text.vocab_size)
    return weighted, text.num_hidden_layers * tokens * tokens * heads
