"""Why a sample gives nothing to train on."""

import re

import pytest
from paths import GOLDEN

from llamavid_jax.data.labels import training_example
from llamavid_jax.shapes import IGNORE_LABEL
from llamavid_jax.text.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(GOLDEN / "text")


@pytest.mark.parametrize(
    "turns,why",
    [
        (["Hi", "Yes"], ""),
        (["Hi", "Yes", "And?", "No"], ""),
        (["Hi"], "its last turn has no answer"),
        (["Hi", "Yes", "And?"], "its last turn has no answer"),
        (["Hi", ""], "turn 1 is empty"),
        (["", "Yes"], "turn 0 is empty"),
        (["Hi", "Yes", "And?", ""], "turn 3 is empty"),
        (["a </s> b", "Yes"], "turn 0 holds '</s>'"),
        (["Hi", "Yes</s>"], "turn 1 holds '</s>'"),
        (["Hi", "Yes", "What is ASSISTANT: here?", "No"], "turn 2 holds 'ASSISTANT:'"),
        (["Hi", "an <unk> word"], "stands for padding, <unk>"),
        (["Hi", "  yes  "], "do not add up .* white space"),
        (["Hi", " "], "do not add up .* white space"),
    ],
)
@pytest.mark.filterwarnings("ignore:the sample is ignored")
def test_why_a_sample_is_ignored(tokenizer, turns, why):
    talk = [{"from": ("human", "gpt")[number % 2], "value": turn} for number, turn in enumerate(turns)]
    example = training_example("imgsp_v1", talk, tokenizer, has_image=False)
    assert bool(example.ignored) == (example.labels == IGNORE_LABEL).all()
    assert re.search(why, example.ignored) if why else not example.ignored
