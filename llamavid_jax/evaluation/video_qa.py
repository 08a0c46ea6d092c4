"""MSVD-QA, MSRVTT-QA and ActivityNet-QA: short free answers about videos, judged by a model.

The paper's judge was gpt-3.5-turbo as it was then; scores by any other judge are not comparable with the paper's.
"""

import functools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llamavid_jax import buckets
from llamavid_jax.errors import InputError
from llamavid_jax.evaluation.folder import checked, need, read_json, read_text, video_file
from llamavid_jax.evaluation.items import Item, Row, Scores, by_group, mean, unique
from llamavid_jax.evaluation.judge import Case, messages
from llamavid_jax.evaluation.llava import json_lines
from llamavid_jax.evaluation.replies import read_leniently, read_original

QA_SOURCE = "LLaMA-VID's README links it (github.com/dvlab-research/LLaMA-VID, Preparation)"
ACTIVITYNET_SOURCE = "it is part of ActivityNet-QA (github.com/MILVLG/activitynet-qa)"
ACTIVITYNET_VIDEOS = "Video-ChatGPT has the videos (github.com/mbzuai-oryx/Video-ChatGPT, quantitative_evaluation)"
TYPES = "motion", "spatial", "temporal", "yes/no", "color", "object", "location", "number", "other"

SYSTEM = (
    "You are an intelligent chatbot designed for evaluating the correctness of generative outputs for question-answer "
    "pairs. Your task is to compare the predicted answer with the correct answer and determine if they match "
    "meaningfully. Here's how you can accomplish the task:------##INSTRUCTIONS: - Focus on the meaningful match "
    "between the predicted answer and the correct answer.\n- Consider synonyms or paraphrases as valid matches.\n- "
    "Evaluate the correctness of the prediction compared to the answer."
)
USER = (
    "Please evaluate the following video-based question-answer pair:\n\nQuestion: {question}\n"
    "Correct Answer: {answer}\nPredicted Answer: {prediction}\n\nProvide your evaluation only as a yes/no and score "
    "where the score is an integer value between 0 and 5, with 5 indicating the highest meaningful match. Please "
    "generate the response in the form of a Python dictionary string with keys 'pred' and 'score', where value of "
    "'pred' is  a string of 'yes' or 'no' and value of 'score' is in INTEGER, not STRING.DO NOT PROVIDE ANY OTHER "
    "OUTPUT TEXT OR EXPLANATION. Only provide the Python dictionary string. For example, your response should look "
    "like this: {{'pred': 'yes', 'score': 4.8}}."
)


def read_qa(folder: Path, original: bool) -> tuple[list[Item], list[Row]]:
    """Reads MSVD-QA or MSRVTT-QA."""
    file = need(folder, ("test_qa.json",), QA_SOURCE)
    lines = checked(file, read_json(file), "id", "question", "answer", "video_id")
    videos = need(folder, ("video", "videos", "YouTubeClips"), QA_SOURCE)
    clips = clip_names(folder)
    return _items([(one["id"], one, numbered_video(videos, one["video_id"], clips), {}) for one in lines]), []


def numbered_video(videos: Path, name: object, clips: Mapping[str, str] | None = None) -> Path:
    """The file of video 7, say: its name in `clips`, or 7, vid7 (MSVD) or video7 (MSR-VTT)."""
    clip = (clips or {}).get(str(name).removeprefix("vid"), name)
    names = dict.fromkeys([f"{clip}", f"{name}", f"vid{name}", f"video{name}"])
    files = (video_file(videos, one) for one in names)
    return next((file for file in files if buckets.kind(file)), videos / f"{name}.mp4")


def clip_names(folder: Path) -> dict[str, str]:
    """Video number → name of its YouTube clip, from the table in MSVD's own download."""
    table = folder / "youtube_mapping.txt"
    pairs = (line.split() for line in read_text(table).splitlines()) if table.exists() else ()
    return {pair[1].removeprefix("vid"): pair[0] for pair in pairs if len(pair) == 2}


