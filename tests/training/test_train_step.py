"""The compiled train step: trained and frozen parts, accumulation, packing, devices, non-finite steps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from training_cases import CONFIG, LOOP, OPTIMIZER, STAGES, batch, example, random_params, state, structure

from llamavid_jax.models import llama_vid, vision
from llamavid_jax.parallel.mesh import make_mesh
from llamavid_jax.parallel.sharding import partition_spec
from llamavid_jax.shapes import Batch, RowShape
from llamavid_jax.training import step
from llamavid_jax.training.config import LoopConfig
from llamavid_jax.training.layout import batch_sharding
from llamavid_jax.training.step import loss_sums, make_evaluate_step, make_train_step
from llamavid_jax.training.trainable import trainable_paths
from llamavid_jax.weights import inventory

SHAPE = RowShape(frames=4, pairs=8, questions=2, tokens=48)
ROWS = [[example(n, frames=n % 4, length=14 + 2 * n, questions=1 + n % 2)] for n in range(8)]


def split(stage: int) -> tuple[dict, dict]:
    params = random_params()
    trains = trainable_paths(params, STAGES[stage])
    return {p: v for p, v in params.items() if p in trains}, {p: v for p, v in params.items() if p not in trains}


COMPILED = {}


def compiled(stage: int = 2, loop: LoopConfig = LOOP, dropout: bool = False):
    """The step, compiled once for all tests that use it."""
    if (key := (stage, repr(loop), dropout)) not in COMPILED:
        factors = dict.fromkeys(split(stage)[0], 1.0)
        COMPILED[key] = make_train_step(structure(loop.remat), OPTIMIZER, loop, factors, 10, dropout)
    return COMPILED[key]


def run(loop: LoopConfig = LOOP, steps: int = 2, stage: int = 2, data=None, place=lambda params: params, dropout=False):
    """Losses and gradient norms of `steps` steps, and the parameters after them."""
    trained, frozen = map(place, split(stage))
    now, seen = state(trained), []
    for _ in range(steps):
        now, metrics = compiled(stage, loop, dropout)(now, frozen, batch(ROWS, SHAPE) if data is None else data)
        seen.append((float(metrics.loss), float(metrics.grad_norm)))
    return np.array(seen), {path: np.asarray(value) for path, value in now.params.items()}


@pytest.fixture(scope="module")
def single():
    return run()


def close(first, second, rtol):
    """Compares losses and gradient norms of every step; those of the second step show whether the first updates agree.

    Parameters cannot be compared: from a gradient of mere rounding errors (a key's bias adds one number to all scores
    of a query) Adam makes a full step.
    """
    np.testing.assert_allclose(first[0], second[0], rtol=rtol)


def test_learns_and_moves_every_trained_parameter():
    seen, after = run(steps=6)
    assert seen[-1, 0] < 0.8 * seen[0, 0]
    unmoved = {path for path, value in split(2)[0].items() if np.array_equal(value, after[path])}
    assert not unmoved, unmoved


@pytest.mark.parametrize("stage", [1, 3])
def test_frozen_parameters_stay_as_they_are(stage):
    trained, frozen = split(stage)
    copies = {path: np.array(value) for path, value in frozen.items()}
    now = state(trained)
    for _ in range(2):
        now, _ = compiled(stage)(now, frozen, batch(ROWS, SHAPE))
    for path, value in frozen.items():
        np.testing.assert_array_equal(value, copies[path])
    arrays = [leaf for leaf in jax.tree.leaves(now.optimizer) if leaf.ndim]
    assert sum(leaf.size for leaf in arrays) == 2 * sum(value.size for value in trained.values())


def test_accumulation_changes_nothing(single):
    close(run(dataclasses.replace(LOOP, micro_batches=4)), single, rtol=1e-5)


def test_accumulation_drops_the_same():
    """A row has the same dropout in whichever micro-batch it is."""
    whole, parts = (run(loop, dropout=True) for loop in (LOOP, dataclasses.replace(LOOP, micro_batches=4)))
    close(parts, whole, rtol=1e-5)


def test_mean_of_micro_batch_means(single):
    """Rows with few labels weigh as much as rows with many."""
    seen, _ = run(dataclasses.replace(LOOP, micro_batches=4, loss_weighting="micro_batch"), steps=1)
    sums = make_evaluate_step(structure())
    parts = [sums(*split(2), jax.tree.map(lambda x, n=n: x[n::4], batch(ROWS, SHAPE))) for n in range(4)]
    assert float(seen[0, 0]) == pytest.approx(np.mean([part.loss / part.tokens for part in parts]), rel=1e-5)
    assert abs(seen[0, 0] / single[0][0, 0] - 1) > 1e-4  # differs from the mean over tokens


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_rematerialisation_changes_nothing(remat, single):
    close(run(dataclasses.replace(LOOP, remat=remat)), single, rtol=1e-5)


def test_dropout_differs_by_step_and_repeats():
    """The same step draws the same dropout again, another step a different one."""
    trained, frozen = split(2)
    seen = []
    for number in (0, 0, 1):
        now = state(trained)._replace(step=jnp.int32(number))
        seen.append(float(compiled(dropout=True)(now, frozen, batch(ROWS, SHAPE))[1].loss))
        trained, frozen = split(2)  # the step donates the state's memory
    assert seen[0] == seen[1] and abs(seen[2] - seen[0]) > 1e-4


def test_no_random_key_serves_twice(monkeypatch):
    """The keys of the pairs are split from each row's first key; none of them equals an update's key."""
    drawn = {}

    def table(model, batch, remat, keys):
        drawn["pairs"] = jax.vmap(lambda key: jax.random.split(key, 64))(keys).ravel()
        raise InterruptedError

    monkeypatch.setattr(step, "set_dropout", lambda model, keys: drawn.update(updates=keys))
    monkeypatch.setattr(step, "visual_table", table)
    with pytest.raises(InterruptedError):
        keys = jax.random.split(jax.random.key(0), len(ROWS))
        loss_sums(structure().model(random_params()), batch(ROWS, SHAPE), "none", keys)
    drawn = jax.random.key_data(jnp.concatenate([drawn["pairs"], drawn["updates"]]))
    assert len(np.unique(drawn, axis=0)) == len(drawn) == 65 * len(ROWS)


def test_the_compiler_cannot_undo_rematerialisation():
    """Outside a loop XLA could reuse the forward's matmuls, so `prevent_cse` is set there."""
    model = structure("full").model(random_params())
    traced = jax.make_jaxpr(lambda rows: loss_sums(model, rows, "full").loss)(batch(ROWS, SHAPE))
    guards = set()

    def walk(jaxpr, in_loop):
        for equation in jaxpr.eqns:
            if "prevent_cse" in equation.params:
                guards.add((in_loop, equation.params["prevent_cse"]))
            for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    walk(inner, in_loop or equation.primitive.name in ("scan", "while"))

    walk(traced.jaxpr, in_loop=False)
    assert (False, True) in guards and (False, False) not in guards


