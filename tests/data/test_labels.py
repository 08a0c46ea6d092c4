"""Why a sample gives nothing to train on."""

import json
import re

import pytest
import tokenizers
from paths import GOLDEN
from tokenizers import models, pre_tokenizers

from llamavid_jax.data.labels import check_template, training_example
from llamavid_jax.errors import InputError
from llamavid_jax.shapes import IGNORE_LABEL
from llamavid_jax.text.conversation import TEMPLATES
from llamavid_jax.text.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(GOLDEN / "text")


def test_a_template_that_trains_nothing_with_a_tokenizer_is_refused(tokenizer, tmp_path):
    """As with the byte-level BPE of newer language models, where `</s>` is no token."""
    for template in set(TEMPLATES) - {"llava_llama_2"}:  # which asks for one that keeps the space before `</s>`
        check_template(template, tokenizer)
    with pytest.raises(InputError, match="no token would be trained in template 'llava_llama_2'"):
        check_template("llava_llama_2", tokenizer)
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    other = tokenizers.Tokenizer(models.BPE(letters, []))
    other.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    other.add_special_tokens(["<|end|>"])
    other.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    other = load_tokenizer(tmp_path)
    for template in ("llava_v0", "plain_guided"):
        check_template(template, other)
    for template in ("imgsp_v1", "vicuna_v1"):
        with pytest.raises(InputError, match=rf"tokenizer\.json no token would be trained in template '{template}'"):
            check_template(template, other)


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
