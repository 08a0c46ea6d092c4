"""Replays training that was recorded with the original: `train_stage*.npz` → losses, gradient norms and rates."""

import json
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from conversion.torch_to_jax import main as torch_to_jax
from llamavid_jax.checkpoints.weights import load_weights
from llamavid_jax.config.schema import LLaMAVIDLlavaConfig
from llamavid_jax.data.examples import Example
from llamavid_jax.data.rows import lay_out_row
from llamavid_jax.models.llama_vid import LlamaVid
from llamavid_jax.models.structure import Structure
from llamavid_jax.shapes import Batch, RowShape, bucket
from llamavid_jax.text.qformer_tokenizer import QFormerTokenizer
from llamavid_jax.training.config import LoopConfig, OptimizerConfig
from llamavid_jax.training.optimizer import make_optimizer
from llamavid_jax.training.step import TrainState, make_train_step
from llamavid_jax.weights.files import weight_table


def recorded_batch(record: dict[str, np.ndarray], config: LLaMAVIDLlavaConfig, tokenizer: QFormerTokenizer) -> Batch:
    prompts = json.loads(str(record["prompts"]))
    examples = []
    for number, asked in enumerate(prompts):
        ids, labels = record["input_ids"][number].astype(np.int32), record["labels"][number].astype(np.int32)
        examples.append(Example(str(number), ids, labels, asked, record[f"pixels.{number}"]))
    frames = max(len(example.frames) for example in examples)
    questions = max(len(asked) for asked in prompts)
    tokens = record["input_ids"].shape[1] + questions * frames * config.tokens_per_frame
    shape = RowShape(frames, frames * questions, questions, bucket(tokens))
    longest = tokenizer([question for asked in prompts for question in asked])[0].shape[1]
    rows = [
        lay_out_row([e], shape, config.tokens_per_frame, tokenizer, longest, e.frames.shape[1:], np.float32)
        for e in examples
    ]
    assert not any(any(cut) for _, cut in rows)
    return Batch(*(np.stack(arrays) for arrays in zip(*(row for row, _ in rows), strict=True)))


def original_names(config: LLaMAVIDLlavaConfig) -> dict[str, list[str]]:
    """Path → the original's names of its weights, one per layer."""
    names: dict[str, list[str]] = {}
    for weight in weight_table(config, "original"):
        names.setdefault(weight.path, []).append(weight.name)
    return names


def factor(names: list[str], shape: tuple[int, ...], lr_multi: str | dict | None) -> np.ndarray:
    """The original's `lr_multi` of one parameter, per layer: factors by substring of the name.

    `lr_multi` is a mapping or in the original's notation, "substring:factor" separated by backslashes.
    """
    written = (
        (part.rsplit(":", 1) for part in (lr_multi or "").split("\\") if part) if not isinstance(lr_multi, dict) else ()
    )
    parts = lr_multi if isinstance(lr_multi, dict) else dict(written)
    factors = []
    for name in names:
        factors.append(next((float(value) for text, value in parts.items() if text in name), 1.0))
    return np.float32(factors[0]) if len(set(factors)) == 1 else np.reshape(factors, (-1, *[1] * (len(shape) - 1)))


def replay(folder: Path, record: dict[str, np.ndarray], out: Path) -> dict[str, np.ndarray]:
    """Repeats the recorded steps from the folder's weights."""
    assert torch_to_jax([str(folder), str(out)]) == 0
    config = LLaMAVIDLlavaConfig.from_pretrained(out)
    hyper, trained = json.loads(str(record["hyper"])), set(json.loads(str(record["trainable"])))
    structure = Structure(nnx.eval_shape(lambda: LlamaVid(config, rngs=nnx.Rngs(0))))
    params = load_weights(out, config)
    names = original_names(config)
    # the original's table also names parameters whose gradient is nothing, as a whole parameter of ours or not at all
    trainable = {path for path in params if trained.issuperset(names[path])}
    assert all(trained.isdisjoint(names[path]) for path in params.keys() - trainable)

    warmup, steps = hyper["warmup_steps"], hyper["steps"]
    optimizer = OptimizerConfig(
        learning_rate=hyper["lr"], warmup=(warmup - 0.5) / steps if warmup else 0.0, betas=hyper["betas"],
        eps=hyper["eps"], weight_decay=hyper["weight_decay"], max_grad_norm=hyper["max_grad_norm"],
    )  # fmt: skip
    factors = {path: factor(names[path], params[path].shape, hyper["lr_multi"]) for path in trainable}
    step = make_train_step(structure, optimizer, LoopConfig(remat="none"), factors, steps, dropout=False)
    own = {path: params[path] for path in trainable}
    frozen = {path: params[path] for path in params.keys() - trainable}
    state = TrainState(jax.numpy.int32(0), own, make_optimizer(optimizer).init(own))
    batch = recorded_batch(record, config, QFormerTokenizer(folder / "qformer_tokenizer"))
    found = []
    for _ in range(steps):
        state, metrics = step(state, frozen, batch)
        found.append((float(metrics.loss), float(metrics.grad_norm), float(metrics.learning_rate)))
    return dict(zip(("losses", "grad_norms", "learning_rates"), np.array(found).T, strict=True))
