"""VQAv2, VizWiz and TextVQA: answers compared with those of ten people.

Servers hold the reference answers to the test questions of VQAv2 and VizWiz; the files to upload are written.  If the
folder has annotations (of a validation split, in the official form), the accuracy is also computed here, by the
servers' public rules.
"""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llamavid_jax.evaluation.folder import checked, need, read_json, read_lines
from llamavid_jax.evaluation.items import Item, Row, Scores, by_group, mean, without_reference
from llamavid_jax.evaluation.llava import read_questions
from llamavid_jax.evaluation.vqa_text import for_upload, official, one_line, textvqa_scores, vqa_accuracy

VQA_IMAGES = ("test2015", "val2014"), "test2015.zip of images.cocodataset.org has it"
VIZWIZ_IMAGES = ("test", "val"), "the images are at vizwiz.org/tasks-and-datasets/vqa"
TEXTVQA_IMAGES = ("train_images", "train_val_images/train_images"), "train_val_images.zip of textvqa.org/dataset has it"


# ---- VQAv2


def read_vqav2(folder: Path, original: bool) -> tuple[list[Item], list[Row]]:
    """test-dev2015; the upload has all questions of test2015, as its server requires, '' for those not asked."""
    people = {}
    if files := sorted(folder.glob("v2_mscoco_*annotations.json"), key=lambda file: "_train" in file.name):
        annotations = checked(files[0], read_json(files[0], dict).get("annotations", []), "question_id", "answers")
        people = {str(annotation["question_id"]): _people(annotation) for annotation in annotations}
    items = read_questions(
        folder,
        ("llava_vqav2_mscoco_test-dev2015.jsonl", "llava_vqav2_mscoco_val2014.jsonl"),
        VQA_IMAGES,
        lambda line: people.get(str(line["question_id"]), {}),
    )
    asked = {str(item.reference["question_id"]) for item in items}
    everything = folder / "llava_vqav2_mscoco_test2015.jsonl"
    rest = read_lines(everything, "question_id") if everything.exists() else []
    order = {str(line["question_id"]): number for number, line in enumerate(rest)}
    for item in items:
        if (name := str(item.reference["question_id"])) in order:
            item.reference["upload_place"] = order[name]
    unasked = [
        _unasked(line["question_id"], upload_place=place, **people.get(str(line["question_id"]), {}))
        for place, line in enumerate(rest)
        if str(line["question_id"]) not in asked
    ]
    return items, unasked


def score_vqav2(rows: Sequence[Row], original: bool) -> Scores:
    prepare = for_upload if original else official
    ordered = sorted(
        (row for row in rows if "upload_place" in row["reference"]), key=lambda row: row["reference"]["upload_place"]
    )
    upload = [
        {"question_id": row["reference"]["question_id"], "answer": prepare(row["text"] or "")}
        for row in ordered or rows
    ]
    return _scores(rows, prepare, {"vqav2_test2015.json": json.dumps(upload).encode()})


# ---- VizWiz


def read_vizwiz(folder: Path, original: bool) -> tuple[list[Item], list[Row]]:
    people = {}
    if (file := folder / "val.json").exists():
        people = {one["image"]: _people(one) for one in checked(file, read_json(file), "image", "answers")}
    items = read_questions(
        folder,
        ("llava_test.jsonl", "llava_val.jsonl"),
        VIZWIZ_IMAGES,
        lambda line: {"image": line["image"], **people.get(line["image"], {})},
    )
    return items, []


def score_vizwiz(rows: Sequence[Row], original: bool) -> Scores:
    prepare = for_upload if original else official
    upload = [{"image": row["reference"]["image"], "answer": prepare(row["text"] or "")} for row in rows]
    return _scores(rows, prepare, {"vizwiz_test.json": json.dumps(upload).encode()})


# ---- both


def _people(annotation: dict[str, Any]) -> dict[str, Any]:
    kinds = {name: annotation[name] for name in ("answer_type", "question_type") if name in annotation}
    return {"people": [one["answer"] for one in annotation["answers"]], **kinds}


