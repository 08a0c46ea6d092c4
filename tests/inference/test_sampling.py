"""Sampling, compared with transformers' logits warpers; draws, compared with the expected distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from llamavid_jax.inference.sampling import Sampling, keep_top_k, keep_top_p, next_tokens, sample

VOCABULARY = 50


@pytest.fixture(scope="module")
def logits():
    return jnp.asarray(np.random.default_rng(0).normal(size=(8, VOCABULARY), scale=3), jnp.float32)


def warped(warper, logits):
    return np.stack([warper(None, torch.tensor(np.array(row)[None]))[0].numpy() for row in np.asarray(logits)])


@pytest.mark.parity
@pytest.mark.parametrize("k", [1, 2, 7, 49, 50, 80])
def test_top_k_equals_transformers(logits, k):
    assert np.array_equal(jax.vmap(lambda row: keep_top_k(row, k))(logits), warped(TopKLogitsWarper(k), logits))


@pytest.mark.parity
@pytest.mark.parametrize("p", [0.01, 0.2, 0.6, 0.9, 0.99])
def test_top_p_equals_transformers(logits, p):
    assert np.array_equal(jax.vmap(lambda row: keep_top_p(row, p))(logits), warped(TopPLogitsWarper(p), logits))


def test_top_k_0_and_top_p_1_are_off(logits):
    assert np.array_equal(keep_top_k(logits[0], 0), logits[0])
    assert np.array_equal(keep_top_p(logits[0], 1.0), logits[0])


def test_top_k_keeps_ties():
    assert np.isfinite(keep_top_k(jnp.array([1.0, 2.0, 2.0, 0.0]), 1)).tolist() == [False, True, True, False]


@pytest.mark.parity
@pytest.mark.parametrize(("temperature", "k", "p"), [(1.0, 0, 1.0), (0.5, 0, 0.8), (2.0, 6, 1.0), (0.9, 12, 0.6)])
def test_draws_follow_transformers_distribution(logits, temperature, k, p):
    """Temperature, top-k, top-p in this order; 40,000 draws of one row."""
    row, draws = logits[0], 40_000
    wanted = torch.tensor(np.array(row)[None])
    for warper in (TemperatureLogitsWarper(temperature), k and TopKLogitsWarper(k), TopPLogitsWarper(p)):
        wanted = warper(None, wanted) if warper else wanted
    probabilities = torch.softmax(wanted[0], 0).numpy().astype(np.float64)
    keys = jax.random.split(jax.random.key(0), draws)
    tokens = jax.jit(jax.vmap(sample, in_axes=(None, 0, None)))(row, keys, Sampling(temperature, k, p))
    share = np.bincount(np.asarray(tokens), minlength=VOCABULARY) / draws
    assert not np.any(share[probabilities == 0])
    deviation = np.sqrt(probabilities * (1 - probabilities) / draws)
    assert np.all(np.abs(share - probabilities) <= 5 * deviation + 1e-4)


def pick(logits, seed=0, rows=None, positions=None, sampling=None, greedy=False):
    rows = np.arange(len(logits)) if rows is None else rows
    keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.key(seed), row))(jnp.asarray(rows))
    positions = jnp.full(len(logits), 7) if positions is None else positions
    return np.asarray(next_tokens(jnp.asarray(logits), keys, positions, sampling or Sampling(1.0), greedy=greedy))


def test_greedy_takes_the_likeliest(logits):
    assert np.array_equal(pick(logits, greedy=True), logits.argmax(-1))
    assert np.array_equal(pick(logits, sampling=Sampling(1.0, 1, 1.0)), logits.argmax(-1))
    assert np.array_equal(pick(logits, sampling=Sampling(1e-4)), logits.argmax(-1))


def test_a_seed_repeats_and_another_differs():
    flat = np.zeros((8, VOCABULARY), np.float32)
    assert np.array_equal(pick(flat), pick(flat))
    assert not np.array_equal(pick(flat), pick(flat, seed=1))
    assert not np.array_equal(pick(flat), pick(flat, positions=jnp.full(8, 8)))
    assert len(set(pick(flat).tolist())) > 1  # rows draw independently


def test_a_rows_draw_does_not_depend_on_the_batch(logits):
    whole = pick(logits)
    assert np.array_equal(pick(logits[2:4], rows=[2, 3]), whole[2:4])
    assert np.array_equal(pick(np.roll(logits, 3, axis=0), rows=np.roll(np.arange(8), 3)), np.roll(whole, 3))
