"""SEED-Bench; its videos are shown as one frame each, as in the original.  The letter has to be named."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llamavid_jax.evaluation.choice import chosen
from llamavid_jax.evaluation.folder import checked, need, read_json
from llamavid_jax.evaluation.items import Item, Row, Scores, by_group, mean, without_reference
from llamavid_jax.evaluation.llava import json_lines, read_questions

SOURCE = "it is part of SEED-Bench (github.com/AILab-CVC/SEED-Bench, DATASET.md)"
IMAGES = ("",), SOURCE


def read(folder: Path, original: bool) -> tuple[list[Item], list[Row]]:
    """Questions of SEED-Bench.json that the question file lacks count as wrong."""
    file = need(folder, ("SEED-Bench.json",), SOURCE)
    content = read_json(file, dict)
    names = {number: name for name, number in content.get("question_type", {}).items()}
    benchmark = checked(file, content.get("questions", []), "question_id", "answer", "data_type", "question_type_id")
    known = {str(one["question_id"]): _reference(place, one, names) for place, one in enumerate(benchmark)}
    items = read_questions(
        folder, ("llava-seed-bench.jsonl",), IMAGES, lambda line: known.get(str(line["question_id"]), {})
    )
    asked = {str(item.reference["question_id"]) for item in items}
    rest = [
        {"id": name, "text": None, "prompt": "", "reference": {"question_id": name, **reference}}
        for name, reference in known.items()
        if name not in asked
    ]
    return items, rest


def _reference(place: int, one: dict[str, Any], names: dict[int, str]) -> dict[str, Any]:
    return {
        "place": place,
        "seed_id": one["question_id"],
        "answer": one["answer"],
        "options": {letter: one[f"choice_{letter.lower()}"] for letter in "ABCD" if f"choice_{letter.lower()}" in one},
        "data_type": one["data_type"],
        "type_id": one["question_type_id"],
        "type": names.get(one["question_type_id"], str(one["question_type_id"])),
    }


def score(rows: Sequence[Row], original: bool) -> Scores:
    known = sorted((row for row in rows if "answer" in row["reference"]), key=lambda row: row["reference"]["place"])
    references = [row["reference"] for row in known]

    def is_right(row: Row) -> bool:
        text, reference = row["text"] or "", row["reference"]
        return (text if original else chosen(text, reference["options"])) == reference["answer"]

    right = [float(is_right(row)) for row in known]
    types = {reference["type_id"]: reference["type"] for reference in references}
    media = [row.get("media") for row in known]
    per_type = by_group((reference["type_id"] for reference in references), right, media)
    per_kind = by_group((reference["data_type"] for reference in references), right, media)
    upload = [
        {"question_id": row["reference"]["seed_id"], "prediction": row["text"]}
        for row in known
        if row["text"] is not None
    ]
    return Scores(
        {"accuracy": mean(right, 100.0, media), **{f"{kind} accuracy": figure for kind, figure in per_kind.items()}},
        {"task": {types[number]: per_type[str(number)] for number in sorted(types)}},
        {row["id"]: value for row, value in zip(known, right, strict=True)},
        {"seed_bench.jsonl": json_lines(upload)},
        without_reference(rows, known),
    )
