"""Standard errors, the paired bootstrap, the comparison of two runs, and the page of results."""

import json
import math

import numpy as np
import pytest
from recorded_evaluation import rows_of

from llamavid_jax.errors import InputError
from llamavid_jax.evaluation import command
from llamavid_jax.evaluation.compare import bootstrap, compare
from llamavid_jax.evaluation.items import mean
from llamavid_jax.evaluation.results import page
from llamavid_jax.evaluation.sets import SETS
from llamavid_jax.evaluation.store import open_store

HEADER = {
    "set": "gqa",
    "like_original": False,
    "settings": {"temperature": 0.0, "dtype": "bfloat16", "quantize": None},
    "model": {"name": "llamavid-7b-336", "sha256": "0123456789abcdef"},
    "data": {"questions": 12, "sha256": ""},
    "shard": [0, 1],
    "versions": {"llamavid_jax": "0.1.0"},
}


@pytest.fixture
def result(official, tmp_path):
    """`result("a", [0, 1])`: a scored run of GQA that answered questions 0 and 1 right."""

    def make(name: str, right, **header):
        items, _ = SETS["gqa"].read(official("gqa"), False)
        texts = [item.reference["answer"] if n in right else "?" for n, item in enumerate(items)]
        with open_store(tmp_path / name / "answers.jsonl", HEADER | header, []) as store:
            store.write(rows_of(items, texts))
        assert command.main(["score", str(tmp_path / name)]) == 0
        return tmp_path / name

    return make


def test_standard_error():
    """The usual one for independent values; equal values of one image count as one value."""
    values = [1.0, 0.0, 1.0, 1.0]
    assert math.isclose(mean(values).error, np.std(values) / 2)
    assert math.isclose(mean(values * 3, 100.0, [*range(4)] * 3).error, 100 * np.std(values) / 2)
    assert mean([1.0]).error is None and mean([]).count == 0


@pytest.mark.parametrize("times", [1, 3])
def test_questions_of_one_picture_make_no_figure_more_certain(times):
    """The same holds for groups, and for a mean over categories that ask about the same images."""
    answers = ["yes", "no", "yes", "yes", "other", "yes", "no", "yes"]
    labels = ["yes", "no", "no", "yes", "yes", "yes", "yes", "no"]

    def rows(reference) -> list[dict]:
        return [
            {"id": f"{name} {place} {time}", "text": text, "media": f"{place}.jpg", "reference": reference(name, label)}
            for name in ("popular", "random")
            for time in range(times)
            for place, (text, label) in enumerate(zip(answers, labels, strict=True))
        ]

    pope = SETS["pope"].score(rows(lambda name, label: {"category": name, "label": label}), False)
    f1 = 6 / 10  # 3 true positives, 2 false positives, 2 false negatives
    expected = 100 * math.sqrt(3 * ((2 - 2 * f1) / 10) ** 2 + 4 * (f1 / 10) ** 2)
    figures = [*pope.groups["F1"].values(), pope.figures["mean F1 of the categories"]]
    assert len(figures) == 3 and all(math.isclose(figure.value, 100 * f1) for figure in figures)
    assert all(math.isclose(figure.error, expected) for figure in figures)

    options = {"A": "yes", "B": "no"}
    mlvu = SETS["mlvu"].score(
        rows(lambda name, _: {"question_id": 0, "answer": "A", "options": options, "groups": {"task": name}}), False
    )
    figures, right = [*mlvu.groups["task"].values(), *mlvu.figures.values()], [answer == "yes" for answer in answers]
    assert len(figures) == 4 and all(math.isclose(f.error, 100 * np.std(right) / math.sqrt(8)) for f in figures)


def test_bootstrap_agrees_with_the_normal_interval():
    rng = np.random.default_rng(1)
    differences = rng.normal(0.1, 1.0, 400)
    low, high, p = bootstrap(differences, np.arange(400))
    half = 1.96 * differences.std() / 20
    assert abs(low - (differences.mean() - half)) < 0.02 and abs(high - (differences.mean() + half)) < 0.02
    z = differences.mean() / (differences.std() / 20)
    assert abs(p - math.erfc(abs(z) / math.sqrt(2))) < 0.02
    wider = bootstrap(np.repeat(differences[:40], 10), np.repeat(np.arange(40), 10))
    assert wider[1] - wider[0] > 2.5 * (high - low)


@pytest.mark.parametrize("clusters, least", [(1, 1.0), (3, 0.25), (40, 2e-4)])
def test_few_videos_prove_nothing(clusters, least):
    """Even if all questions about them improved: n signs agree with probability 1 / 2^(n-1)."""
    p = bootstrap(np.ones(120), np.arange(120) % clusters)[2]
    assert p == pytest.approx(least)


