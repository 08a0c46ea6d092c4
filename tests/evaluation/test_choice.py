"""Which option an answer names."""

import pytest

from llamavid_jax.evaluation.choice import chosen, numbered


@pytest.mark.parametrize(
    "text, letter",
    [
        ("B", "B"),
        ("b", "B"),
        ("(B)", "B"),
        ("B.", "B"),
        ("B. two dogs", "B"),
        ("**B**", "B"),
        ("The answer is B", "B"),
        ("The answer is: A", "A"),
        ("Answer: **A**", "A"),
        ("'A'", "A"),
        ("A\n\nThe dog is alone.", "A"),
        ("A - one dog", "A"),
        ('The answer is "A".', "A"),
        ("the correct option: (B) two dogs", "B"),
        ("I think that it is C", "C"),
        ("two dogs", "B"),
        ("Two dogs.", "B"),
        ("A dog and a cat", None),
        ("", None),
        ("E", None),
        ("The answer is B. The answer is C.", None),
        ("B or C", None),
        ("A and B", None),
        ("A or C", None),
        ("A, B", None),
        ("(A), (B) and (C)", None),
        ("Both A and C are right", None),
        ("The answer is A or B", None),
        ("The answer is not A", None),
        ("The answer is B, A is wrong", "B"),
        ("A and C are wrong. The answer is B.", "B"),
        ("Choice A is a cat, option C is a fox. The answer is B.", "B"),
        ("Words such as issue, puzzle, answer\nA comparison has others. The answer is B.", "B"),
        ("B, A cat", "B"),
        ("Answer:A", "A"),
        ("It is A.", "A"),
        ("I choose A", "A"),
        ("The answer is A because it barks", "A"),
        ("a.m. or later", None),
        ("I'm not sure", None),
        ("A one dog", "A"),
        ("B two dogs.", "B"),
        ("A is the correct option.", "A"),
        ("A is a dog", None),
        ('"two dogs"', "B"),
        ("**Two dogs.**", "B"),
    ],
)
def test_letters(text, letter):
    """ "A dog" names no option; "I" and "A" alone inside a sentence are words."""
    assert chosen(text, numbered(["one dog", "two dogs", "three dogs", "none"])) == letter
    assert chosen(text, {}) is None


@pytest.mark.parametrize(
    "text, letter",
    [("Vitamin C", "A"), ("A dog", "C"), ("Answer: a dog.", "C"), ("P.M.", "D"), ("C", "C"), ("A.", "A")],
)
def test_an_option_s_own_words_come_before_letters_in_them(text, letter):
    assert chosen(text, numbered(["vitamin C", "vitamin D", "A dog", "p.m."])) == letter


@pytest.mark.parametrize("text", ["", " ", ".", '""'])
def test_an_option_without_words_is_named_by_its_letter_alone(text):
    """Two such options are the right ones in MLVU's "ego"; no answer and a broken question must not match them."""
    options = numbered(["the garage", "the toolbox", "", "the shelf"])
    assert chosen(text, options) is None and chosen("C", options) == "C"


def test_words_that_two_options_have():
    """The first of them is chosen; the score accepts it for the second too."""
    assert chosen("Blue.", numbered(["Red", "Blue", "White", "Blue"])) == "B"


def test_an_answer_of_several_options_is_none():
    assert chosen("I", numbered(list("abcdefghi"))) == "I"
    assert chosen("Is A the best? I say D", numbered(list("wxyz"))) == "D"
