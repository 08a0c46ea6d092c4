"""Video-ChatGPT's benchmark: longer answers about videos, scored from 0 to 5 in five dimensions by a judge model.

generic_qa.json      correctness, detail, context
temporal_qa.json     temporal understanding
consistency_qa.json  consistency: two questions with the same answer
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llamavid_jax.evaluation.folder import checked, need, read_json, video_file
from llamavid_jax.evaluation.items import Item, Row, Scores, mean
from llamavid_jax.evaluation.judge import Case, messages
from llamavid_jax.evaluation.llava import json_lines
from llamavid_jax.evaluation.replies import read_leniently, read_original
from llamavid_jax.evaluation.video_qa import counted

SOURCE = "Video-ChatGPT has it (github.com/mbzuai-oryx/Video-ChatGPT, quantitative_evaluation)"
VIDEOS = "Test_Videos", "evaluation/Test_Videos"
FIRST, SECOND = (f"Q{number}" for number in (1, 2))  # the fields of consistency_qa.json


class Dimension(NamedTuple):
    """One of the five dimensions: its file, and the wording of its messages."""

    name: str
    file: str
    aspect: str  # what is evaluated
    task: str  # what the judge is to determine
    instructions: tuple[str, ...]
    score: str
    highest: str
    value: str = "its value is the"


DIMENSIONS = (
    Dimension(
        "correctness",
        "generic",
        "factual accuracy of generative outputs for video-based question-answer pairs",
        "the predicted answer with the correct answer and determine if they are factually consistent",
        (
            "Focus on the factual consistency between the predicted answer and the correct answer. The predicted "
            "answer should not contain any misinterpretations or misinformation.",
            "The predicted answer must be factually accurate and align with the video content.",
            "Consider synonyms or paraphrases as valid matches.",
            "Evaluate the factual accuracy of the prediction compared to the answer.",
        ),
        "factual accuracy",
        "factual consistency",
    ),
    Dimension(
        "detail",
        "generic",
        "detail orientation of generative outputs for video-based question-answer pairs",
        "the predicted answer with the correct answer and determine its level of detail, considering both completeness "
        "and specificity",
        (
            "Check if the predicted answer covers all major points from the video. The response should not leave out "
            "any key aspects.",
            "Evaluate whether the predicted answer includes specific details rather than just generic points. It "
            "should provide comprehensive information that is tied to specific elements of the video.",
            "Consider synonyms or paraphrases as valid matches.",
            "Provide a single evaluation score that reflects the level of detail orientation of the prediction, "
            "considering both completeness and specificity.",
        ),
        "detail orientation",
        "detail orientation",
    ),
    Dimension(
        "context",
        "generic",
        "contextual understanding of generative outputs for video-based question-answer pairs",
        "the predicted answer with the correct answer and determine if the generated response aligns with the overall "
        "context of the video content",
        (
            "Evaluate whether the predicted answer aligns with the overall context of the video content. It should not "
            "provide information that is out of context or misaligned.",
            "The predicted answer must capture the main themes and sentiments of the video.",
            "Consider synonyms or paraphrases as valid matches.",
            "Provide your evaluation of the contextual understanding of the prediction compared to the answer.",
        ),
        "contextual understanding",
        "contextual understanding",
        "its value is",
    ),
    Dimension(
        "temporal",
        "temporal",
        "temporal understanding of generative outputs for video-based question-answer pairs",
        "the predicted answer with the correct answer and determine if they correctly reflect the temporal sequence of "
        "events in the video content",
        (
            "Focus on the temporal consistency between the predicted answer and the correct answer. The predicted "
            "answer should correctly reflect the sequence of events or details as they are presented in the video "
            "content.",
            "Consider synonyms or paraphrases as valid matches, but only if the temporal order is maintained.",
            "Evaluate the temporal accuracy of the prediction compared to the answer.",
        ),
        "temporal accuracy",
        "temporal consistency",
    ),
    Dimension(
        "consistency",
        "consistency",
        "consistency of generative outputs for similar video-based question-answer pairs. You will be given two very "
        "similar questions, a common answer common to both the questions and predicted answers for the two questions ",
        "the predicted answers for two very similar question, with a common correct answer and determine if they are "
        "consistent",
        (
            "Focus on the consistency between the two predicted answers and the correct answer. Both predicted answers "
            "should correspond to the correct answer and to each other, and should not contain any contradictions or "
            "significant differences in the conveyed information.",
            "Both predicted answers must be consistent with each other and the correct answer, in terms of the "
            "information they provide about the video content.",
            "Consider synonyms or paraphrases as valid matches, but only if they maintain the consistency in the "
            "conveyed information.",
            "Evaluate the consistency of the two predicted answers compared to the correct answer.",
        ),
        "consistency",
        "consistency",
    ),
)


def read(folder: Path, original: bool) -> tuple[list[Item], list[Row]]:
    videos, items = need(folder, VIDEOS, SOURCE), []
    for name, fields in (("generic", ["Q"]), ("temporal", ["Q"]), ("consistency", [FIRST, SECOND])):
        file = need(folder, [f"{place}{name}_qa.json" for place in ("", "evaluation/", "Benchmarking_QA/")], SOURCE)
        entries = checked(file, read_json(file), *fields, "A", "video_name")
        for place, (key, entry) in enumerate(zip(counted(one["video_name"] for one in entries), entries, strict=True)):
            for field in fields:
                reference = {"file": name, "place": place, "key": key, "field": field, "entry": entry}
                question, number = entry[field], field.removeprefix("Q")
                video = video_file(videos, entry["video_name"])
                ident = f"{name} {key}" + (f" {number}" if number else "")
                items.append(Item(ident, question, question, question, video, True, reference))
    return items, []


def question_set(texts: dict[str, str], entry: dict[str, Any], original: bool) -> dict[str, str]:
    """What the judge is shown of an entry; the original shows the first of two questions twice."""
    if FIRST not in entry:
        return {"q": entry["Q"], "a": entry["A"], "pred": texts["Q"]}
    second = entry[FIRST if original else SECOND]
    return {"q1": entry[FIRST], "q2": second, "a": entry["A"], "pred1": texts[FIRST], "pred2": texts[SECOND]}


def case(dimension: Dimension, shown: dict[str, str], original: bool, is_broken: bool = False) -> Case:
    rules = "\n".join(f"- {rule}" for rule in dimension.instructions)
    system = (
        f"You are an intelligent chatbot designed for evaluating the {dimension.aspect}."
        f"{'' if dimension.name == 'consistency' else ' '}Your task is to compare {dimension.task}. Here's how you can "
        f"accomplish the task:------##INSTRUCTIONS: {rules}"
    )
    if "pred" in shown:
        pair = "Question: {q}\nCorrect Answer: {a}\nPredicted Answer: {pred}\n".format_map(shown)
    else:
        pair = (
            "Question 1: {q1}\nQuestion 2: {q2}\nCorrect Answer: {a}\nPredicted Answer to Question 1: {pred1}\n"
            "Predicted Answer to Question 2: {pred2}\n"
        ).format_map(shown)
    user = (
        f"Please evaluate the following video-based question-answer pair:\n\n{pair}\nProvide your evaluation only as a "
        f"{dimension.score} score where the {dimension.score} score is an integer value between 0 and 5, with 5 "
        f"indicating the highest level of {dimension.highest}. Please generate the response in the form of a Python "
        f"dictionary string with keys 'score', where {dimension.value} {dimension.score} score in INTEGER, not "
        f"STRING.DO NOT PROVIDE ANY OTHER OUTPUT TEXT OR EXPLANATION. Only provide the Python dictionary string. For "
        "example, your response should look like this: {''score': 4.8}."
    )
    predictions = [value for name, value in shown.items() if name.startswith("pred") and not is_broken]
    read_reply = functools.partial(read_original, keys=()) if original else read_leniently
    return Case(messages(system, user), str(shown["a"]), predictions, read_reply)


def entries_of(rows: Sequence[Row], name: str) -> list[tuple[str, dict[str, Any], dict[str, str], Any]]:
    """Key, entry, texts by field, and video of each completely answered entry of a file, in the file's order."""
    found: dict[int, tuple[str, dict[str, Any], dict[str, str], Any]] = {}
    for row in rows:
        reference = row["reference"]
        if reference["file"] == name and row["text"] is not None:
            blank = (reference["key"], reference["entry"], {}, row.get("media"))
            found.setdefault(reference["place"], blank)[2][reference["field"]] = row["text"]
    return [one for _, one in sorted(found.items()) if len(one[2]) == (2 if FIRST in one[1] else 1)]


