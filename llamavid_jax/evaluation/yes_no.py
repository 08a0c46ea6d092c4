"""POPE and MME: questions to answer with yes or no.

The original's rules take "NO" and "Nope" for yes (POPE), or "Know" for no (MME).  By default the first word that means
yes or no counts, and an answer without one is wrong.
"""

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llamavid_jax.evaluation.folder import checked, need, read_lines, read_text
from llamavid_jax.evaluation.items import (
    SHORT_ANSWER,
    Figure,
    Item,
    Row,
    Scores,
    average,
    by_group,
    error_of,
    mean,
    shares,
)
from llamavid_jax.evaluation.llava import read_questions
from llamavid_jax.evaluation.vqa_text import one_line

POPE_SOURCE = (
    "the POPE repository has it (github.com/AoiDragon/POPE, output/coco; LLaVA's questions are of commit e3e39262)"
)
POPE_IMAGES = ("val2014",), "val2014.zip of images.cocodataset.org has it"
MME_SOURCE = "its release has it (github.com/BradyFU/Awesome-Multimodal-Large-Language-Models, branch Evaluation)"
MME_IMAGES = ("MME_Benchmark_release_version/MME_Benchmark", "MME_Benchmark_release_version"), MME_SOURCE
PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
YES_OR_NO = "Please answer yes or no."


def yes_or_no(text: str) -> str:
    """What the first word that means yes or no says, else "other"; "not sure" and "no idea" are neither."""
    no = r"(?:no|not|isn't|aren't|doesn't)\b(?! (?:idea|sure|certain|clear)\b)"
    found = re.search(rf"\b(yes|yeah|yep|nope|{no})\b", text.lower().replace("\u2019", "'"))
    return {None: "other", "yes": "yes", "yeah": "yes", "yep": "yes"}.get(found and found[1], "no")


# ---- POPE


def read_pope(folder: Path, original: bool) -> tuple[list[Item], list[Row]]:
    """Finds a question's label by the question, as the question file and the label files number questions differently.

    The original finds it by position, which is another question's label if the files are of different versions.
    """
    labels: dict[str, dict[Any, dict[str, Any]]] = {}
    for file in sorted(need(folder, ("coco",), POPE_SOURCE).glob("coco_pope_*.json")):
        lines = checked(file, read_lines(file), "label")
        by_place = original or not all("image" in line and "text" in line for line in lines)
        keys = range(len(lines)) if by_place else map(_pope_question, lines)
        labels[file.stem.removeprefix("coco_pope_")] = dict(zip(keys, lines, strict=True))
    places: dict[str, int] = defaultdict(int)

    def reference(line: dict[str, Any]) -> dict[str, Any]:
        category, question = line.get("category", ""), _pope_question(line)
        place = places[category]
        places[category] += 1
        known = labels.get(category, {})
        label = known.get(question) or known.get(place)
        if label is None:
            return {"category": category}
        is_other = "text" in label and _pope_question(label) != question
        return {"category": category, "label": label["label"], **({"label_of": label["text"]} if is_other else {})}

    if not labels:
        need(folder, ("coco/coco_pope_*.json",), POPE_SOURCE)
    return read_questions(folder, ("llava_pope_test.jsonl",), POPE_IMAGES, reference), []


def _pope_question(line: dict[str, Any]) -> tuple[Any, str]:
    """Image and question; LLaVA's files have a misspelling that later labels do not have."""
    return line.get("image"), _bare(str(line["text"])).replace("imange", "image")


def pope_original(text: str) -> str:
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def score_pope(rows: Sequence[Row], original: bool) -> Scores:
    parse = pope_original if original else yes_or_no
    known = [row for row in rows if "label" in row["reference"] and row["text"] is not None]
    categories, media = [row["reference"]["category"] for row in known], [row.get("media") for row in known]
    labels = ["no" if row["reference"]["label"] == "no" else "yes" for row in known]
    given = ["other" if "error" in row else parse(row["text"]) for row in known]
    pairs = list(zip(given, labels, strict=True))
    right = [float(given == label) for given, label in pairs]
    tables = {
        name: counts([pair for pair, own in zip(pairs, categories, strict=True) if own == name])
        for name in dict.fromkeys(categories)
    }
    slopes = [_f1_share(tables[name], *pair) for name, pair in zip(categories, pairs, strict=True)]
    f1 = {}
    for name, table in tables.items():
        own = [place for place, category in enumerate(categories) if category == name]
        error = error_of([slopes[place] for place in own], 100.0, [media[place] for place in own])
        f1[name] = Figure(100 * table["f1"], error if table["f1"] else None, len(own))
    accuracies = by_group(categories, right, media).values()
    return Scores(
        {
            "mean F1 of the categories": average(f1.values(), slopes, media),
            "mean accuracy of the categories": average(accuracies, shares(right, categories), media),
        },
        {"F1": f1},
        {row["id"]: value for row, value in zip(known, right, strict=True)},
        notes=_pope_notes(rows),
        counts={"categories": tables},
    )


def _pope_notes(rows: Sequence[Row]) -> list[str]:
    lost = sum("label" not in row["reference"] for row in rows)
    others = sum("label_of" in row["reference"] for row in rows)
    notes = [f"{lost} questions have no label: {POPE_SOURCE}"] if lost else []
    return notes + ([f"{others} labels belong to other questions: {POPE_SOURCE}"] if others else [])


