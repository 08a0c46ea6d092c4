"""The loss in chunks, the learning-rate schedule, clipping and AdamW, against plain formulas and PyTorch."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from paths import GOLDEN

from llamavid_jax.checkpoints.weights import abstract_params
from llamavid_jax.config.schema import LLaMAVIDLlavaConfig
from llamavid_jax.errors import ConfigError
from llamavid_jax.models import loss
from llamavid_jax.shapes import IGNORE_LABEL
from llamavid_jax.training.config import OptimizerConfig
from llamavid_jax.training.optimizer import clip, decays, learning_rate, lr_factors, make_optimizer


def inputs(vocabulary: int, rows: int = 3, tokens: int = 11, width: int = 8):
    random = np.random.default_rng(vocabulary)
    hidden = random.normal(size=(rows, tokens, width)).astype(np.float32)
    kernel = random.normal(size=(width, vocabulary)).astype(np.float32)
    labels = random.integers(0, vocabulary, (rows, tokens)).astype(np.int32)
    labels[0, :4], labels[1] = IGNORE_LABEL, IGNORE_LABEL
    return jnp.array(hidden), jnp.array(kernel), jnp.array(labels)


def plain(hidden, kernel, labels) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The same sums from the full logits."""
    logits = jnp.einsum("btd,dv->btv", hidden, kernel)[:, :-1]
    targets = labels[:, 1:]
    kept = targets != IGNORE_LABEL
    own = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.where(kept, targets, 0)[..., None], axis=-1)[..., 0]
    correct = kept & (logits.argmax(axis=-1) == targets)
    return -jnp.sum(own * kept), correct.sum(), kept.sum()


def relative(a, b) -> float:
    return float(np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(np.asarray(b)))


@pytest.mark.parity
@pytest.mark.parametrize("vocabulary", [2, 7, 16, 33, 64, 101])
def test_the_loss_is_that_of_whole_logits(monkeypatch, vocabulary):
    """A vocabulary below one chunk of 16, of whole chunks, and with padding in the last chunk."""
    monkeypatch.setattr(loss, "VOCABULARY_CHUNK", 16)
    hidden, kernel, labels = inputs(vocabulary)
    labels = labels.at[2, 1:6].set((hidden[2] @ kernel).argmax(axis=-1)[:5])  # so that some predictions are right
    found, expected = loss.next_token_sums(hidden, kernel, labels), plain(hidden, kernel, labels)
    assert float(found.loss) == pytest.approx(float(expected[0]), rel=1e-6)
    assert (int(found.correct), int(found.tokens)) == (int(expected[1]), int(expected[2]))
    assert 5 <= found.correct <= found.tokens == 17  # 10 and 7 in three rows; a row's first label is no target

    gradients = jax.grad(lambda h, k: loss.next_token_sums(h, k, labels).loss, (0, 1))(hidden, kernel)
    wanted = jax.grad(lambda h, k: plain(h, k, labels)[0], (0, 1))(hidden, kernel)
    assert all(relative(own, other) < 1e-6 for own, other in zip(gradients, wanted, strict=True))


def test_large_scores_do_not_overflow(monkeypatch):
    monkeypatch.setattr(loss, "VOCABULARY_CHUNK", 16)
    hidden, kernel, labels = inputs(33)
    found, expected = loss.next_token_sums(300 * hidden, kernel, labels), plain(300 * hidden, kernel, labels)
    assert float(found.loss) == pytest.approx(float(expected[0]), rel=1e-6)


def test_rows_without_labels_give_zeros():
    """Without targets: no loss, and gradients of zeros rather than NaN."""
    hidden, kernel, labels = inputs(33)
    empty = jnp.full_like(labels, IGNORE_LABEL).at[:, 0].set(3)  # no position predicts the first token
    assert loss.next_token_sums(hidden, kernel, empty) == (0, 0, 0)
    gradients = jax.grad(lambda h, k: loss.next_token_sums(h, k, empty).loss, (0, 1))(hidden, kernel)
    assert all((np.asarray(gradient) == 0).all() for gradient in gradients)


def test_no_gradient_holds_the_logits_of_all_tokens():
    """16,384 tokens, 32,000 words: the compiled gradient takes the memory of two chunks, not of [T, V] float32."""
    tokens, width, vocabulary = 16384, 64, 32000
    arguments = (
        jax.ShapeDtypeStruct((1, tokens, width), jnp.float32),
        jax.ShapeDtypeStruct((width, vocabulary), jnp.float32),
        jax.ShapeDtypeStruct((1, tokens), jnp.int32),
    )

    def memory(sums) -> int:
        gradient = jax.jit(jax.grad(lambda h, k, labels: sums(h, k, labels)[0], (0, 1)))
        return gradient.lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    whole = 4 * tokens * vocabulary
    assert memory(plain) >= whole  # the measurement includes them
    assert memory(loss.next_token_sums) < whole / 2


@pytest.mark.parametrize("stage", [1, 2])
def test_learning_rates_are_the_recorded_ones(stage):
    record = np.load(GOLDEN / "short_video_mean" / f"train_stage{stage}.npz")
    hyper = json.loads(str(record["hyper"]))
    config = OptimizerConfig(learning_rate=hyper["lr"], warmup=hyper["warmup_steps"] / hyper["steps"])
    rates = [float(learning_rate(config, hyper["steps"], step)) for step in range(hyper["steps"])]
    np.testing.assert_allclose(rates, record["learning_rates"], rtol=1e-6)


