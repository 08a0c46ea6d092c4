"""Model FLOPs of a train step, from the configuration: the numerator of the model-FLOPs utilisation.

They are what the algorithm needs (PaLM, appendix B): rematerialisation, the embedding lookup and element-wise
operations do not count.  The denominator, a device's peak, is in `parallel/chips.py`.
"""

from collections.abc import Mapping

from llamavid_jax.config.parts import LlamaConfig
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

    M: multiply-adds of one forward pass between activations and weights; A: those between two activations (attention's
    scores and weighted sums; in LLaMA half of them, because it is causal).  `trains`: 1 where the part's weights train;
    their gradient costs one more matmul.  `through`: 1 where the part or one before it trains, so that the gradient of
    the activations is computed: one matmul for M, two for A.  A trained part costs 3 forward passes; a frozen part
    after a trained one, such as LLaMA in stage 1, costs 2; a frozen tower at the start 1.

    `frames` go through the vision tower (0: precomputed features, which have no CLS token); `pairs` of a frame and a
    question of `question_tokens` through the text decoder; `rows` of `row_tokens` through LLaMA, where packed samples
    are counted as if they attended to each other.  `updates`: the number of LoRA parameters (`models/lora.py`), each
    one multiply-add a token.  They train, and the kernels that they update need no gradient.
    """
    has_cls = frames > 0 and config.vision_tower_config.has_cls
    work = [  # in the order in which values flow
        ("vision", frames, _vision(config)),
        *([("visual_tokens", pairs, _memory(config, has_cls))] if config.projects_memory else []),
        ("qformer", pairs, _text_decoder(config, question_tokens, has_cls)),
        ("visual_tokens", pairs, _visual_tokens(config, question_tokens, has_cls)),
        ("llama", rows, llama_work(config.text_config, row_tokens)),
    ]
    total, through = 6 * rows * row_tokens * updates, False
    for part, number, (weighted, attention) in work:
        through = through or trains[part] or (part == "llama" and updates > 0)
        total += 2 * number * (weighted * (1 + through + trains[part]) + attention * (1 + 2 * through))
    return total


def flops_done_again(text: LlamaConfig, remat: str, rows: int, row_tokens: int) -> int:
    """FLOPs that remat=full recomputes: one forward pass of LLaMA.  For "dots" 0: it keeps all matmuls with weights."""
    return 2 * rows * sum(llama_work(text, row_tokens)) if remat == "full" else 0


def _vision(config: LLaMAVIDLlavaConfig) -> tuple[int, int]:
    """(M, A) of one frame, in the blocks that run."""
    vision = config.vision_tower_config
    width, tokens, blocks = vision.hidden_size, 1 + vision.num_patches, vision.blocks_used
    block = tokens * (4 * width * width + 2 * width * vision.intermediate_size)
    embed = vision.num_patches * 3 * vision.patch_size**2 * width
    return embed + blocks * block, blocks * 2 * tokens * tokens * width


def _patches(config: LLaMAVIDLlavaConfig, has_cls: bool) -> int:
    """How many of a frame's features the context token attends to."""
    vision = config.vision_tower_config
    return vision.num_patches + (has_cls and vision.select_feature == "cls_patch")


def _read(config: LLaMAVIDLlavaConfig, has_cls: bool) -> int:
    """How many of a frame's features the text decoder reads (the Q-Former: CLS too); 0 if its states are unused."""
    if config.frame_tokens == "content":
        return 0
    is_bert = config.bert_type == "raw_bert"
    return _patches(config, has_cls) if is_bert else config.vision_tower_config.num_patches + has_cls


def _memory(config: LLaMAVIDLlavaConfig, has_cls: bool) -> tuple[int, int]:
    """(M, A) of one pair: the projection of the features to the text decoder's width."""
    return _read(config, has_cls) * config.tower_width * config.memory_width, 0


def _text_decoder(config: LLaMAVIDLlavaConfig, question_tokens: int, has_cls: bool) -> tuple[int, int]:
    """(M, A) of one pair: self-attention and a feed-forward of all tokens, cross-attention of the queries.

    In BERT every token is a query of cross-attention, and self-attention is causal.
    """
    memory, decoder, is_bert = _read(config, has_cls), config.qformer_config, config.bert_type == "raw_bert"
    if not memory:
        return 0, 0
    width, layers, crosses = decoder.hidden_size, decoder.num_hidden_layers, decoder.num_cross_attention_layers
    asking = question_tokens if is_bert else config.num_query
    tokens = question_tokens if is_bert else asking + question_tokens
    layer = tokens * (4 * width * width + 2 * width * decoder.intermediate_size)
    cross = 2 * asking * width * width + 2 * memory * config.memory_width * width
    seen = tokens * tokens * width * (1 if is_bert else 2)
    return layers * layer + crosses * cross, layers * seen + crosses * 2 * asking * memory * width


def _visual_tokens(config: LLaMAVIDLlavaConfig, question_tokens: int, has_cls: bool) -> tuple[int, int]:
    """(M, A) of one pair, after the text decoder."""
    vision, text = config.tower_width, config.text_config.hidden_size
    patches, depth = _patches(config, has_cls), projector_depth(config.mm_projector_type)
    context = config.frame_tokens != "content"
    asking = context * (question_tokens if config.bert_type == "raw_bert" else config.num_query)
    attend = asking * config.qformer_config.hidden_size * vision
    attend += context * (patches * vision * vision + vision * text)
    content = config.tokens_of(has_cls) - context
    content *= vision * text + (depth - 1) * text * text if depth else 0
    return attend + content, (asking + context) * patches * vision


def llama_work(text: LlamaConfig, tokens: int) -> tuple[int, int]:
    """(M, A) of one row."""
    width, heads = text.hidden_size, text.num_attention_heads * text.head_dim
    projections = 2 * width * heads + 2 * width * text.num_key_value_heads * text.head_dim
    layer = projections + 3 * width * text.intermediate_size
    weighted = tokens * (text.num_hidden_layers * layer + width * text.vocab_size)
    return weighted, text.num_hidden_layers * tokens * tokens * heads