def test_chunks_of_frames_and_pairs(monkeypatch):
    """Long videos go through the tower and the Q-Former in chunks, with the same loss."""
    long = batch([[example(30, 11, 20)], [example(31, 7, 20)]], RowShape(11, 11, 1, 64))
    whole = make_evaluate_step(structure())(*split(2), long)
    monkeypatch.setattr(vision, "FRAMES_AT_A_TIME", 4)
    monkeypatch.setattr(llama_vid, "PAIR_CHUNK", 4)
    np.testing.assert_allclose(make_evaluate_step(structure())(*split(2), long).loss, whole.loss, rtol=1e-6)


def test_evaluation_is_the_loss_of_the_step(single):
    sums = make_evaluate_step(structure(), micro_batches=4)(*split(2), batch(ROWS, SHAPE))
    assert float(sums.loss / sums.tokens) == pytest.approx(single[0][0, 0], rel=1e-6)
    assert 0 <= float(sums.correct) <= float(sums.tokens) == (batch(ROWS, SHAPE).labels[:, 1:] != -100).sum()


def test_packed_rows_equal_separate_rows():
    """Loss and gradients of three samples in one row equal those in three rows."""
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
    gradients, expected_gradients = jax.device_get((gradients, expected_gradients))
    total = np.sqrt(sum(np.sum(gradient**2) for gradient in expected_gradients.values()))
    for path, gradient in gradients.items():
        if path.endswith(("key.bias", "key_projector.bias")):  # adds one number to all scores of a query: no gradient
            assert np.linalg.norm(gradient) <= 1e-7 * total, path
            continue
        scale = np.linalg.norm(expected_gradients[path])
        assert np.linalg.norm(gradient - expected_gradients[path]) <= 1e-5 * scale + 1e-9, path


def test_a_step_that_is_not_finite_changes_nothing():
    trained, frozen = split(2)
    broken = batch(ROWS, SHAPE)
    frozen["vision.cls_token"] = frozen["vision.cls_token"].at[0].set(jnp.nan)
    before = {path: np.array(value) for path, value in trained.items()}
    after, metrics = compiled()(state(trained), frozen, broken)
    assert not metrics.finite and int(after.step) == 1
    for path, value in after.params.items():
        np.testing.assert_array_equal(value, before[path])
    assert int(after.optimizer[0].count) == 0


def test_rows_without_labels_give_no_loss():
    data = batch(ROWS, SHAPE)
    data = data._replace(labels=np.full_like(data.labels, -100))
    params, frozen = split(2)
    _, metrics = compiled()(state(params), frozen, data)
    assert float(metrics.loss) == 0 and float(metrics.grad_norm) == 0 and metrics.finite


@pytest.mark.sharding
@pytest.mark.parametrize(
    "sizes",
    [
        {"fsdp": 8},
        {"tensor": 4},
        {"data": 2, "fsdp": 2, "tensor": 2},
        {"fsdp": 2, "sequence": 4},
    ],
    ids=str,
)
def test_sharded_equals_single(sizes, single):
    """On eight devices, two steps give one device's losses and gradient norms."""
    mesh = make_mesh(**sizes)
    axes = inventory.axes(CONFIG, {path: leaf.shape for path, leaf in structure().shapes.items()})

    def place(params):
        spec = {path: partition_spec(value.shape, axes[path], mesh) for path, value in params.items()}
        return {path: jax.device_put(value, NamedSharding(mesh, spec[path])) for path, value in params.items()}

    with jax.set_mesh(mesh):
        data = batch(ROWS, SHAPE, shares=sizes.get("sequence", 1))
        data = Batch(*(jax.device_put(x, batch_sharding(mesh, field)) for field, x in data._asdict().items()))
        close(run(data=data, place=place), single, rtol=2e-5)