def test_compare(result, tmp_path, capsys):
    one, two = result("a", range(6)), result("b", range(2, 12), settings={**HEADER["settings"], "quantize": "int8"})
    text, outcome = compare(one, two)
    assert outcome["difference"] == pytest.approx(4 / 12) and len(outcome["better"]) == 6 and len(outcome["worse"]) == 2
    assert outcome["differing settings"] == {"settings.quantize": (None, "int8")}
    assert "'yes' → '?'" in text and 0 < outcome["p"] <= 1
    capsys.readouterr()
    assert command.main(["compare", str(one), str(two), "--json", str(tmp_path / "c.json")]) == 0
    assert "6 became better, 2 worse" in capsys.readouterr().out
    assert json.loads((tmp_path / "c.json").read_text())["questions"] == 12
    same, outcome = compare(one, one)
    assert "within what chance makes" in same and outcome["p"] == 1


def test_questions_that_one_alone_scored_are_said(result):
    one, two = result("a", range(6)), result("b", range(6))
    assert "left out" not in compare(one, two)[0]
    found = json.loads((two / "result.json").read_text())
    (two / "result.json").write_text(json.dumps({**found, "items": dict([*found["items"].items()][2:])}))
    assert "2 questions that one of them alone scored are left out" in compare(one, two)[0]


def test_what_cannot_be_compared(result, tmp_path, capsys):
    one, other = result("a", [0]), tmp_path / "other"
    other.mkdir()
    found = json.loads((one / "result.json").read_text())
    (other / "result.json").write_text(json.dumps({**found, "header": {**HEADER, "set": "pope"}}))
    with pytest.raises(InputError, match="compare one set"):
        compare(one, other)
    (other / "result.json").write_text(json.dumps({**found, "items": {"x": 1}}))
    with pytest.raises(InputError, match="no question in common"):
        compare(one, other)
    for content in ("{}", "[]", "no"):
        (other / "result.json").write_text(content)
        assert command.main(["compare", str(one), str(other)]) == 2
        assert "cannot be read" in capsys.readouterr().err


def test_scores_are_repeatable(result):
    """From the file of answers alone, byte for byte."""
    folder = result("a", [0, 3])
    before = (folder / "result.json").read_bytes()
    assert command.main(["score", str(folder)]) == 0 and (folder / "result.json").read_bytes() == before
    assert command.main(["score", str(folder), "--like-original"]) == 0
    assert json.loads((folder / "result.json").read_text())["scored"]["like_original"]


def test_the_page_says_how_many_judgements_failed(result, tmp_path):
    """A question whose judgement failed is left out of the figure beside the paper's."""
    file = result("a", range(3)) / "result.json"
    told = json.loads(file.read_text())
    for failed, said in ((0, False), (9, True)):
        told["scored"] |= {"judge": "x", "judge counts": {"calls": 12, "failed": failed}}
        file.write_text(json.dumps(told))
        assert ("9 judgements failed and left out" in page([file])) == said


def test_answers_of_a_set_that_is_not_known(result, capsys):
    file = result("a", range(3)) / "answers.jsonl"
    file.write_text(file.read_text().replace('"set": "gqa"', '"set": "another"'))
    assert command.main(["score", str(file.parent)]) == 2
    assert "'another', which is no set" in capsys.readouterr().err


@pytest.mark.parametrize(
    "key, said", [("sé-1", "characters that no key has"), ("s\r\nx: 1", "characters"), ("s-1\r\n", "")]
)
def test_keys(result, monkeypatch, capsys, key, said):
    """No key is printed, and white space that an editor leaves at its end is stripped."""
    folder = result("a", range(3))
    monkeypatch.setenv("OPENAI_API_KEY", key)
    assert command.main(["score", str(folder), "--judge", "http://127.0.0.1:9/v1"]) == (2 if said else 0)
    error = capsys.readouterr().err
    assert said in error and key.strip() not in error


def test_page(result, tmp_path):
    """Published numbers, and beside them the measured ones with the settings that a reader must know."""
    folder = result("a", range(3), like_original=True)
    assert command.main(["results", str(tmp_path / "results.md"), str(folder)]) == 0
    page = (tmp_path / "results.md").read_text()
    assert "| llama-vid-7b-full-336 | 64.3 | published |" in page
    assert "| llama-vid-7b-full-224-video-fps-1 | 2.96 | 3.0 | 3.53 | 2.46 | 2.51 | published |" in page
    (line,) = [line for line in page.splitlines() if line.startswith("| llamavid-7b-336 ")]
    assert "| 25.00 ± " in line and "asked like the original; greedy; bfloat16; model 0123456789ab" in line
    name = result("b", range(3)) / "result.json"
    told = json.loads(name.read_text())
    told["header"] |= {"set": "longvideobench", "model": {"name": "a|b", "sha256": "0" * 64}}
    name.write_text(json.dumps(told | {"figures": {}, "notes": ["upload the answers"]}))
    assert command.main(["results", str(tmp_path / "results.md"), str(name)]) == 0
    table = (tmp_path / "results.md").read_text().partition("## LongVideoBench\n\n")[2].splitlines()
    assert table[:2] == ["| model | how |", "|---|---|"] and table[2].startswith("| a\\|b | asked by default; ")
    assert "; upload the answers; model 000000000000" in table[2]
    assert command.main(["results", str(tmp_path / "results.md")]) == 0
    assert "Nothing has been measured yet." in (tmp_path / "results.md").read_text()
