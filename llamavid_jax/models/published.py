"""The share of a TPU's peak that training steps of published speed reach: from a bound to a likely time.

    likely seconds = (FLOPs + recomputed FLOPs) / (peak · share_of_peak)

All of them are MaxText's: language models of LLaMA's shape in bfloat16, parameters sharded over all chips of one slice,
bound by compute.  That a step bound by memory or network reaches the same share of its bound is an assumption.
Sources, both on github.com/AI-Hypercomputer:

    v6e       tpu-recipes, training/trillium/{Llama3.1-8B,Llama3.1-70B,Mistral-7B,Llama2-70B}-MaxText
    v4 to v5p maxtext, src/maxtext/configs/tpu/{v4,v5e,v5p}/README.md; of Llama2-70B getting_started/Run_Llama2.md as of
              March 2024.  v4's MLPs have no gate: two thirds of their width do the same work

The sources count attention as if it were not causal; `again` follows from the rematerialisation that they state.
"""

import math
from typing import NamedTuple

from llamavid_jax.config.parts import LlamaConfig
from llamavid_jax.models.flops import llama_work
from llamavid_jax.parallel.chips import CHIPS


class Published(NamedTuple):
    """A step on `chips`, each with `rows` of `tokens`, that runs at `tflops` of 10¹² FLOP/s a chip.

    `again` is the part of a forward pass that is recomputed for the gradient.
    """

    model: str
    generation: str
    chips: int
    text: LlamaConfig
    tokens: int
    rows: int
    again: float
    tflops: float

    @property
    def seconds(self) -> float:
        weighted, attention = llama_work(self.text, self.tokens)
        return self.rows * 6 * (weighted + 2 * attention) / (self.tflops * 1e12)

    @property
    def share(self) -> float:
        """Share of the peak, counted as for our steps: with recomputation, and with causal attention."""
        flops = self.rows * 2 * (3 + self.again) * sum(llama_work(self.text, self.tokens))
        return flops / (CHIPS[self.generation].tflops * 1e12 * self.seconds)


# vocabulary, width, MLP width, layers, heads, key-value heads
LLAMA2_70B = LlamaConfig(32000, 8192, 28672, 80, 64, 8)
LLAMA3_8B, LLAMA3_70B = LlamaConfig(128256, 4096, 14336, 32, 32, 8), LlamaConfig(128256, 8192, 28672, 80, 64, 8)
DENSE_16B, DENSE_32B = LlamaConfig(32000, 4096, 28672, 32, 64, 64), LlamaConfig(32000, 8192, 28672, 32, 64, 64)
DENSE_64B = LlamaConfig(32000, 8192, 28672, 64, 64, 64)

PUBLISHED = [
    Published("22B", "v4", 64, LlamaConfig(32000, 6144, 16384, 48, 24, 24, 256), 2048, 13, 1.0, 156),
    Published("52B", "v4", 192, LlamaConfig(32000, 12288, 32768, 32, 32, 32, 256), 2048, 7, 1.0, 154),
    Published("Llama2-70B", "v4", 64, LLAMA2_70B, 4096, 4, 0.64, 0.57 * 275),
    Published("16B", "v5e", 256, DENSE_16B, 2048, 6, 1.0, 120),
    Published("32B", "v5e", 256, DENSE_32B, 2048, 4, 1.0, 132),
    Published("64B", "v5e", 256, DENSE_64B, 2048, 2, 1.0, 118),
    Published("Llama2-70B", "v5e", 256, LLAMA2_70B, 4096, 2, 0.64, 0.57 * 197),
    Published("32B", "v5p", 64, DENSE_32B, 2048, 6, 0.02, 328),
    Published("64B", "v5p", 64, DENSE_64B, 2048, 3, 0.02, 323),
    Published("Llama2-70B", "v5p", 64, LLAMA2_70B, 4096, 4, 0.56, 0.65 * 459),
    Published("Llama3.1-8B", "v6e", 8, LLAMA3_8B, 8192, 3, 0.56, 413.433),
    Published("Llama3.1-8B", "v6e", 256, LLAMA3_8B, 8192, 4, 0.56, 417.397),
    Published("Mistral-7B", "v6e", 8, LlamaConfig(32000, 4096, 14336, 32, 32, 8), 8192, 6, 0.59, 431.981),
    Published("Llama3.1-70B", "v6e", 32, LLAMA3_70B, 8192, 2, 0.65, 443.385),
    Published("Llama3.1-70B", "v6e", 256, LLAMA3_70B, 8192, 5, 0.65, 462.297),
    Published("Llama2-70B", "v6e", 256, LLAMA2_70B, 4096, 2, 0.64, 402.274),
]


def share_of_peak(kind: str, steps: list[Published] = PUBLISHED) -> float | None:
    """Geometric mean of `share` over the steps on devices of JAX's device kind `kind`; None where there are none."""
    logs = [math.log(one.share) for one in steps if CHIPS[one.generation].kind == kind]
    return math.exp(math.fsum(logs) / len(logs)) if logs else None
