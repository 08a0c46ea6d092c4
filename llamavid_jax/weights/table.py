"""The whole inventory: every parameter of a configured model, and every weight of a PyTorch file that fills it.

No model is built for it: a parameter's shape is its axes times the configuration's sizes.
"""

from collections.abc import Collection

from llamavid_jax.config.schema import LlamaConfig, LLaMAVIDLlavaConfig
from llamavid_jax.weights import llama, qformer, vision, visual_tokens
from llamavid_jax.weights.llama import KERNELS, TARGETS
from llamavid_jax.weights.row import Parameter, TorchWeight, W


def rows(config: LLaMAVIDLlavaConfig) -> tuple[W, ...]:
    parts = vision.rows(config), qformer.rows(config), visual_tokens.rows(config)
    return sum(parts, ()) + llama.rows(config.text_config)


def axis_sizes(config: LLaMAVIDLlavaConfig) -> dict[str, int]:
    """The size of every axis that a parameter may have."""
    parts = vision.sizes(config) | qformer.sizes(config) | visual_tokens.sizes(config)
    return parts | llama.sizes(config.text_config)


def parameters(
    config: LLaMAVIDLlavaConfig, rank: int = 0, targets: Collection[str] = (), quantization: str = ""
) -> dict[str, Parameter]:
    """Every parameter by its path.

    `rank` and `targets` are LoRA's; `quantization` stands in place of the configuration's.
    """
    sizes, kind = axis_sizes(config) | {"rank": rank}, quantization or config.quantization
    found = {}
    for row in rows(config):
        quantised = row.path in KERNELS and kind != "none"
        found |= row.in_blocks(sizes, kind) if quantised else {row.path: row.parameter(sizes)}
    return found | {row.path: row.parameter(sizes) for target in targets for row in TARGETS[target].low_rank()}


def weight_table(config: LLaMAVIDLlavaConfig, layout: str = "original") -> list[TorchWeight]:
    """Every weight of a file in `layout`, "original" or "documented"."""
    sizes = axis_sizes(config)
    return [weight for row in rows(config) for weight in row.weights(sizes, layout)]


def adapter_table(config: LlamaConfig, rank: int, targets: Collection[str]) -> list[TorchWeight]:
    """Every tensor of a LoRA adapter in PEFT's layout."""
    sizes = llama.sizes(config) | {"rank": rank}
    return [weight for target in targets for update in TARGETS[target].low_rank() for weight in update.weights(sizes)]
