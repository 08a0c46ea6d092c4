"""One optimiser step and one evaluation step, compiled: `Batch` of rows → new state and metrics, or loss sums.

    frames ─ vision tower ─▶ features ─ pairs (frame, question) ─▶ visual tokens [B, G·(n+1), D]
    tokens, visual tokens ─ merge ─▶ [B, T, D] ─ llama ─▶ hidden ─ loss in chunks ─▶ sums ─▶ gradients ─ AdamW ─▶ state

Parameters are dicts by path.  The frozen ones are in a dict of their own: they have no gradient and no state.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key

from llamavid_jax.models.llama_vid import LlamaVid
from llamavid_jax.models.lora import set_dropout
from llamavid_jax.models.loss import LossSums, next_token_sums
from llamavid_jax.models.structure import Structure
from llamavid_jax.parallel.chips import CHIPS
from llamavid_jax.parallel.rows import ways
from llamavid_jax.parallel.sharding import constrain, pin, target
from llamavid_jax.shapes import IGNORE_LABEL, TEXT, Batch
from llamavid_jax.training.config import LoopConfig, OptimizerConfig
from llamavid_jax.training.optimizer import clip, learning_rate, make_optimizer


class TrainState(NamedTuple):
    """What a step updates: `params`, the trained parameters by path in float32, and the optimiser's state for them."""

    step: Int[Array, ""]
    params: dict[str, jax.Array]
    optimizer: Any


class StepMetrics(NamedTuple):
    """`loss` and `token_accuracy` over the batch's labelled tokens; `grad_norm` is before clipping.

    `finite` is 0 if the loss or the norm was not finite; the step then changed neither parameters nor optimiser.
    """

    loss: Float[Array, ""]
    token_accuracy: Float[Array, ""]
    grad_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]
    finite: Float[Array, ""]


@jax.named_scope("visual_table")
def visual_table(model: LlamaVid, batch: Batch, remat: str, dropout_keys: Key[Array, " B"] | None) -> jax.Array:
    """Each row's visual tokens `[B, G·(n+1), D]`; zeros `[1, 1, D]` if the batch has no frames."""
    rows, frames = batch.frames.shape[:2]
    if frames == 0:
        return jnp.zeros((1, 1, model.llama.config.hidden_size))
    are_pixels = batch.frames.ndim == 5  # these go through the tower; ready features have no CLS
    features = batch.frames.reshape(-1, *batch.frames.shape[2:])
    features = model.vision(features) if are_pixels else features

    pairs = batch.pair_frame.shape[1]
    if batch.question_ids.shape[1] > 1 or pairs != frames:  # else pair g is frame g (`lay_out_row`)
        shares = features.reshape(rows, ways(), -1, *features.shape[1:])  # a pair and its frame are in the same share
        own = batch.pair_frame.reshape(rows, ways(), -1) - jnp.arange(ways())[:, None] * shares.shape[2]
        picked = jax.vmap(_pick)(constrain(shares, "batch", "sequence", None, None, None), own)
        features = picked.reshape(-1, *features.shape[1:])
    texts = (_pick(x, batch.pair_question) for x in (batch.question_ids, batch.question_mask))
    keys = None if dropout_keys is None else jax.vmap(lambda key: jax.random.split(key, pairs))(dropout_keys).ravel()
    flat = (x.reshape(-1, x.shape[-1]) for x in texts)
    tokens = model.frames_tokens(features, *flat, keys, has_cls=are_pixels and model.vision.config.has_cls, remat=remat)
    return constrain(tokens.reshape(rows, -1, tokens.shape[-1]), "batch", "sequence", None)


def _pick(tables: jax.Array, index: jax.Array) -> jax.Array:
    """`tables[b, index[b]]`."""
    return jax.vmap(lambda own, places: own[places])(tables, index)


def beside_visuals(batch: Batch) -> Bool[Array, "B T"]:
    """The text positions next to a visual token of the same sample, where start and end tokens are.

    In a row of one sample, padding after a visual token counts too; it has no label.
    """
    segments = jnp.ones_like(batch.token_ids) if batch.segment_ids is None else batch.segment_ids
    visual = jnp.where(batch.visual_index == TEXT, 0, segments)
    before = jnp.pad(visual, [(0, 0), (1, 0)])[:, :-1]
    behind = jnp.pad(visual, [(0, 0), (0, 1)])[:, 1:]
    own = (before == segments) | (behind == segments)
    return own & (segments > 0) & (batch.visual_index == TEXT)


def loss_sums(
    model: LlamaVid, batch: Batch, remat: str = "none", dropout_keys: Any = None, markers_alone: bool = False
) -> LossSums:
    """The loss of a batch as sums over its labelled tokens; `dropout_keys`, one per row, enable dropout.

    `markers_alone`: of the token embeddings, only those next to visual tokens get a gradient.
    """
    pairs_keys = None
    if dropout_keys is not None:
        pairs_keys, lora_keys = jax.vmap(jax.random.split, out_axes=1)(dropout_keys)
        set_dropout(model.llama, lora_keys)
    visual = visual_table(model, batch, remat, pairs_keys)
    learns = beside_visuals(batch) if markers_alone else None
    merged = model.merge(batch.token_ids, visual, batch.visual_index, learns)
    hidden = model.llama(merged, batch.segment_ids, batch.positions)
    return next_token_sums(hidden, model.llama.head_kernel(), batch.labels)


