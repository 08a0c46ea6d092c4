"""The command that compares a checkpoint with recorded outputs: it can fail, and names the wrong array.

That it passes, with every recorded array in a row: tests/golden/test_golden.py.
"""

from pathlib import Path

import numpy as np
import pytest
from converted import ORIGINAL, convert

from conversion import check
from conversion.check import Row, compare, mean_loss, merge_labels, merge_length


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    out = tmp_path_factory.mktemp("check") / "out"
    convert(ORIGINAL, out)
    return out


@pytest.fixture(scope="module")
def recorded():
    return check.read_expected(ORIGINAL / "expected.npz")


@pytest.mark.parametrize("name,change", [("long.logits", 1.001), ("video.loss", 1.001), ("long.tokens", 1.001)])
def test_a_wrong_array_fails(converted, recorded, tmp_path, capsys, name, change):
    kind = name.split(".")[0]
    changed = {key: value for key, value in recorded.items() if key.startswith(f"{kind}.")}
    np.savez(tmp_path / "expected.npz", **changed | {name: changed[name] * np.float32(change)})
    assert check.main([str(converted), "--expected", str(tmp_path / "expected.npz")]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if "FAILED" in line]
    assert len(failed) == 1 and name in failed[0]


def test_a_text_among_pictures(converted):
    """For a row without a placeholder, the original encodes a black image and the row's words; its LLM sees neither."""
    recorded = Path(__file__).with_name("text_among_pictures.npz")
    assert check.main([str(converted), "--expected", str(recorded)]) == 0


def test_nothing_compared_is_a_failure(converted, tmp_path, capsys):
    np.savez(tmp_path / "expected.npz", other=np.zeros(3))
    assert check.main([str(converted), "--expected", str(tmp_path / "expected.npz")]) == 1
    assert "holds no recorded case" in capsys.readouterr().err


def test_bad_arguments(converted, tmp_path, capsys):
    (tmp_path / "text.npz").write_text("text")
    for directory, file in (
        (converted, "text.npz"),
        (converted, "gone.npz"),
        (tmp_path / "gone", ORIGINAL / "expected.npz"),
    ):
        assert check.main([str(directory), "--expected", str(tmp_path / file)]) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith("error: ") and "\n" not in error
    assert check.main([str(converted)]) == 2
    assert capsys.readouterr().err == "error: the following arguments are required: --expected\n"


def test_compare():
    assert compare("video.logits", [3.0, 4.0], [3.0, 5.0]).error == pytest.approx(1 / 34**0.5)
    assert compare("video.logits", np.ones(3), np.ones(2)).error == np.inf
    assert compare("generate.greedy", [1, 2, 3, 5], [1, 2, 3, 4]).error == 0.25
    assert not Row("video.loss", float("nan"), 1.0).passed


def test_merged_rows():
    ids, labels = np.array([1, -200, 5, -200, 7, 0, 0]), np.array([-100, -100, 5, -100, 7, -100, -100])
    assert merge_length(ids, 3) == 9
    np.testing.assert_array_equal(
        merge_labels(ids, labels, 3), [-100, -100, -100, -100, 5, -100, -100, -100, 7, -100, -100]
    )
    logits = np.log([[[0.5, 0.25, 0.25], [0.1, 0.2, 0.7], [1, 1, 1]]])
    assert mean_loss(logits, [np.array([-100, 1, 2])]) == pytest.approx(-(np.log(0.25) + np.log(0.7)) / 2)
