"""Refused requests: ids, visuals, masks, labels and settings, each with a line that names the value."""

import numpy as np
import pytest
from test_generation import frames

from llamavid_jax.inference.request import RequestError, Settings
from llamavid_jax.shapes import IMAGE_TOKEN

ONE = {"pixel_values": [frames(1)]}
BAD = {
    "holds 3 image placeholders and has 1 prompts": ([[1, *[IMAGE_TOKEN] * 3]], {**ONE, "prompts": [["a"]]}),
    "holds 0 image placeholders and has 1 prompts": ([[1, 2]], {**ONE, "prompts": [["a"]]}),
    "holds 1 image placeholders and has 0 prompts": ([[1, IMAGE_TOKEN]], {}),
    "has frames but 0 prompts": ([[1, IMAGE_TOKEN]], ONE),
    "has no frames but 1 prompts": ([[1, IMAGE_TOKEN]], {"prompts": [["a"]]}),
    "input_ids hold 1 rows, but prompts 2": ([[1, IMAGE_TOKEN]], {**ONE, "prompts": [["a"], ["b"]]}),
    "has both pixel_values and features": (
        [[1, IMAGE_TOKEN]],
        {**ONE, "features": [np.zeros((1, 16, 64))], "prompts": [["a"]]},
    ),
    "must be (3, 56, 56) for this model, not (3, 28, 28)": (
        [[1, IMAGE_TOKEN]],
        {"pixel_values": [np.zeros((1, 3, 28, 28), np.float32)], "prompts": [["a"]]},
    ),
    "must be (16, 64) for this model, not (17, 64)": (
        [[1, IMAGE_TOKEN]],
        {"features": [np.zeros((1, 17, 64), np.float32)], "prompts": [["a"]]},
    ),
    "of sample 0 holds no frame": ([[1, IMAGE_TOKEN]], {"pixel_values": [frames(0)], "prompts": [["a"]]}),
    "2 videos but 1 prompts": ([[1, IMAGE_TOKEN]], {"pixel_values": [[frames(1)] * 2], "prompts": [["a"]]}),
    "row 0 of input_ids holds 1024; ids are 0 to 1023, or -200 for an image": ([[1, 1024]], {}),
    "row 0 of input_ids holds -1": ([[1, -1]], {}),
    "input_ids is None": (None, {}),
    "input_ids is 5": (5, {}),
    "row 0 of input_ids is [1, [2]]": ([[1, [2]]], {}),
    "pixel_values is 5": ([[1]], {"pixel_values": 5}),
    "frames of sample 0 are 5": ([[1, IMAGE_TOKEN]], {"pixel_values": [5], "prompts": [["a"]]}),
    "frames of sample 0 are None": (
        [[1, IMAGE_TOKEN, IMAGE_TOKEN]],
        {"pixel_values": [[frames(1), None]], "prompts": [["a", "b"]]},
    ),
    "prompts of sample 0 are 'a'": ([[1, IMAGE_TOKEN]], {**ONE, "prompts": ["a"]}),
    "prompts of sample 0 are [5]": ([[1, IMAGE_TOKEN]], {**ONE, "prompts": [[5]]}),
    "holds uint8": (
        [[1, IMAGE_TOKEN]],
        {"pixel_values": [np.zeros((1, 3, 56, 56), np.uint8)], "prompts": [["a"]]},
    ),
    "holds values that are not finite": (
        [[1, IMAGE_TOKEN]],
        {"pixel_values": [np.full((1, 3, 56, 56), np.nan, np.float32)], "prompts": [["a"]]},
    ),
    "holds 4 image placeholders and has 1 prompts; give one placeholder for each prompt, or one for each of its 6": (
        [[1, *[IMAGE_TOKEN] * 4]],
        {"pixel_values": [iter(frames(3))], "prompts": [["a"]]},
    ),
    "row 0 of attention_mask is [1, 0, 1]": ([[1, 2, 3]], {"attention_mask": [[1, 0, 1]]}),
    "row 0 of attention_mask is [0.0, -1000000000.0]": ([[1, 2]], {"attention_mask": [[0, -1e9]]}),
    "row 0 of attention_mask is [1]": ([[1, 2]], {"attention_mask": [[1]]}),
    "row 0 of attention_mask is [0, 0]": ([[1, 2]], {"attention_mask": [[0, 0]]}),
    "stop is ('',)": ([[1]], {"stop": ("",)}),
    "row 0 of input_ids is float64 of shape (0,)": ([[]], {}),
    "row 1 of input_ids is float64 of shape (1,)": ([[1], [0.5]], {}),
    "input_ids hold no rows": ([], {}),
    "max_new_tokens is 0": ([[1]], {"max_new_tokens": 0}),
    "temperature is -0.1": ([[1]], {"temperature": -0.1}),
    "top_p is 0": ([[1]], {"top_p": 0}),
    "top_k is -1": ([[1]], {"top_k": -1}),
    "seed is -1": ([[1]], {"seed": -1}),
    "which with 2047 new ones is more than the 2048 positions": ([[1, 2]], {"max_new_tokens": 2047}),
}


@pytest.mark.parametrize("message", BAD)
def test_refused(tiny_model, message):
    ids, options = BAD[message]
    with pytest.raises(RequestError) as error:
        tiny_model.generate(ids, **options)
    assert message in str(error.value)


BAD_LABELS = {
    "row 0 of labels holds 1 values for 3 ids": [[1]],
    "row 0 of labels holds -1; ids are 0 to 1023, or -100 for no loss": [[-1, 1, 1]],
    "row 0 of labels holds 99999": [[99999, 1, 1]],
    "row 0 of labels is float64": [[0.5, 1, 1]],
    "row 0 of labels is [1, [2], 3]": [[1, [2], 3]],
    "input_ids hold 1 rows, but labels 2": [[1, 1, 1]] * 2,
}


@pytest.mark.parametrize("message", BAD_LABELS)
def test_wrong_labels_are_refused(tiny_model, message):
    with pytest.raises(RequestError) as error:
        tiny_model([[1, 2, 3]], labels=BAD_LABELS[message])
    assert message in str(error.value)


def test_a_row_longer_than_the_positions_is_refused(tiny_model):
    with pytest.raises(RequestError, match="row 0 holds 2049 tokens, more than the 2048 positions"):
        tiny_model([[1] * 2049])


@pytest.mark.parametrize(
    "name, value",
    [
        ("max_new_tokens", 1.5),
        ("max_new_tokens", True),
        ("temperature", None),
        ("temperature", float("inf")),
        ("temperature", float("nan")),
        ("top_p", "a"),
        ("top_k", 2**40),
        ("seed", 2**32),
        ("seed", None),
        ("stop", [1]),
        ("stop", b"a"),
        ("stop", None),
    ],
)
def test_wrong_settings_are_refused(name, value):
    with pytest.raises(RequestError, match=f"{name} is"):
        Settings(**{name: value})