def score(rows: Sequence[Row], original: bool, judge: Any) -> Scores:
    scores, failed = Scores({}, notes=[f"judged by {judge.name}"]), {}
    broken = {(row["reference"]["file"], row["reference"]["key"]) for row in rows if "error" in row}
    for dimension in DIMENSIONS:
        entries = entries_of(rows, dimension.file)
        shown = [question_set(texts, entry, original) for _, entry, texts, _ in entries]
        verdicts = judge.verdicts(
            [
                case(dimension, one, original, (dimension.file, entry[0]) in broken)
                for entry, one in zip(entries, shown, strict=True)
            ]
        )
        judged = [(*one, verdict) for one, verdict in zip(zip(entries, shown, strict=True), verdicts, strict=True)]
        judged = [(entry, one, verdict) for entry, one, verdict in judged if verdict is not None]
        values = [float(verdict.score) for *_, verdict in judged]
        scores.figures[dimension.name] = mean(values, 1.0, [entry[3] for entry, *_ in judged])
        scores.items |= {
            f"{dimension.name} {entry[0]}": value for (entry, *_), value in zip(judged, values, strict=True)
        }
        scores.media |= {f"{dimension.name} {entry[0]}": entry[3] for entry, *_ in judged}
        kept = {entry[0]: [verdict.reply, one] for entry, one, verdict in judged}
        scores.files[f"{dimension.name}_judgements.json"] = json_lines([kept])
        failed[dimension.name] = len(entries) - len(judged)
    for name in ("generic", "temporal", "consistency"):
        lines = []
        for _, entry, texts, _ in entries_of(rows, name):
            predictions = {f"pred{field.removeprefix('Q')}": text for field, text in sorted(texts.items())}
            lines.append({**entry, **predictions})
        scores.files[f"{name}_predictions.json"] = json_lines(lines)
    scores.counts["judgements failed"] = failed
    return scores
