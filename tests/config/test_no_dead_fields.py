"""Every field of the four configurations changes the program, or stands on a list with what reads it instead.

The program: shapes of the parameters, and the traced way from pixels to visual tokens (with dropout) and from ids to
logits.  A printed jaxpr hides the values of arrays that a function closes over, so those are compared too.
"""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llamavid_jax.checkpoints.weights import abstract_params
from llamavid_jax.config.parts import LlamaConfig, LLaMAVIDLlavaQFormerConfig, LLaMAVIDLlavaVisionConfig
from llamavid_jax.config.schema import LLaMAVIDLlavaConfig
from llamavid_jax.inference.model import LLaMAVIDLlavaForConditionalGeneration
from llamavid_jax.inference.request import RequestError
from llamavid_jax.models.llama_vid import LlamaVid

TINY = LLaMAVIDLlavaConfig(
    LLaMAVIDLlavaVisionConfig(
        hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=2
    ),
    LLaMAVIDLlavaQFormerConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=16,
    ),
    LlamaConfig(
        vocab_size=24,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        max_position_embeddings=64,
    ),
    num_query=3,
)

OTHER_VALUES = {
    "vision_tower_config": {
        "hidden_size": 12,
        "intermediate_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 12,
        "patch_size": 4,
        "layer_norm_eps": 1e-5,
        "kind": "clip",
        "hidden_act": "quick_gelu",
        "select_feature": "cls_patch",
        "image_mean": (0.5, 0.5, 0.5),
        "image_std": (0.5, 0.5, 0.5),
    },
    "qformer_config": {
        "vocab_size": 21,
        "hidden_size": 12,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 16,
        "max_position_embeddings": 17,
        "layer_norm_eps": 1e-6,
        "cross_attention_frequency": 3,
        "dropout": 0.2,
        "encoder_hidden_size": 12,
    },
    "text_config": {
        "vocab_size": 25,
        "hidden_size": 12,
        "intermediate_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "rms_norm_eps": 1e-6,
        "rope_theta": 5e5,
        "rope_factor": 16.0,
        "tie_word_embeddings": True,
    },
    "": {
        "num_query": 4,
        "compress_type": "grid:2",
        "frame_tokens": "context",
        "mm_projector_type": "linear",
        "quantization": "int8",
        "bert_type": "qformer",
    },
}
READ_ELSEWHERE = {  # section → fields that no traced function reads; the last tests show their effects
    "vision_tower_config": {"feature_layer"},  # fixed for EVA
    "text_config": {"max_position_embeddings", "eos_token_id"},  # bound a row's length and end an answer
    # image preprocessing, the rows' layout on the host, and the text around visual tokens
    "": {"image_aspect_ratio", "image_token_index", "mm_use_im_start_end", "mm_use_im_patch_token"},
}
FIELDS = [(section, name) for section, values in OTHER_VALUES.items() for name in values]


def changed(section: str, name: str) -> LLaMAVIDLlavaConfig:
    value = OTHER_VALUES[section][name]
    if not section:
        return dataclasses.replace(TINY, **{name: value})
    return dataclasses.replace(TINY, **{section: dataclasses.replace(getattr(TINY, section), **{name: value})})


def program(config: LLaMAVIDLlavaConfig) -> Iterator:
    """Yields its parts, the cheapest first: if the parameters' shapes differ, nothing needs tracing."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: LlamaVid(config, rngs=nnx.Rngs(0))))
    size = config.vision_tower_config.image_size

    def frames(state, pixels, text_ids, key):
        model = nnx.merge(graphdef, state)
        features = model.vision(pixels)
        return model.frames_tokens(features, text_ids, text_ids > 0, key[None], has_cls=model.vision.config.has_cls)

    def logits(state, token_ids, visual):
        return nnx.merge(graphdef, state)(token_ids, visual, token_ids - 1)

    yield jax.tree.map(lambda leaf: leaf.shape, nnx.to_pure_dict(state))
    ids, visual = jnp.zeros((1, 6), jnp.int32), jnp.zeros((1, 4, config.text_config.hidden_size))
    for function, arrays in (
        (frames, (jnp.zeros((1, size, size, 3), jnp.uint8), ids, jax.random.key(0))),
        (logits, (ids, visual)),
    ):
        jaxpr = jax.make_jaxpr(function)(state, *arrays)
        yield str(jaxpr), [np.asarray(const).tolist() for const in jaxpr.consts]


@pytest.fixture(scope="module")
def unchanged():
    return list(program(TINY))


def test_the_lists_cover_every_field():
    sections = {"": TINY, **{name: getattr(TINY, name) for name in OTHER_VALUES if name}}
    for section, config in sections.items():
        names = {field.name for field in dataclasses.fields(config)} - set(OTHER_VALUES)
        assert names == set(OTHER_VALUES[section]) | READ_ELSEWHERE.get(section, set())


def test_the_same_configuration_gives_the_same_program(unchanged):
    assert list(program(dataclasses.replace(TINY, image_aspect_ratio="crop"))) == unchanged  # so the next test can fail


@pytest.mark.parametrize(("section", "name"), FIELDS)
def test_field_changes_the_program(section, name, unchanged):
    assert any(part != other for part, other in zip(program(changed(section, name)), unchanged, strict=False))


def test_feature_layer_of_clip():
    """Layer -2 computes one block less, but the parameters of all blocks stay."""
    clip = dataclasses.replace(TINY.vision_tower_config, kind="clip")
    last, before = (
        list(program(dataclasses.replace(TINY, vision_tower_config=dataclasses.replace(clip, feature_layer=layer))))
        for layer in (-1, -2)
    )
    assert last[0] == before[0] and last[1] != before[1]


def tiny_model(image_token_index: int = -200, **text) -> LLaMAVIDLlavaForConditionalGeneration:
    config = dataclasses.replace(
        TINY, image_token_index=image_token_index, text_config=dataclasses.replace(TINY.text_config, **text)
    )
    params = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.1, np.float32), abstract_params(config))
    return LLaMAVIDLlavaForConditionalGeneration(config, params)


def test_eos_token_id_ends_an_answer():
    """Equal weights give equal logits, so greedy decoding takes the first id, 0."""
    assert tiny_model().generate([[1, 5, 7]], max_new_tokens=4).token_ids == [[0, 0, 0, 0]]
    assert tiny_model(eos_token_id=0).generate([[1, 5, 7]], max_new_tokens=4).token_ids == [[]]


def test_max_position_embeddings_bounds_a_row():
    with pytest.raises(RequestError, match="more than the 8 positions"):
        tiny_model(max_position_embeddings=8).generate([[1, 5, 7]], max_new_tokens=8)


def test_image_token_index_is_a_placeholder():
    """The documented layout's placeholder is an id of the vocabulary; here no image belongs to it."""
    assert tiny_model()([[1, 23, 7]]).logits.shape[1] == 3
    with pytest.raises(RequestError, match="1 image placeholders and has 0 prompts"):
        tiny_model(image_token_index=23)([[1, 23, 7]])
