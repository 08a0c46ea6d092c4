"""Stop strings and streaming across token and character boundaries, with the golden sentencepiece vocabulary."""

import pytest
from paths import GOLDEN

from llamavid_jax.inference.stopping import RowText
from llamavid_jax.text.tokenizer import load_tokenizer

TEXT = "A man walks into the kitchen. USER: and then? ASSISTANT: He sits down."


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(GOLDEN / "text")


def push_all(row: RowText, ids, size: int) -> list[str]:
    blocks = [ids[i : i + size] for i in range(0, len(ids), size)]
    return [row.push(block) for block in blocks if not row.stopped]


@pytest.mark.parametrize("size", [1, 2, 5, 100])
@pytest.mark.parametrize(
    "text", [TEXT, "naïve café, 日本語の映画, 😀👍🏽 and 👨‍👩‍👧 …", "  two  blanks \n\n and lines\n"]
)
def test_what_is_shown_joins_to_the_text(tokenizer, text, size):
    ids = tokenizer.encode(text, add_bos=False)
    row = RowText(tokenizer, ["###"])
    shown = [*push_all(row, ids, size), row.finish()]
    assert "".join(shown) == row.text == tokenizer.decode(ids) == text
    assert not any("\ufffd" in part for part in shown)
    assert not row.stopped


def test_characters_come_whole(tokenizer):
    """An emoji is four byte tokens here: nothing is shown before the fourth."""
    ids = tokenizer.encode("a😀b", add_bos=False)
    shown = push_all(RowText(tokenizer, ()), ids, 1)
    assert "😀" in shown and len(ids) > 4


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize("stop", ["USER:", ". USER", "kitchen. U", "and th", " ", "ASSISTANT:"])
def test_a_stop_string_over_token_borders_ends_the_row(tokenizer, stop, size):
    ids = tokenizer.encode(TEXT, add_bos=False)
    row = RowText(tokenizer, ["no such text", stop])
    shown = push_all(row, ids, size)
    assert row.stopped
    assert row.text == "".join(shown) == TEXT[: TEXT.index(stop)]
    assert stop in tokenizer.decode(row.ids) and stop not in tokenizer.decode(row.ids[:-1])
    assert row.finish() == ""


def test_the_first_of_two_stop_strings_counts(tokenizer):
    row = RowText(tokenizer, ["ASSISTANT:", "USER:"])
    row.push(tokenizer.encode(TEXT, add_bos=False))
    assert row.text == "A man walks into the kitchen. "


def test_a_beginning_of_a_stop_string_is_held_back_and_released(tokenizer):
    """After "US" it is not yet known whether "USER:" follows; if it does not, the text is shown."""
    row = RowText(tokenizer, ["USER:"])
    shown = ""
    for token in tokenizer.encode("in the USA USE", add_bos=False):
        shown += row.push([token])
        assert not shown.endswith(("U", "US", "USE"))
    assert row.text == "in the USA USE" and shown == "in the USA "
    assert shown + row.finish() == "in the USA USE"


def test_a_character_that_never_becomes_whole_is_shown_at_the_end(tokenizer):
    ids = tokenizer.encode("a😀", add_bos=False)[:-1]
    row = RowText(tokenizer, ())
    shown = "".join(push_all(row, ids, 1))
    assert shown == "a" and row.finish().strip("\ufffd") == "" and row.text.startswith("a\ufffd")


def test_no_ids_no_text(tokenizer):
    row = RowText(tokenizer, ["x"])
    assert row.push([]) == row.finish() == row.text == ""
