"""ScienceQA's test split; the paper gives the accuracy on questions with an image."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llamavid_jax.evaluation.choice import chosen, numbered
from llamavid_jax.evaluation.folder import LLAVA, checked, need, read_json
from llamavid_jax.evaluation.items import LETTER, Item, Row, Scores, by_group, mean, unique, without_reference
from llamavid_jax.text.conversation import IMAGE

SOURCE = "it is part of ScienceQA (github.com/lupantech/ScienceQA, data/scienceqa)"
OPTIONS = "ABCDE"


def read(folder: Path, original: bool) -> tuple[list[Item], list[Row]]:
    file = need(folder, ("llava_test_CQM-A.json",), LLAVA)
    lines = checked(file, read_json(file), "id", "conversations")
    problems = read_json(need(folder, ("problems.json",), SOURCE), dict)
    split = read_json(need(folder, ("pid_splits.json",), SOURCE), dict).get("test", [])
    pictures = (
        need(folder, ("images/test", "images", "test"), SOURCE) if any("image" in line for line in lines) else folder
    )
    places = {name: place for place, name in enumerate(split)}

    def reference(name: str) -> dict[str, Any]:
        problem = problems.get(name)
        if problem is None or name not in places:
            return {"question_id": name}  # asked, but not scored
        kinds = {"subject": problem.get("subject"), "grade": problem.get("grade")}
        return {
            "question_id": name,
            "place": places[name],
            "answer": problem["answer"],
            "choices": problem["choices"],
            **kinds,
        }

    items = []
    for name, line in zip(unique(line["id"] for line in lines), lines, strict=True):
        words = line["conversations"][0]["value"].replace(IMAGE, "").strip() + "\n" + LETTER
        media = pictures / line["image"] if "image" in line else None
        prompt = f"{IMAGE}\n{words}" if media else words
        items.append(Item(name, words, words, prompt, media, False, reference(str(line["id"]))))
    asked = {item.reference["question_id"] for item in items}
    rest = [
        {"id": name, "text": None, "prompt": "Unknown", "reference": reference(name)}
        for name in split
        if name not in asked and name in problems
    ]
    return items, rest


def original_answer(text: str) -> str:
    """The letter of an answer by the original's rules; "FAILED" if they find none."""
    if text in [*OPTIONS]:
        return text
    if len(text) >= 3 and text[0] in OPTIONS and text[1:3] == ". ":
        return text[0]
    found = re.findall(r"The answer is ([A-Z]).", text)
    return found[0] if len(found) == 1 else "FAILED"


def score(rows: Sequence[Row], original: bool) -> Scores:
    known = sorted((row for row in rows if "answer" in row["reference"]), key=lambda row: row["reference"]["place"])
    analyses = {row["id"]: _analysis(row, original) for row in known}
    right = [float(analyses[row["id"]]["index"] == row["reference"]["answer"]) for row in known]
    with_picture = [analyses[row["id"]]["is_multimodal"] for row in known]
    pictured = [value for value, is_pictured in zip(right, with_picture, strict=True) if is_pictured]
    references, media = [row["reference"] for row in known], [row.get("media") for row in known]
    figures = {"accuracy with picture": mean(pictured, 100.0), "accuracy": mean(right, 100.0)}
    results = {
        "acc": figures["accuracy"].value if right else None,
        "correct": int(sum(right)),
        "count": len(right),
        "results": {row["id"]: analyses[row["id"]]["index"] for row in known},
        "outputs": {row["id"]: analyses[row["id"]]["pred"] for row in known},
    }
    return Scores(
        figures,
        {name: by_group((str(one.get(name)) for one in references), right, media) for name in ("subject", "grade")},
        {row["id"]: value for row, value in zip(known, right, strict=True)},
        {"scienceqa_result.json": json.dumps(results, indent=2).encode()},
        without_reference(rows, known),
        details={"analyses": analyses},
    )


def _analysis(row: Row, original: bool) -> dict[str, Any]:
    text, reference = "FAILED" if row["text"] is None else row["text"], row["reference"]
    choices = reference["choices"]
    parsed = original_answer(text) if original else (chosen(text, numbered(choices)) or "FAILED")
    letters = OPTIONS[: len(choices)]
    return {
        "parsed_ans": parsed,
        "ground_truth": OPTIONS[reference["answer"]],
        "pred": text,
        "is_multimodal": IMAGE in row["prompt"],
        "index": letters.index(parsed) if parsed != "FAILED" and parsed in letters else -1,
    }