def counts(pairs: Sequence[tuple[str, str]]) -> dict[str, int | float]:
    """TP, FP, TN, FN and the ratios; an answer that is neither yes nor no is always wrong.  Undefined ratios are 0."""
    tp, fp, tn = (pairs.count(pair) for pair in (("yes", "yes"), ("yes", "no"), ("no", "no")))
    fn = sum(given != "yes" and label == "yes" for given, label in pairs)
    precision = tp / (tp + fp) if tp + fp else 0.0
    recall = tp / (tp + fn) if tp + fn else 0.0
    return {
        "samples": len(pairs),
        **{"TP": tp, "FP": fp, "TN": tn, "FN": fn},
        "accuracy": (tp + tn) / len(pairs),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if precision + recall else 0.0,
        "yes_ratio": sum(given == "yes" for given, _ in pairs) / len(pairs),
    }


def _f1_share(table: dict[str, int | float], given: str, label: str) -> float:
    """A question's contribution to the deviation of F1 = 2 TP / (2 TP + FP + FN), by the delta method."""
    top, wrong = 2 * (given == label == "yes"), (given == "yes") != (label == "yes")
    bottom = 2 * table["TP"] + table["FP"] + table["FN"]
    return (top - table["f1"] * (top + wrong)) / bottom if bottom else 0.0


# ---- MME


def read_mme(folder: Path, original: bool) -> tuple[list[Item], list[Row]]:
    release = need(folder, *MME_IMAGES)
    wordings: dict[tuple[str, str], dict[str, tuple[str, str]]] = {}

    def reference(line: dict[str, Any]) -> dict[str, Any]:
        category, stem = str(line["question_id"]).split("/")[0], Path(str(line["question_id"])).stem
        if (category, stem) not in wordings:
            wordings[category, stem] = _wordings(release, category, stem)
        wording = wordings[category, stem].get(_bare(line["text"]))
        known = {} if wording is None else {"wording": wording[0], "label": wording[1]}
        return {"category": category, "file": f"{stem}.txt", **known}

    return read_questions(folder, ("llava_mme.jsonl",), MME_IMAGES, reference), []


def _wordings(release: Path, category: str, stem: str) -> dict[str, tuple[str, str]]:
    """The benchmark's own questions about an image: bare question → its wording, and "Yes" or "No"."""
    names = f"{category}/{stem}.txt", f"{category}/questions_answers_YN/{stem}.txt"
    file = next((release / name for name in names if (release / name).exists()), None)
    if file is None:
        return {}
    lines = (line.strip().split("\t") for line in read_text(file).split("\n"))
    return {_bare(line[0]): (line[0], line[1]) for line in lines if len(line) == 2}


def _bare(question: str) -> str:
    return question.replace(SHORT_ANSWER, "").replace(YES_OR_NO, "").strip()


def mme_original(text: str) -> str:
    beginning = text.lower()[:4]
    return "yes" if "yes" in beginning else "no" if "no" in beginning else "other"


def score_mme(rows: Sequence[Row], original: bool) -> Scores:
    parse = mme_original if original else yes_or_no
    known = [row for row in rows if "label" in row["reference"] and row["text"] is not None]
    right: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))  # category → image → questions
    files: dict[str, str] = defaultdict(str)
    items = {}
    for row in known:
        reference = row["reference"]
        is_right = parse(row["text"]) == reference["label"].lower()
        items[row["id"]] = float(is_right)
        right[reference["category"]][reference["file"]].append(is_right)
        text = row["text"] if original else one_line(row["text"])
        fields = reference["file"], reference["wording"], reference["label"], text
        files[f"eval_tool/{reference['category']}.txt"] += "\t".join(fields) + "\n"
    tasks = {category: _mme_task(list(pictures.values())) for category, pictures in right.items()}
    figures = {
        name: _sum([tasks[task]["score"] for task in names if task in tasks])
        for name, names in (("perception", PERCEPTION), ("cognition", COGNITION))
    }
    return Scores(
        figures,
        {kind: {name: task[kind] for name, task in tasks.items()} for kind in ("score", "acc", "acc_plus")},
        items,
        {name: text.encode() for name, text in files.items()},
        notes=[f"{len(rows) - len(known)} questions have no answer of the benchmark's"]
        if len(known) < len(rows)
        else [],
    )


def _mme_task(pictures: Sequence[Sequence[bool]]) -> dict[str, Figure]:
    """acc: right questions; acc_plus: images with both questions right; score: their sum; all in percent."""
    clusters = [number for number, answers in enumerate(pictures) for _ in answers]
    both = [float(len(answers) == 2 and all(answers)) for answers in pictures]
    acc = mean([float(answer) for answers in pictures for answer in answers], 100.0, clusters)
    sums = mean([sum(answers) / len(answers) + plus for answers, plus in zip(pictures, both, strict=True)], 100.0)
    plus = mean(both, 100.0)
    return {"acc": acc, "acc_plus": plus, "score": Figure(acc.value + plus.value, sums.error, acc.count)}


def _sum(figures: Sequence[Figure]) -> Figure:
    if not figures:
        return mean([])
    known = all(figure.error is not None for figure in figures)
    error = math.sqrt(sum(figure.error**2 for figure in figures)) if known else None
    return Figure(sum(figure.value for figure in figures), error, sum(figure.count for figure in figures))