def test_learning_rate_by_hand():
    """3 % of 100 steps is 3; of 101 it is rounded up to 4; also without warm-up."""

    def rates(warmup, steps, of):
        return [float(learning_rate(OptimizerConfig(learning_rate=8.0, warmup=warmup), steps, step)) for step in of]

    np.testing.assert_allclose(rates(0.03, 100, (0, 1, 2, 3, 100)), [0, 8 / 3, 16 / 3, 8, 0], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(rates(0.03, 101, (1, 2, 4)), [2, 4, 8], rtol=1e-6)
    np.testing.assert_allclose(rates(0.0, 4, range(5)), [8, 6.828427, 4, 1.171573, 0], rtol=1e-6, atol=1e-6)
    assert rates(0.0, 1, (0,)) == [8]


def test_biases_and_layer_norms_do_not_decay():
    """As the original: none for `bias` in a name and for LayerNorms, but LLaMA's RMSNorms do decay."""
    paths = abstract_params(LLaMAVIDLlavaConfig())
    kept = {path for path in paths if not decays(path)}
    assert {path.rsplit(".", 1)[-1] for path in kept} == {"bias", "q_bias", "v_bias", "scale"}
    assert {path.rsplit(".", 1)[-1] for path in paths.keys() - kept} == {
        "kernel", "embedding", "query", "cls_token", "position", "scale",
    }  # fmt: skip
    assert all("norm" in path and "llama" not in path for path in kept if path.endswith("scale"))


def test_learning_rate_factors():
    paths = ["llama.a", "llama.b", "qformer.a"]
    assert lr_factors(paths, OptimizerConfig()) == {"llama.a": 1, "llama.b": 1, "qformer.a": 1}
    config = OptimizerConfig(lr_factors={"llama.a": 0.5, "qformer.*": 2})
    assert lr_factors(paths, config) == {"llama.a": 0.5, "llama.b": 1, "qformer.a": 2}
    for factors, says in (({"llama.*": 2, "*.a": 3}, r"llama\.a matches llama\.\* and \*\.a"),
                          ({"vision.*": 2}, r"'vision\.\*' matches no parameter")):  # fmt: skip
        with pytest.raises(ConfigError, match=f"optimizer.lr_factors: .*{says}"):
            lr_factors(paths, OptimizerConfig(lr_factors=factors))


def gradients_of(step: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(step)
    return {
        "a.kernel": random.normal(size=(4, 3)),
        "a.bias": random.normal(size=3),
        "norm.scale": random.normal(size=3),
    }


@pytest.mark.parity
@pytest.mark.parametrize("max_norm", [0.1, 1.0, 100.0])
def test_clipping_is_pytorchs(max_norm):
    gradients = {name: np.float32(value) for name, value in gradients_of(0).items()}
    parameters = {name: torch.nn.Parameter(torch.zeros(value.shape)) for name, value in gradients.items()}
    for name, parameter in parameters.items():
        parameter.grad = torch.tensor(gradients[name])
    expected = torch.nn.utils.clip_grad_norm_(list(parameters.values()), max_norm)
    clipped, norm = clip({name: jnp.array(value) for name, value in gradients.items()}, max_norm)
    assert float(norm) == pytest.approx(float(expected), rel=1e-6)
    for name, parameter in parameters.items():
        np.testing.assert_allclose(clipped[name], parameter.grad.numpy(), rtol=1e-6)


@pytest.mark.parity
def test_five_steps_of_adamw_are_pytorchs():
    """Non-default decay, betas and eps; no decay for biases and norms; a changing rate."""
    config = OptimizerConfig(learning_rate=0.1, betas=[0.8, 0.95], eps=1e-3, weight_decay=0.3, warmup=0.4)
    begin = {name: np.float32(value) for name, value in gradients_of(99).items()}
    parameters = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in begin.items()}
    groups = [{"params": [parameters["a.kernel"]], "weight_decay": 0.3},
              {"params": [parameters["a.bias"], parameters["norm.scale"]], "weight_decay": 0.0}]  # fmt: skip
    reference = torch.optim.AdamW(groups, lr=1.0, betas=(0.8, 0.95), eps=1e-3)
    adam, params = make_optimizer(config), {name: jnp.array(value) for name, value in begin.items()}
    state = adam.init(params)
    for step in range(5):
        rate, gradients = float(learning_rate(config, 5, step)), gradients_of(step)
        for group in reference.param_groups:
            group["lr"] = rate
        for name, parameter in parameters.items():
            parameter.grad = torch.tensor(np.float32(gradients[name]))
        reference.step()
        directions, state = adam.update({name: jnp.float32(value) for name, value in gradients.items()}, state, params)
        params = optax.apply_updates(params, jax.tree.map(lambda direction, rate=rate: -rate * direction, directions))
    for name, parameter in parameters.items():
        np.testing.assert_allclose(params[name], parameter.detach().numpy(), rtol=2e-6, atol=1e-7)
        assert relative(params[name], begin[name]) > 0.05
