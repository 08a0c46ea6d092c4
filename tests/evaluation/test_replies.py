"""Which of a judge's replies are read, and how."""

import pytest

from llamavid_jax.evaluation.replies import UnreadError, read_leniently, read_original


@pytest.mark.parametrize(
    "reply, expected",
    [
        ("{'pred': 'yes', 'score': 4}", (True, 4)),
        ('```json\n{"pred": "No", "score": 1}\n```', (False, 1)),
        ("Sure! {'pred': 'yes', 'score': '4.5'}.", (True, 4.5)),
        ('{"pred": true, "score": 5}', (True, 5)),
        ("{'Pred': 'no', 'Score': 0}", (False, 0)),
        ("{'pred': 'unknown', 'score': 2}", None),
        ("{'pred': 'yes', 'score': 7}", None),
        ("{'pred': 'yes', 'score': nan}", None),
        ('{"pred": "yes", "score": NaN}', None),
        ("{'pred': 'yes', 'score': 1e999}", None),
        ("{4}", None),
        ("{'pred': 'Yes.', 'score': 5}", (True, 5)),
        ("{'pred': 'no, another colour', 'score': 1}", (False, 1)),
        ("{'pred': 'yes/no', 'score': 1}", None),
        ("{''pred': 'no', ''score': 4.8}", (False, 4.8)),
        ("{'pred': 'yes', 'why': '', 'score': 4}", (True, 4)),
        ("{'pred': 'yes', 'score': True}", None),
        ("{'pred': 'yes', 'score': b'4'}", None),
        ("{'pred': 'yes', 'score': 4, 'why': ...}", None),
        ("<think>As in {'pred': 'yes', 'score': 4.8}.</think>\n\n{'pred': 'no', 'score': 1}", (False, 1)),
        ("<think>" + "So. " * 5000 + "</think>{'pred': 'no', 'score': 1}", (False, 1)),
        ("<think>It should look like {'pred': 'yes', 'score': 4.8}, and the", None),
    ],
)
def test_lenient_reading(reply, expected):
    """No score is invented or out of range, and "unknown" is not read as "no"."""
    if expected is None:
        with pytest.raises(UnreadError):
            read_leniently(reply, ("pred",))
    else:
        assert read_leniently(reply, ("pred",))[:2] == expected


@pytest.mark.parametrize(
    "reply",
    [
        *("{4}", "b'yes'", "{'pred': b'yes', 'score': 1}", "{'pred': 'yes', 'score': 1e999}"),
        *("{'pred': 'yes', 'score': b'4'}", "{'pred': 'yes', 'score': 4, 'why': {'a'}}"),
        *("{'pred': 'yes', 'score': 4, 'why': ...}", "{('a',): 1, 'pred': 'yes', 'score': 4}"),
        "{'pred': 'yes', 'score': 1" + "0" * 400 + "}",
        "{'pred': 'yes', 'score': 4, 'n': 0x" + "F" * 6000 + "}",
    ],
)
def test_literals_that_stop_the_original(reply):
    """Literals that the original's file of judgements cannot hold or its scoring cannot use."""
    with pytest.raises(UnreadError) as raised:
        read_original(reply, ("pred",))
    assert raised.value.is_final


def test_a_reply_is_kept_as_json():
    verdict = read_original("{1: (2, None), 'pred': 'yes', 'score': 4}", ("pred",))
    assert verdict == (True, 4, {"1": [2, None], "pred": "yes", "score": 4})