def read_activitynet(folder: Path, original: bool) -> tuple[list[Item], list[Row]]:
    """By default questions and answers are paired by id; the original pairs the two files by position."""
    question_file, answer_file = (
        need(folder, (f"test_{kind}.json", f"dataset/test_{kind}.json"), ACTIVITYNET_SOURCE) for kind in "qa"
    )
    questions = checked(question_file, read_json(question_file), "question_id", "question", "video_name")
    answers = checked(answer_file, read_json(answer_file), "question_id", "answer")
    if original:
        if len(questions) > len(answers):
            raise InputError(
                f"{question_file} has {len(questions)} entries, {answer_file} {len(answers)}; get both anew"
            )
        pairs = list(zip(questions, answers, strict=False))
    else:
        names, answered = (unique(one["question_id"] for one in entries) for entries in (questions, answers))
        by_name = dict(zip(answered, answers, strict=True))
        if lost := [name for name in names if name not in by_name]:
            raise InputError(f"{answer_file} has no answer to {lost[0]}; is it of another split?")
        pairs = [(one, by_name[name]) for name, one in zip(names, questions, strict=True)]
    videos = need(folder, ("all_test", "videos", "video"), ACTIVITYNET_VIDEOS)
    return _items(
        [
            (
                one["question_id"],
                {**one, "answer": answer["answer"]},
                video_file(videos, f"v_{one['video_name']}"),
                answer,
            )
            for one, answer in pairs
        ]
    ), []


def _items(entries: Sequence[tuple[Any, dict[str, Any], Path, dict[str, Any]]]) -> list[Item]:
    names = unique(name for name, *_ in entries)
    keys = counted(name for name, *_ in entries)
    items = []
    for key, name, (question_id, one, video, more) in zip(keys, names, entries, strict=True):
        kind = {"type": TYPES[more["type"]]} if more.get("type") in range(len(TYPES)) else {}
        reference = {"question_id": question_id, "key": key, "question": one["question"], "answer": one["answer"]}
        words = one["question"]
        items.append(Item(name, words, words, words, video, True, reference | kind))
    return items


def counted(names: Any) -> list[str]:
    """The original's keys of judgements: a name and how often it occurred before."""
    seen: dict[str, int] = defaultdict(int)
    keys = []
    for name in map(str, names):
        keys.append(f"{name}_{seen[name]}")
        seen[name] += 1
    return keys


def case(row: Row, original: bool, is_activitynet: bool) -> Case:
    reference = row["reference"]
    words = {"question": reference["question"], "answer": reference["answer"], "prediction": row["text"]}
    keys = ("pred",) if is_activitynet else ("pred", "predicted")
    read = functools.partial(read_original, keys=keys, needs_word=not is_activitynet)
    return Case(
        messages(SYSTEM, USER.format(**words)),
        str(reference["answer"]),
        [] if "error" in row else [row["text"]],
        read if original else functools.partial(read_leniently, keys=("pred", "predicted")),
    )


def score(rows: Sequence[Row], original: bool, judge: Any, *, is_activitynet: bool = False) -> Scores:
    known = [row for row in rows if row["text"] is not None]
    verdicts = judge.verdicts([case(row, original, is_activitynet) for row in known])
    judged = [(row, verdict) for row, verdict in zip(known, verdicts, strict=True) if verdict is not None]
    words = [(row, float(verdict.yes)) for row, verdict in judged if verdict.yes is not None]
    values = [value for _, value in words]
    predictions = [
        {
            "id": row["reference"]["question_id"],
            "question": row["reference"]["question"],
            "answer": row["reference"]["answer"],
            "pred": row["text"],
        }
        for row in known
    ]
    judgements = {
        row["reference"]["key"]: [
            verdict.reply,
            {"q": row["reference"]["question"], "a": row["reference"]["answer"], "pred": row["text"]},
        ]
        for row, verdict in judged
    }
    groups, media = {}, [row.get("media") for row, _ in words]
    if words and all("type" in row["reference"] for row, _ in words):
        groups["type"] = by_group((row["reference"]["type"] for row, _ in words), values, media)
    return Scores(
        {
            "accuracy": mean(values, 100.0, media),
            "score (0 to 5)": mean([float(v.score) for _, v in judged], 1.0, [row.get("media") for row, _ in judged]),
        },
        groups,
        {row["id"]: value for row, value in words},
        {"predictions.json": json_lines(predictions), "judgements.json": json_lines([judgements])},
        notes=[f"judged by {judge.name}"],
        counts={
            "yes": int(sum(values)),
            "no": int(len(values) - sum(values)),
            "judgements failed": len(known) - len(judged),
        },
    )
