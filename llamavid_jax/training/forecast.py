"""What a run will do, reported before its first step: what trains, the size of a step, estimates of memory and hours.

Memory per device: the state and the frozen parameters as sharded, gradients, and the activations that LLaMA's layers
keep for them.  Logits, the vision tower's activations and the compiler's copies come on top; `train.py --compile-only`
asks the compiler.  Hours: FLOPs, recomputed ones included, over the devices' peak (`parallel/chips.py`), a lower bound;
and at the fraction of the peak that published steps reach on such chips (`models/published.py`), or at ASSUMED if none
is published.
"""

import fnmatch
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from llamavid_jax.config.parts import LlamaConfig
from llamavid_jax.data.loader import Loader
from llamavid_jax.models.flops import PARTS, flops_done_again, flops_per_step
from llamavid_jax.models.lora import ADAPTERS
from llamavid_jax.models.published import share_of_peak
from llamavid_jax.parallel.chips import peak_flops
from llamavid_jax.parallel.mesh import SEQUENCE, TENSOR, copies
from llamavid_jax.training.config import TrainConfig
from llamavid_jax.training.start import Start
from llamavid_jax.training.step import TrainState

ASSUMED = 0.5  # of the peak; tokens/s and MFU of the first steps are more accurate
STAGES = {  # by what trains, as in the paper
    ("visual_tokens",): "stage 1, align",
    ("qformer", "visual_tokens", "llama"): "stage 2, instruct",
    ("visual_tokens", "llama"): "stage 3, long video",
}


def forecast(config: TrainConfig, start: Start, state: TrainState, loader: Loader) -> str:
    """The log lines for a run that starts or resumes at `state`."""
    trained, frozen = state.params, start.frozen
    parts = tuple(part for part in PARTS if any(path.startswith(part) for path in trained))
    count = {name: sum(x.size for x in params.values()) for name, params in (("on", trained), ("off", frozen))}
    others = [part for part in PARTS if any(path.startswith(part) for path in frozen)]
    steps = loader.steps - int(state.step)
    tokens, flops = _of_a_step(config, start, loader)
    return "\n".join(
        [
            f"{STAGES.get(parts, 'a stage of its own')}: {count['on']:,} parameters train ({', '.join(parts)}), "
            f"{count['off']:,} are frozen ({', '.join(others) or 'none'})",
            f"{steps:,} of {loader.steps:,} steps to go, each of {config.training.batch_size} rows with room for "
            f"{tokens:,.0f} tokens on average",
            _memory(config, start, state),
            _hours(steps * flops, start.mesh.size),
        ]
    )


def work_of(trained: Mapping[str, Any]) -> tuple[dict[str, bool], int]:
    """Whether the weights of each part train, and the number of low-rank parameters (for `flops_per_step`)."""
    updates = {path for path in trained if fnmatch.fnmatchcase(path, ADAPTERS)}
    trains = {part: any(path.startswith(part) for path in trained.keys() - updates) for part in PARTS}
    return trains, sum(trained[path].size for path in updates)


def _of_a_step(config: TrainConfig, start: Start, loader: Loader) -> tuple[float, float]:
    """Mean token capacity and FLOPs of a step, with recomputed ones, over the first epoch; others are alike."""
    (trains, updates), rows = work_of(start.trained), config.training.batch_size
    batches = Counter((batch.shape_index, batch.kind) for batch in loader.schedule.epoch(0))
    tokens = flops = 0
    for (index, kind), number in batches.items():
        shape = loader.schedule.shapes[index]
        tokens += number * rows * shape.tokens
        flops += number * flops_per_step(
            start.config,
            trains,
            frames=0 if kind == "features" else rows * shape.frames,
            pairs=rows * shape.pairs,
            question_tokens=config.data.question_tokens,
            rows=rows,
            row_tokens=shape.tokens,
            updates=updates,
        ) + number * flops_done_again(start.config.text_config, config.training.remat, rows, shape.tokens)
    return tokens / batches.total(), flops / batches.total()


def _memory(config: TrainConfig, start: Start, state: TrainState) -> str:
    loop, mesh = config.training, dict(start.mesh.shape)
    rows = loop.batch_size // loop.micro_batches // copies(start.mesh)
    kept = kept_bytes(start.config.text_config, mesh, rows * config.max_tokens // mesh[SEQUENCE], loop.remat)
    sizes = {
        "parameters": _held(state.params) + _held(start.frozen),
        "optimizer": _held(state.optimizer),
        "gradients": _held(state.params),
        "layers": int(kept),
    }
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    return (
        f"memory of a device: at least {sum(sizes.values()) / 2**30:.3g} GiB"
        + (f" of {limit / 2**30:.1f}" if limit else "")
        + f" ({', '.join(f'{name} {size / 2**30:.3g}' for name, size in sizes.items())})"
    )


def _held(arrays: Any) -> int:
    """Bytes of the arrays on this process's first device."""
    leaves: Iterable[jax.Array] = jax.tree.leaves(arrays)
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)


def kept_bytes(text: LlamaConfig, mesh: Mapping[str, int], tokens: int, remat: str) -> float:
    """Bytes of 16-bit activations that LLaMA's layers keep for the backward pass of `tokens` on one device."""
    hidden = text.hidden_size
    matmuls = 2 * hidden + (
        (text.num_attention_heads + 2 * text.num_key_value_heads) * text.head_dim + 2 * text.intermediate_size
    ) / mesh[TENSOR]  # fmt: skip
    kept = {"full": hidden, "dots": hidden + matmuls, "none": hidden + 1.5 * matmuls}[remat]
    return 2.0 * text.num_hidden_layers * tokens * kept


def _hours(flops: float, devices: int) -> str:
    kind = jax.devices()[0].device_kind
    peak, published = peak_flops(kind), share_of_peak(kind)
    if peak is None:
        return f"hours: unknown, as the peak of {devices} × {kind} is; {flops / 1e15:.3g} PFLOP are to be done"
    bound, share = flops / (peak * devices) / 3600, published or ASSUMED
    return (
        f"hours: at least {bound:.2f} at the peak of {devices} × {kind} ({peak / 1e12:g} TFLOP/s), about "
        f"{bound / share:.2f} if {share:.0%} of it are used, as {'published steps do' if published else 'is assumed'}; "
        "compiling, saves and evaluations come on top"
    )