def make_train_step(
    structure: Structure,
    optimizer: OptimizerConfig,
    loop: LoopConfig,
    factors: Mapping[str, Any],
    steps: int,
    dropout: bool = True,
    specs: Mapping[str, PartitionSpec] | None = None,
) -> Callable[[TrainState, dict[str, jax.Array], Batch], tuple[TrainState, StepMetrics]]:
    """The compiled step `(state, frozen, batch) → (state, metrics)`; it donates the state's buffers.

    `factors` are learning-rate factors by path, `steps` is the length of the schedule, and `specs` are the partition
    specs of the trained parameters and so of their gradients.  The batch's rows are split into `loop.micro_batches`,
    whose gradients are summed.
    """
    adam = make_optimizer(optimizer)

    def train_step(state: TrainState, frozen: dict[str, jax.Array], batch: Batch) -> tuple[TrainState, StepMetrics]:
        micros = jax.tree.map(lambda x: _cut_rows(x, loop.micro_batches), batch)
        labelled = (micros.labels[..., 1:] != IGNORE_LABEL).sum(axis=(1, 2)).astype(jnp.float32)
        if loop.loss_weighting == "tokens":
            weights = jnp.full(loop.micro_batches, 1 / jnp.maximum(labelled.sum(), 1))
        else:
            weights = 1 / jnp.maximum(labelled, 1) / loop.micro_batches
        step_key = jax.random.fold_in(jax.random.key(loop.seed), state.step)
        keys = jax.random.split(step_key, len(batch.labels)) if dropout else None  # one per row, in any micro-batch
        micro_keys = jax.tree.map(lambda x: _cut_rows(x, loop.micro_batches), keys)

        def loss(params, micro: Batch, weight, keys):
            # only LLaMA's embedding (stage 1 with start and end tokens): the original trains just their rows
            markers_alone = [path for path in params if path.startswith("llama.")] == ["llama.embed.embedding"]
            params = pin(params, specs) if specs else params
            sums = loss_sums(structure.model(params, frozen), micro, loop.remat, keys, markers_alone)
            return sums.loss * weight, sums

        def add(total, part):
            gradients, sums = jax.grad(loss, has_aux=True)(state.params, *part)
            return jax.tree.map(jnp.add, total, (gradients, sums)), sums.loss * part[1]

        parts = (micros, weights, micro_keys)
        if loop.micro_batches == 1:
            gradients, sums = jax.grad(loss, has_aux=True)(state.params, *jax.tree.map(lambda x: x[0], parts))
            mean_loss = sums.loss * weights[0]
        else:
            nothing = jax.tree.map(jnp.zeros_like, state.params), LossSums(*jnp.zeros((3,)))
            (gradients, sums), losses = jax.lax.scan(add, nothing, parts)
            mean_loss = losses.sum()
        gradients, norm = clip(gradients, optimizer.max_grad_norm)
        directions, new_optimizer = adam.update(gradients, state.optimizer, state.params)
        rate = learning_rate(optimizer, steps, state.step)
        new_params = {path: p - rate * factors[path] * directions[path] for path, p in state.params.items()}
        finite = jnp.isfinite(mean_loss) & jnp.isfinite(norm)
        params, kept_optimizer = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (new_params, new_optimizer), (state.params, state.optimizer)
        )
        metrics = StepMetrics(
            mean_loss, sums.correct / jnp.maximum(sums.tokens, 1), norm, rate, finite.astype(jnp.float32)
        )
        return TrainState(state.step + 1, params, kept_optimizer), metrics

    return jax.jit(train_step, donate_argnums=0, compiler_options=_compiler_options(loop))


def _compiler_options(loop: LoopConfig) -> dict[str, Any] | None:
    kind = target().device_kind
    return next((options for name, options in loop.compiler_options.items() if CHIPS[name].kind == kind), None)


def make_evaluate_step(structure: Structure, micro_batches: int = 1) -> Callable[..., LossSums]:
    """The compiled `(params, frozen, batch) → LossSums`, without dropout, in micro-batches as in training."""

    def evaluate_step(params: dict[str, jax.Array], frozen: dict[str, jax.Array], batch: Batch) -> LossSums:
        micros = jax.tree.map(lambda x: _cut_rows(x, micro_batches), batch)
        parts = jax.lax.map(lambda micro: loss_sums(structure.model(params, frozen), micro), micros)
        return jax.tree.map(jnp.sum, parts)

    return jax.jit(evaluate_step)


def _cut_rows(x: jax.Array, number: int) -> jax.Array:
    """`[B, ...]` → `[number, B / number, ...]`: part i takes rows i, i + number, ..., so rows stay on their devices."""
    return jnp.moveaxis(x.reshape(x.shape[0] // number, number, *x.shape[1:]), 1, 0)
