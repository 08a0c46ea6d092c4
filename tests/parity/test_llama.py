"""The decoder against transformers' LLaMA, and against itself: cache, padding, bfloat16."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch_models import BAR, CONFIG, SCALES, llama_error, ours, reference, relative_error, token_ids

from llamavid_jax.models.kv_cache import KVCache

VARIANTS = {
    "grouped heads of another size, linear scaling": {},
    "as many key-value heads as heads": {"num_key_value_heads": 4},
    "one key-value head": {"num_key_value_heads": 1},
    "no scaling, heads of D/N": {"rope_factor": 1.0, "head_dim": 14},
    "base 5e5": {"rope_theta": 5e5, "rope_factor": 1.0},
    "tied head": {"tie_word_embeddings": True},
}


@pytest.mark.parity
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_transformers(variant, scale):
    """512 positions; measured: at most 8e-7 at scale 0.02 and 3e-6 at 0.2."""
    text = dataclasses.replace(CONFIG.text_config, **VARIANTS[variant])
    assert llama_error(scale, dataclasses.replace(CONFIG, text_config=text)) < BAR


def hidden_states(llama, ids):
    return llama(llama.embed(ids))


@pytest.fixture(scope="module")
def llama():
    return ours(CONFIG, 0.2).llama


@pytest.fixture(scope="module")
def ids():
    return jnp.asarray(token_ids(CONFIG, 40))


@pytest.fixture(scope="module")
def whole(llama, ids):
    return np.asarray(hidden_states(llama, ids))


def test_layers_out_of_their_stack_decode_the_same(llama, ids):
    hidden, prompt = llama.prefill(llama.embed(ids[:, :32]))
    cache, x, positions = KVCache(prompt, prompt.room(8), jnp.int32(0)), hidden[:, -1:], jnp.array([32, 23])
    layers = llama.each_layer()
    assert len(layers) == CONFIG.text_config.num_hidden_layers
    out = (jax.tree.leaves(llama.decode(x, positions, cache, given)) for given in (None, layers))
    for one, other in zip(*out, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("lengths", [(32, 32), (32, 23)])
def test_cached_decoding_equals_whole_rows(llama, ids, whole, lengths):
    """Prefill, then one position of every row at a time, with rows of equal and of different lengths."""
    lengths, steps, rows = np.array(lengths), 8, np.arange(2)
    hidden, prompt = llama.prefill(llama.embed(ids[:, :32]))
    cache = KVCache(prompt, prompt.room(8), jnp.int32(0))
    new, decode = [hidden[rows, lengths - 1]], jax.jit(lambda *arrays: llama.decode(*arrays))
    for positions in (jnp.asarray(lengths + step) for step in range(steps)):
        out, cache = decode(llama.embed(ids[rows, positions][:, None]), positions, cache)
        new.append(out[:, 0])
    places = lengths[:, None] - 1 + np.arange(steps + 1)
    assert relative_error(np.stack(new, 1), whole[rows[:, None], places]) < BAR


def test_prefill_returns_what_the_whole_row_does(llama, ids, whole):
    hidden, prompt = llama.prefill(llama.embed(ids))
    assert relative_error(hidden, whole) < BAR
    text = CONFIG.text_config
    assert prompt.k.shape == (text.num_hidden_layers, 2, 40, text.num_key_value_heads, text.head_dim)


@pytest.mark.parametrize("filling", [0, 7])
def test_padding_on_the_right_changes_nothing(llama, ids, whole, filling):
    padded = jnp.pad(ids, [(0, 0), (0, 24)], constant_values=filling)
    assert relative_error(hidden_states(llama, padded)[:, :40], whole) < BAR


def test_rows_do_not_see_each_other(llama, ids, whole):
    assert relative_error(hidden_states(llama, ids[1:]), whole[1:]) < BAR


def test_bfloat16_stays_near_float32(ids):
    """Two layers at scale 0.02, where rounding errors do not grow; measured 0.0045 (one rounding is 0.004)."""
    got = hidden_states(ours(CONFIG, 0.02, dtype=jnp.bfloat16).llama, ids)
    assert relative_error(got, hidden_states(ours(CONFIG, 0.02).llama, ids)) < 0.01


@pytest.mark.parity
def test_where_an_answer_looks_equals_transformers():
    """The answer's attention in rows of two lengths, mean over layers, heads and answer positions; measured: 3e-7."""
    llama, ids, lengths, places = ours(CONFIG, 0.2).llama, token_ids(CONFIG, 40), np.array([30, 23]), 6
    model = reference(CONFIG, 0.2).language_model
    attentions = [
        model(input_ids=torch.tensor(row[None, : length + places - 1]), output_attentions=True).attentions
        for row, length in zip(ids, lengths, strict=True)
    ]
    _, prompt = llama.prefill(llama.embed(ids[:, :32]))
    columns = lengths[:, None] - 1 + np.arange(places)
    asked = jnp.full((2, places), 1 / places)
    got = llama.look_back(llama.embed(ids[np.arange(2)[:, None], columns]), jnp.asarray(lengths - 1), asked, prompt)
    for row, length, layers in zip(np.asarray(got), lengths, attentions, strict=True):
        wanted = torch.stack(layers)[:, 0, :, length - 1 :, : length - 1].mean((0, 1, 2))
        assert relative_error(row[: length - 1], wanted.numpy()) < BAR and not row[length - 1 :].any()
