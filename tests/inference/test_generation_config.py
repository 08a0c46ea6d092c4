"""GenerationConfig's fields, and those that this model does not support."""

import pytest

from llamavid_jax.inference.generation_config import read_settings
from llamavid_jax.inference.request import RequestError, Settings


@pytest.mark.parametrize(
    "config, given, expected",
    [
        (None, {}, Settings()),
        (None, {"temperature": 0.5, "top_k": 3}, Settings(temperature=0.5, top_k=3)),
        (None, {"do_sample": True}, Settings(temperature=1.0)),
        (None, {"do_sample": False, "temperature": 0.5}, Settings()),
        ({"temperature": 0.7, "top_k": 50}, {}, Settings(top_k=50)),  # as in transformers, greedy
        ({"do_sample": True, "temperature": 0.7, "top_p": 0.9}, {}, Settings(temperature=0.7, top_p=0.9)),
        ({"do_sample": True}, {"do_sample": False}, Settings()),
        ({"temperature": 0.7}, {"do_sample": True}, Settings(temperature=0.7)),
        ({"max_new_tokens": 9, "stop_strings": ["x"]}, {"max_new_tokens": 512}, Settings(512, stop=["x"])),
        ({"max_new_tokens": 9, "num_beams": 1, "repetition_penalty": 1.0, "max_length": 20}, {}, Settings(9)),
        ({"eos_token_id": [2]}, {"seed": 4}, Settings(seed=4)),
    ],
)
def test_settings(config, given, expected):
    assert read_settings(config, 2, **given) == expected


def test_the_class_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.GenerationConfig(do_sample=True, temperature=0.3, max_new_tokens=7, eos_token_id=2)
    assert read_settings(config, 2, top_k=0) == Settings(7, temperature=0.3)
    assert read_settings(transformers.GenerationConfig(), 2, top_k=0) == Settings()


@pytest.mark.parametrize(
    "config, message",
    [
        ({"num_beams": 4}, "num_beams 4, which is not done here"),
        ({"repetition_penalty": 1.2}, "repetition_penalty 1.2"),
        ({"max_length": 100}, "max_length 100; set max_new_tokens"),
        ({"eos_token_id": [2, 3]}, r"eos_token_id \[2, 3\]; this model ends at 2"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        (5, "generation_config is 5"),
    ],
)
def test_what_is_not_done(config, message):
    with pytest.raises(RequestError, match=message):
        read_settings(config, 2)
