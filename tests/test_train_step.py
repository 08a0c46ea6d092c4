"""The compiled train step: what trains and what does not, accumulation, packing, devices, steps that are not finite."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from training_cases import CONFIG, LOOP, OPTIMIZER, STAGES, batch, example, random_params, state, structure

from llamavid_jax.data.batching import RowShape
from llamavid_jax.sharding import make_mesh, param_axes, partition_spec
from llamavid_jax.training.config import LoopConfig
from llamavid_jax.training.start import batch_sharding
from llamavid_jax.training.step import PAIR_CHUNK, loss_sums, make_evaluate_step, make_train_step
from llamavid_jax.training.trainable import trainable_paths

SHAPE = RowShape(frames=3, pairs=6, questions=2, tokens=48)
ROWS = [[example(n, frames=n % 4, length=14 + 2 * n, questions=1 + n % 2)] for n in range(8)]


def split(stage: int) -> tuple[dict, dict]:
    params = random_params()
    trains = trainable_paths(params, STAGES[stage])
    return {p: v for p, v in params.items() if p in trains}, {p: v for p, v in params.items() if p not in trains}


def run(loop: LoopConfig = LOOP, steps: int = 2, stage: int = 2, data=None, place=lambda params: params, dropout=False):
    """Losses and gradient norms of some steps, and the parameters after them."""
    trained, frozen = map(place, split(stage))
    step = make_train_step(structure(loop.remat), OPTIMIZER, loop, dict.fromkeys(trained, 1.0), 10, dropout)
    now, seen = state(trained), []
    for _ in range(steps):
        now, metrics = step(now, frozen, batch(ROWS, SHAPE) if data is None else data)
        seen.append((float(metrics.loss), float(metrics.grad_norm)))
    return np.array(seen), {path: np.asarray(value) for path, value in now.params.items()}


@pytest.fixture(scope="module")
def single():
    return run()


def close(first, second, rtol):
    np.testing.assert_allclose(first[0], second[0], rtol=rtol)
    # a key's bias adds one number to all scores of a query: its gradient is rounding, which Adam makes a whole step of
    for path in (path for path in first[1] if not path.endswith("key.bias")):
        difference = np.linalg.norm(first[1][path] - second[1][path])
        assert difference <= 10 * rtol * np.linalg.norm(second[1][path]), path


def test_learns_and_moves_every_trained_parameter(single):
    seen, after = run(steps=6)
    assert seen[-1, 0] < 0.8 * seen[0, 0]
    before, frozen = split(2)
    unused = {path for path in before if np.array_equal(before[path], after[path])}
    assert not unused, unused
    assert all(path.startswith("vision.") for path in frozen)


@pytest.mark.parametrize("stage", [1, 3])
def test_frozen_parameters_stay_as_they_are(stage):
    trained, frozen = split(stage)
    copies = {path: np.array(value) for path, value in frozen.items()}
    now = state(trained)
    step = make_train_step(structure(), OPTIMIZER, LOOP, dict.fromkeys(trained, 1.0), 10)
    for _ in range(2):
        now, _ = step(now, frozen, batch(ROWS, SHAPE))
    for path, value in frozen.items():
        np.testing.assert_array_equal(value, copies[path])
    arrays = [leaf for leaf in jax.tree.leaves(now.optimizer) if leaf.ndim]
    assert sum(leaf.size for leaf in arrays) == 2 * sum(value.size for value in trained.values())


@pytest.mark.parametrize("micro_batches", [2, 4])
def test_accumulation_changes_nothing(micro_batches, single):
    close(run(dataclasses.replace(LOOP, micro_batches=micro_batches)), single, rtol=1e-5)


def test_mean_of_micro_batch_means():
    """P20: rows with few labels weigh as much as rows with many."""
    loop = dataclasses.replace(LOOP, micro_batches=4, loss_weighting="micro_batch")
    seen, _ = run(loop, steps=1)
    data, means = batch(ROWS, SHAPE), []
    for number in range(4):
        sums = loss_sums(structure().model(random_params()), jax.tree.map(lambda x, n=number: x[n::4], data))
        means.append(sums.loss / sums.tokens)
    assert float(seen[0, 0]) == pytest.approx(float(np.mean(means)), rel=1e-5)
    assert seen[0, 0] != pytest.approx(run(steps=1)[0][0, 0], rel=1e-3)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_rematerialisation_changes_nothing(remat, single):
    close(run(dataclasses.replace(LOOP, remat=remat)), single, rtol=1e-5)


def test_packed_rows_equal_separate_rows():
    """Losses and gradients of three samples in one row and in three."""
    samples = [example(20, 2, 17), example(21, 0, 12), example(22, 1, 15, questions=2)]
    shape = RowShape(frames=4, pairs=6, questions=3, tokens=64)
    packed, separate = batch([samples], shape), batch([[s] for s in samples], shape)
    params = random_params()

    def mean(params, data):
        sums = loss_sums(structure().model(params), data)
        return sums.loss / sums.tokens

    grad = jax.jit(jax.value_and_grad(mean))
    (loss, gradients), (expected, expected_gradients) = grad(params, packed), grad(params, separate)
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    for path, gradient in gradients.items():
        scale = float(jnp.linalg.norm(expected_gradients[path]))
        assert float(jnp.linalg.norm(gradient - expected_gradients[path])) <= 1e-5 * scale + 1e-9, path


def test_chunks_of_frames_and_pairs(monkeypatch):
    """Long videos go through the tower and the Q-Former in chunks, with the same numbers."""
    long = batch([[example(30, 11, 20)], [example(31, 7, 20)]], RowShape(11, 11, 1, 64))
    whole = loss_sums(structure().model(random_params()), long)
    monkeypatch.setattr("llamavid_jax.training.step.FRAME_CHUNK", 4)
    monkeypatch.setattr("llamavid_jax.training.step.PAIR_CHUNK", 4)
    assert PAIR_CHUNK == 64
    np.testing.assert_allclose(loss_sums(structure().model(random_params()), long).loss, whole.loss, rtol=1e-6)


def test_dropout_differs_by_step_and_repeats():
    first, again, without = run(dropout=True), run(dropout=True), run()
    np.testing.assert_array_equal(first[0], again[0])
    assert abs(first[0][0, 0] - without[0][0, 0]) > 1e-4


def test_a_step_that_is_not_finite_changes_nothing():
    trained, frozen = split(2)
    broken = batch(ROWS, SHAPE)
    frozen["vision.cls_token"] = frozen["vision.cls_token"].at[0].set(jnp.nan)
    before = {path: np.array(value) for path, value in trained.items()}
    step = make_train_step(structure(), OPTIMIZER, LOOP, dict.fromkeys(trained, 1.0), 10)
    after, metrics = step(state(trained), frozen, broken)
    assert not metrics.finite and int(after.step) == 1
    for path, value in after.params.items():
        np.testing.assert_array_equal(value, before[path])
    assert int(after.optimizer[0].count) == 0


def test_rows_without_labels_give_no_loss():
    data = batch(ROWS, SHAPE)
    data = data._replace(labels=np.full_like(data.labels, -100))
    params, frozen = split(2)
    step = make_train_step(structure(), OPTIMIZER, LOOP, dict.fromkeys(params, 1.0), 10)
    _, metrics = step(state(params), frozen, data)
    assert float(metrics.loss) == 0 and float(metrics.grad_norm) == 0 and metrics.finite


def test_evaluation_has_no_dropout_and_the_same_loss(single):
    params, frozen = split(2)
    sums = make_evaluate_step(structure())(params, frozen, batch(ROWS, SHAPE))
    assert float(sums.loss / sums.tokens) == pytest.approx(single[0][0, 0], rel=1e-6)
    assert 0 <= float(sums.correct) <= float(sums.tokens) == (batch(ROWS, SHAPE).labels[:, 1:] != -100).sum()


@pytest.mark.sharding
@pytest.mark.parametrize(
    "sizes",
    [
        {"fsdp": 8},
        {"tensor": 4},
        {"data": 2, "fsdp": 4},
        {"data": 2, "fsdp": 2, "tensor": 2},
        {"fsdp": 2, "sequence": 4},
    ],
    ids=str,
)
def test_sharded_equals_single(sizes, single):
    """Eight devices: two steps give one device's losses, norms and parameters."""
    mesh = make_mesh(**sizes)
    axes = param_axes({path: leaf.shape for path, leaf in structure().shapes.items()}, CONFIG)

    def place(params):
        spec = {path: partition_spec(value.shape, axes[path], mesh) for path, value in params.items()}
        return {path: jax.device_put(value, NamedSharding(mesh, spec[path])) for path, value in params.items()}

    with jax.set_mesh(mesh):
        data = jax.device_put(batch(ROWS, SHAPE), batch_sharding(mesh))
        close(run(data=data, place=place), single, rtol=2e-5)