def _unasked(question_id: Any, **reference: Any) -> Row:
    return {
        "id": str(question_id),
        "text": None,
        "prompt": "",
        "reference": {"question_id": question_id, **reference},
    }


def _accuracy(row: Row, prepare: Callable[[str], str]) -> float:
    """An answer's accuracy; 0 for a broken question, even if a person's answer is empty after normalisation."""
    return 0.0 if "error" in row else vqa_accuracy(prepare(row["text"] or ""), row["reference"]["people"])


def _scores(rows: Sequence[Row], prepare: Callable[[str], str], files: dict[str, bytes]) -> Scores:
    """Accuracy of the uploaded answers, if there are references; and of the texts as the model wrote them."""
    known = [row for row in rows if "people" in row["reference"]]
    values = [_accuracy(row, prepare) for row in known]
    raw = [_accuracy(row, str) for row in known]
    media = [row.get("media") for row in known]
    figures = {"accuracy": mean(values, 100.0, media), "accuracy of the texts as they are": mean(raw, 100.0, media)}
    groups = {
        title: by_group((row["reference"].get(field) for row in known), values, media)
        for title, field in (("answer type", "answer_type"), ("question type", "question_type"))
        if known and all(field in row["reference"] for row in known)
    }
    items = {row["id"]: value for row, value in zip(known, values, strict=True)}
    notes = ["the references are on the set's server: upload the file in submission/"]
    if known:
        notes = ["of the references in the folder; the paper's figure is the server's", *without_reference(rows, known)]
    details = {"unprocessed": {row["id"]: value for row, value in zip(known, raw, strict=True)}} if known else {}
    return Scores(figures if known else {}, groups, items, files, notes, details=details)


# ---- TextVQA


def read_textvqa(folder: Path, original: bool) -> tuple[list[Item], list[Row]]:
    file = need(
        folder, ("TextVQA_0.5.1_val.json",), "dl.fbaipublicfiles.com/textvqa/data/TextVQA_0.5.1_val.json has it"
    )
    annotations = checked(file, read_json(file, dict).get("data", []), "image_id", "question", "answers")
    people = {(one["image_id"], one["question"].lower()): one["answers"] for one in annotations}

    def reference(line: dict[str, Any]) -> dict[str, Any]:
        question = asked_question(line["text"])
        found = people.get((line["question_id"], question))
        return {"question": question} if found is None else {"question": question, "people": found}

    names = "llava_textvqa_val_v051_ocr.jsonl", "llava_textvqa_val_v051*.jsonl"
    return read_questions(folder, names, TEXTVQA_IMAGES, reference), []


def asked_question(prompt: str) -> str:
    """The question alone, in lower case, from a prompt in any of the four forms of LLaVA's files."""
    if prompt.startswith("OCR tokens: "):
        found = re.search(r"Question: (.*?) Short answer:", prompt, re.DOTALL)
        return (found[1] if found else prompt).lower()
    lines = prompt.split("\n")
    return lines[1 if lines[0].startswith("Reference OCR token:") and len(lines) == 3 else 0].lower()


def score_textvqa(rows: Sequence[Row], original: bool) -> Scores:
    known = [row for row in rows if "people" in row["reference"] and row["text"] is not None]
    tables = [textvqa_scores(row["reference"]["people"]) for row in known]
    values = [
        0.0 if "error" in row else table.get(for_upload(row["text"]), 0.0)
        for table, row in zip(tables, known, strict=True)
    ]
    upload = [
        {"question_id": row["reference"]["question_id"], "answer": one_line(row["text"])}
        for row in rows
        if row["text"] is not None
    ]
    return Scores(
        {"accuracy": mean(values, 100.0, [row.get("media") for row in known])},
        items={row["id"]: value for row, value in zip(known, values, strict=True)},
        files={"textvqa_val.json": json.dumps(upload).encode()},
        notes=[f"{len(rows) - len(known)} questions have no annotation"] if len(known) < len(rows) else [],
        details={"answers' scores": {row["id"]: table for row, table in zip(known, tables, strict=True)}},
    )
