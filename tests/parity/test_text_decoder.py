"""The text decoder against transformers' InstructBLIP and BERT; padding, the CLS token, dropout."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch_models import (
    BAR,
    BERT,
    CLIP,
    CONFIG,
    SCALES,
    TorchLlamaVid,
    features_of,
    ours,
    parameters_of,
    qformer_error,
    questions,
    relative_error,
    structure,
)

from llamavid_jax.models.text_decoder import dropout


@pytest.mark.parity
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("layers", "frequency"), [(3, 1), (3, 2), (4, 2), (3, 3), (2, 5)])
def test_equals_transformers(layers, frequency, scale):
    """Two frames, a question of 200 ids and a padded one; measured: at most 3e-7 at scale 0.02 and 9e-7 at 0.2."""
    qformer = dataclasses.replace(CONFIG.qformer_config, num_hidden_layers=layers, cross_attention_frequency=frequency)
    assert qformer_error(scale, dataclasses.replace(CONFIG, qformer_config=qformer)) < BAR


@pytest.mark.parity
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("config", [CLIP, dataclasses.replace(CONFIG, bert_type="qformer")], ids=["wider", "no norm"])
def test_other_memories_equal_transformers(config, scale):
    """Memory of another width than the tower's, and memory without a norm; measured: as above."""
    assert qformer_error(scale, config) < BAR


@pytest.mark.parity
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("layers", [1, 3])
def test_bert_equals_transformers(layers, scale):
    """All states, also at padding, where each position sees those before it; measured: at most 4e-7."""
    qformer = dataclasses.replace(BERT.qformer_config, num_hidden_layers=layers)
    assert qformer_error(scale, dataclasses.replace(BERT, qformer_config=qformer)) < BAR


@pytest.mark.parity
@pytest.mark.parametrize("kept", [1, 2, 3])
@pytest.mark.parametrize("whole", [BERT, CONFIG], ids=["raw_bert", "qformer_pretrain"])
def test_the_first_layers_equal_a_decoder_that_was_cut(whole, kept):
    """`layer:N` keeps the first N of three layers with all their parts."""
    config = dataclasses.replace(whole, bert_type=f"{whole.bert_type}_layer:{kept}")
    assert config.qformer_config.num_hidden_layers == kept
    model = TorchLlamaVid(whole, 0.2)
    arrays = features_of(config, 0.2, width=config.memory_width), *questions(config)
    decoder = structure(config, np.float32).model(jax.tree.map(jnp.asarray, parameters_of(model, config))).qformer
    model.qformer.encoder.layer = model.qformer.encoder.layer[:kept]
    model.qformer.encoder.config.num_hidden_layers = kept
    assert relative_error(jax.vmap(decoder)(*arrays), model.queries(*map(torch.tensor, arrays))) < BAR


@pytest.fixture(scope="module")
def qformer():
    return ours(CONFIG, 0.2).qformer


@pytest.fixture(scope="module")
def arrays():
    """One frame with CLS, one question of 12 ids."""
    ids, _ = questions(CONFIG, 12)
    return jnp.asarray(features_of(CONFIG, 0.2)[0]), jnp.asarray(ids[0]), jnp.ones(12, bool)


def test_padding_of_the_question_changes_nothing(qformer, arrays):
    features, ids, mask = arrays
    padded = qformer(features, jnp.pad(ids, (0, 20), constant_values=3), jnp.pad(mask, (0, 20)))
    assert relative_error(padded, qformer(*arrays)) < BAR


def test_the_question_guides_the_queries(qformer, arrays):
    features, ids, mask = arrays
    assert relative_error(qformer(features, ids[::-1], mask), qformer(*arrays)) > 0.01


def test_the_cls_token_is_seen_where_it_is_there(qformer, arrays):
    """Memory with the CLS token (257 tokens) and without it (256) give different answers."""
    features, ids, mask = arrays
    assert relative_error(qformer(features[1:], ids, mask), qformer(*arrays)) > 100 * BAR


def test_dropout_needs_a_key(qformer, arrays):
    first, again, other = (qformer(*arrays, jax.random.key(seed)) for seed in (0, 0, 1))
    inference = qformer(*arrays)
    assert np.array_equal(first, again)
    assert relative_error(other, first) > 0.01
    assert relative_error(first, inference) > 0.01
    without = dataclasses.replace(CONFIG.qformer_config, dropout=0.0)
    still = ours(dataclasses.replace(CONFIG, qformer_config=without), 0.2).qformer
    assert relative_error(still(*arrays, jax.random.key(0)), inference) < BAR


def test_dropout_keeps_the_mean():
    dropped = np.asarray(dropout(jnp.ones(100_000), 0.1, jax.random.key(0)))
    assert set(np.unique(dropped).tolist()) == {0.0, float(np.float32(1) / np.float32(0.9))}
    assert abs((dropped == 0).mean() - 0.1) < 0.005  # five standard deviations
