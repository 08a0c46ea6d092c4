"""POPE and MME: reading yes or no in an answer, and the labels and questions of their owners."""

import math

import pytest
from recorded_evaluation import rows_of

from llamavid_jax.evaluation import yes_no
from llamavid_jax.evaluation.sets import SETS


@pytest.mark.parametrize(
    "text, found",
    [
        ("Yes", "yes"),
        ("NO", "no"),
        ("Nope", "no"),
        ("no.", "no"),
        ("There is not a kettle", "no"),
        ("The answer is yes", "yes"),
        ("yes. No car is parked.", "yes"),
        ("", "other"),
        ("Unsure", "other"),
        ("Know", "other"),
        ("nothing", "other"),
        ("eyes", "other"),
        ("Not sure", "other"),
        ("I have no idea", "other"),
        ("I am not sure, but yes", "yes"),
        ("There isn't a kettle", "no"),
        ("I don't know", "other"),
        ("There isn\u2019t one", "no"),
        ("No, I am not sure", "no"),
    ],
)
def test_yes_or_no(text, found):
    assert yes_no.yes_or_no(text) == found


def test_mme_s_sum_of_no_task_is_none():
    """With perception alone, as with --limit, cognition is NaN rather than 0."""
    reference = {"category": "count", "file": "1.txt", "wording": "?", "label": "Yes"}
    figures = yes_no.score_mme([{"id": "1", "text": "Yes", "reference": reference}], False).figures
    assert figures["perception"].value == 100 and math.isnan(figures["cognition"].value)


def test_pope_counts_an_unclear_answer_wrong_either_way():
    table = yes_no.counts([("other", "yes"), ("other", "no"), ("yes", "yes"), ("no", "no")])
    assert (table["TP"], table["FP"], table["TN"], table["FN"], table["accuracy"]) == (1, 0, 1, 1, 0.5)


def test_pope_labels_of_another_version(official):
    """Reordered, without a typo, some missing: each question keeps its own label, which it does not in the original."""
    folder = official("pope")
    questions = folder / "llava_pope_test.jsonl"
    right = ["Yes" if item.reference["label"] == "yes" else "No" for item in SETS["pope"].read(folder, False)[0]]
    questions.write_text(questions.read_text().replace("in the image?", "in the imange?"))
    for file in (folder / "coco").iterdir():
        file.write_text("\n".join(file.read_text().splitlines()[:0:-1]))
    found = {}
    for mode in (False, True):
        rows = rows_of(SETS["pope"].read(folder, mode)[0], right)
        found[mode] = SETS["pope"].score(rows, mode)
    assert all(found[False].items.values()) and len(found[False].items) == len(right) - 3
    assert "3 questions have no label" in found[False].notes[0] and len(found[False].notes) == 1
    assert not all(found[True].items.values()) and "labels belong to other questions" in found[True].notes[1]


def test_mme_questions_with_blanks_around_them(official):
    """The original strips the benchmark's lines; so do the results for upload."""
    folder = official("mme")
    before = SETS["mme"].score(rows_of(items := SETS["mme"].read(folder, True)[0], ["Yes"] * len(items)), True)
    for file in (folder / "MME_Benchmark_release_version").rglob("*.txt"):
        file.write_text("".join(f" {line} \n" for line in file.read_text().splitlines()))
    assert SETS["mme"].score(rows_of(SETS["mme"].read(folder, True)[0], ["Yes"] * len(items)), True) == before
