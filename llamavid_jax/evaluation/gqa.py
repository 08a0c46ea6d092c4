"""GQA, testdev balanced: an answer is right if, in lower case and without final full stops, it equals the reference."""

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llamavid_jax.evaluation.folder import need, read_json
from llamavid_jax.evaluation.items import Item, Row, Scores, by_group, mean, without_reference
from llamavid_jax.evaluation.llava import read_questions

QUESTIONS = ("llava_gqa_testdev_balanced.jsonl",)
SOURCE = "it is part of GQA's download (cs.stanford.edu/people/dorarad/gqa/download.html)"
ANNOTATIONS = [
    f"{folder}testdev_balanced_questions.json" for folder in ("data/", "", "data/questions*/", "questions*/")
]
IMAGES = ("images", "data/images"), SOURCE
STEPS_UNCOUNTED = ("exist", "query: name", "choose name")  # final operations, which are not reasoning steps


def read(folder: Path, original: bool) -> tuple[list[Item], list[Row]]:
    questions = read_json(need(folder, ANNOTATIONS, SOURCE), dict)
    items = read_questions(folder, QUESTIONS, IMAGES, lambda line: _reference(questions.get(str(line["question_id"]))))
    asked = {str(item.reference["question_id"]) for item in items}
    rest = [
        {"id": name, "text": None, "prompt": "", "reference": {"question_id": name, **_reference(question)}}
        for name, question in questions.items()
        if name not in asked and question.get("isBalanced", True)
    ]
    return items, rest


def _reference(question: dict[str, Any] | None) -> dict[str, Any]:
    if question is None or not question.get("isBalanced", True):
        return {}  # asked, but not scored
    steps = [f"{step['operation']}: {step['argument']}" for step in question["semantic"]]
    return {
        "answer": question["answer"],
        "structural": question["types"]["structural"],
        "semantic": question["types"]["semantic"],
        "group": question["groups"]["global"],
        "words": len(question["question"].split()),
        "steps": sum(not any(uncounted in step for uncounted in STEPS_UNCOUNTED) for step in steps),
    }


def prediction(text: str) -> str:
    return text.rstrip(".").lower()


def score(rows: Sequence[Row], original: bool) -> Scores:
    counted = [row for row in rows if "answer" in row["reference"] and row["text"] is not None]
    references = [row["reference"] for row in counted]
    right = [float(prediction(row["text"]) == row["reference"]["answer"]) for row in counted]
    kinds = ["open" if reference["structural"] == "query" else "binary" for reference in references]
    media = [row.get("media") for row in counted]
    groups = {"answers": by_group(kinds, right, media)}
    for title, field in (
        ("structural type", "structural"),
        ("semantic type", "semantic"),
        ("steps number", "steps"),
        ("words number", "words"),
    ):
        groups[title] = by_group((reference[field] for reference in references), right, media)
    upload = [
        {"questionId": row["reference"]["question_id"], "prediction": prediction(row["text"])}
        for row in rows
        if row["text"] is not None
    ]
    return Scores(
        {"accuracy": mean(right, 100.0, media)},
        groups,
        {row["id"]: value for row, value in zip(counted, right, strict=True)},
        {"testdev_balanced_predictions.json": json.dumps(upload).encode()},
        notes=without_reference(rows, counted),
        counts={"distribution (lower is better)": distribution(counted)},
    )


def distribution(rows: Sequence[Row]) -> float | None:
    """Chi-square of the given answers against the references, divided by 100.

    It is computed per group of similar questions and averaged with the groups' numbers of questions as weights.  None
    if no question has a group.
    """
    gold: dict[str, Counter[str]] = defaultdict(Counter)
    given: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        if (group := row["reference"]["group"]) is not None:
            gold[group][row["reference"]["answer"]] += 1
            given[group][prediction(row["text"])] += 1
    total = weighted = 0.0
    for group, answers in gold.items():
        chi = sum((given[group][answer] - count) ** 2 / count for answer, count in answers.items())
        total += answers.total()
        weighted += chi * answers.total()
    return weighted / total / 100 if total else None
