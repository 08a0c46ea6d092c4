"""A conversation's prompts: what an earlier prompt has computed is reused, and the answers stay the same."""

import numpy as np
import pytest
from test_generation import PROMPT, TEXT, frames

from llamavid_jax.inference.generate import decode_block, extend, prefill
from llamavid_jax.inference.prompt_cache import PromptCache
from llamavid_jax.inference.request import RequestError
from llamavid_jax.shapes import IMAGE_TOKEN

FIRST = [1, 40, IMAGE_TOKEN, 42, 43]
SECOND = [*FIRST, 50, 51, 52, 53, IMAGE_TOKEN, 60, 61]


@pytest.fixture(scope="module")
def blocks(tiny_model) -> list[np.ndarray]:
    return [tiny_model.visual_tokens(frames(3), [question])[0] for question in (PROMPT, "how many dogs")]


def ask(model, ids, blocks, cache=None, **settings):
    return model.generate([ids], visual_tokens=[blocks], max_new_tokens=12, ignore_eos=True, cache=cache, **settings)


def test_ready_tokens_answer_as_frames_do(tiny_model, blocks):
    whole = tiny_model.generate(
        [SECOND, TEXT],
        pixel_values=[frames(3), None],
        prompts=[[PROMPT, "how many dogs"], []],
        max_new_tokens=12,
        ignore_eos=True,
    )
    ready = tiny_model.generate([SECOND, TEXT], visual_tokens=[blocks, None], max_new_tokens=12, ignore_eos=True)
    assert (ready.token_ids, ready.prompt_tokens, ready.visual_tokens) == (whole.token_ids, [22, 4], [12, 0])


@pytest.mark.parametrize("kind", ["float", "int8"])
def test_the_second_question_computes_what_is_new(tiny_model, blocks, kind):
    model = type(tiny_model)(tiny_model.config, tiny_model.params, kv_cache=kind)
    cache = PromptCache()
    ask(model, FIRST, blocks[:1], cache)
    again = ask(model, SECOND, blocks, cache)
    assert again.cached_tokens == 4 + 6
    assert again.token_ids == ask(model, SECOND, blocks).token_ids
    # a conversation with another beginning: only the common prefix is reused, and only the same array counts as equal
    assert ask(model, SECOND, [blocks[0].copy(), blocks[1]], cache).cached_tokens == 2
    assert ask(model, [1, 41, *SECOND[2:]], blocks, cache).cached_tokens == 1
    assert ask(model, SECOND, blocks, cache).cached_tokens == 1
    # the same prompt again: only its last position runs, for the next token
    assert ask(model, SECOND, blocks, cache).cached_tokens == 21
    shorter = ask(model, FIRST, blocks[:1], cache)
    assert shorter.cached_tokens == 9 and shorter.token_ids == ask(model, FIRST, blocks[:1]).token_ids


def test_a_conversation_compiles_for_new_buckets_alone(tiny_model, blocks):
    """Sixteen questions compile a program for each size of the cache, not for each question."""
    programs = (prefill, extend, decode_block)
    cache, ids, tokens, compiled = PromptCache(), FIRST, blocks[:1], []
    for number in range(16):
        ask(tiny_model, ids, tokens, cache)
        compiled.append(sum(program._cache_size() for program in programs))
        ids, tokens = [*ids, *range(100, 108 + number % 5), IMAGE_TOKEN, 60], [*tokens, blocks[number % 2].copy()]
    new = np.diff(compiled)
    assert new.sum() <= 2 * 7 and (new[-6:] > 0).sum() <= 1  # 64, 96, ..., 384 positions


def test_an_answer_that_is_broken_off_leaves_an_empty_cache(tiny_model, blocks):
    cache = PromptCache()
    ask(tiny_model, FIRST, blocks[:1], cache)

    def stop(row, text):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask(tiny_model, SECOND, blocks, cache, streamer=stop)
    again = ask(tiny_model, SECOND, blocks, cache)
    assert again.cached_tokens == 0 and again.token_ids == ask(tiny_model, SECOND, blocks).token_ids


@pytest.mark.parametrize(
    ("ids", "given", "message"),
    [
        ([FIRST], {"visual_tokens": [[]]}, "holds 1 image placeholders and has 0 prompts"),
        ([FIRST], {"visual_tokens": [np.zeros((2, 3, 64))]}, "are array"),
        ([FIRST], {"visual_tokens": [[np.zeros((2, 60), np.float32)]]}, r"hold \(2, 60\); give an array \[n, 64\]"),
        ([FIRST], {"visual_tokens": [[np.zeros((0, 64), np.float32)]]}, r"hold \(0, 64\)"),
        ([FIRST], {"visual_tokens": [[np.zeros((2, 64), np.float32)]], "prompts": [["a"]]}, "give one of them"),
        ([FIRST] * 2, {"visual_tokens": [[np.zeros((2, 64), np.float32)]]}, "hold 2 rows, but visual_tokens 1"),
        ([TEXT], {"cache": PromptCache()}, "cache goes with one row and its visual_tokens"),
        ([TEXT] * 2, {"visual_tokens": [None] * 2, "cache": PromptCache()}, "cache goes with one row"),
    ],
)
def test_refused(tiny_model, ids, given, message):
    with pytest.raises(RequestError, match=message):
        tiny_model.generate(ids, **given)
