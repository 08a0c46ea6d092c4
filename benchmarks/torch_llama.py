"""The train step of the same LLaMA in PyTorch: transformers, SDPA, bfloat16 autocast, torch.compile, fused AdamW."""

import argparse
import dataclasses

from benchmarks.timing import seconds
from llamavid_jax.config.parts import LlamaConfig

OTHERS = ("rope_theta", "rope_factor", "eos_token_id")  # fields that do not change the work


def torch_seconds(config: LlamaConfig, options: argparse.Namespace) -> float | None:
    """Seconds of one step of `options.rows` rows of `options.tokens` tokens, float32 parameters and state.

    None where PyTorch is not installed, or sees no GPU and `options.torch` does not ask for the CPU.
    """
    try:
        import torch
        import transformers
    except ImportError:
        return None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.torch:
        return None
    torch.set_float32_matmul_precision("high")
    sizes = {name: value for name, value in dataclasses.asdict(config).items() if name not in OTHERS}
    with torch.device(device):
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**sizes, attn_implementation="sdpa", use_cache=False)
        ).train()
        ids = torch.randint(0, config.vocab_size, (options.rows, options.tokens))
    if options.remat != "none":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, weight_decay=0.0, fused=True)
    compiled = torch.compile(model)

    def run() -> None:
        with torch.autocast(device, torch.bfloat16):
            loss = compiled(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return seconds(run, torch.cuda.synchronize if device == "cuda" else lambda: None, options.steps)
