"""The results of a call of the model."""

import dataclasses

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class ForwardOutput:
    """`logits` `[B, T, V]`, T the longest merged row: a row starts at position 0; after its end is noise.

    `lengths` `[B]` are the merged lengths.  `loss` is None without labels.
    """

    logits: jax.Array
    lengths: np.ndarray
    loss: jax.Array | None


@dataclasses.dataclass(frozen=True)
class GenerateOutput:
    """New ids of every row, without end token; their text if the model has a tokenizer; the prompts' lengths.

    `seconds`: the time for decoding and encoding frames ("encode") and for the answer ("generate").  `cached_tokens`:
    how many of the prompt's were in a PromptCache.  `evidence`, if requested: the share of the answer's attention on
    each of a row's visual tokens.
    """

    token_ids: list[list[int]]
    texts: list[str] | None
    prompt_tokens: list[int]
    visual_tokens: list[int]
    seconds: dict[str, float]
    cached_tokens: int = 0
    evidence: list[np.ndarray] | None = None
