"""Multiple choice about long videos: MLVU, and Video-MME and LongVideoBench with and without subtitles.

Each set has its own reader, which gives Choices; prompt and scores are the same for all.  The original has none of
these sets.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llamavid_jax.errors import InputError, say
from llamavid_jax.evaluation.choice import chosen, numbered
from llamavid_jax.evaluation.folder import checked, need, read_json, video_file
from llamavid_jax.evaluation.items import (
    LETTER,
    LETTERS,
    Item,
    Row,
    Scores,
    average,
    by_group,
    lettered,
    mean,
    shares,
    unique,
)

MLVU_SOURCE = "it is part of MLVU (huggingface.co/datasets/MLVU/MVLU)"
VIDEO_MME_SOURCE = "it is part of Video-MME (huggingface.co/datasets/lmms-lab/Video-MME); unpack its archives there"
LONGVIDEOBENCH_SOURCE = "it is part of LongVideoBench (huggingface.co/datasets/longvideobench/LongVideoBench)"


NO_OPTION = "@"


@dataclasses.dataclass(frozen=True)
class Choice:
    """One question.

    `answer` is a letter, None if it is not public, or NO_OPTION if it is none of the options (as for some of MLVU's),
    so that no answer is right.  `groups`: the parts of the set to which it belongs, by title.
    """

    name: str
    video: Path
    question: str
    options: list[str]
    answer: str | None
    groups: dict[str, str]
    subtitles: Path | None = None
    subtitles_start: float = 0.0
    duration: float = math.inf


def items_of(choices: Sequence[Choice]) -> list[Item]:
    items = []
    for name, one in zip(unique(choice.name for choice in choices), choices, strict=True):
        options = numbered(one.options)
        words = "\n".join([one.question, lettered(options.items()), LETTER])
        reference = {"question_id": one.name, "answer": one.answer, "options": options, "groups": one.groups}
        subtitled = {name: getattr(one, name) for name in ("subtitles", "subtitles_start", "duration")}
        items.append(Item(name, words, words, words, one.video, True, reference, **subtitled))
    return items


def score(rows: Sequence[Row], original: bool, *, average_of: str | None = None) -> Scores:
    """Accuracy over all questions.

    With `average_of` the first score is the mean over the parts with that title, as the set's own metric is.
    """
    known = [row for row in rows if row["reference"]["answer"] is not None and row["text"] is not None]
    right = [float(_is_right(row)) for row in known]
    titles = list(dict.fromkeys(title for row in known for title in row["reference"]["groups"]))
    names = {title: [row["reference"]["groups"].get(title, "") for row in known] for title in titles}
    media = [row.get("media") for row in known]
    groups = {title: by_group(own, right, media) for title, own in names.items()}
    figures = {"accuracy": mean(right, 100.0, media)} if known else {}
    if known and average_of in groups:
        over = average(groups[average_of].values(), shares(right, names[average_of]), media)
        figures = {f"mean over {average_of}s": over, **figures}
    letters = [
        {"id": row["reference"]["question_id"], "answer": chosen(row["text"] or "", row["reference"]["options"])}
        for row in rows
    ]
    return Scores(
        figures,
        groups,
        {row["id"]: value for row, value in zip(known, right, strict=True)},
        {"answers.json": json.dumps(letters, indent=1).encode()},
        notes=_notes(rows, known),
    )


def _is_right(row: Row) -> bool:
    """Whether the answer names the right letter, or another with the same text: a few questions repeat an option."""
    options, answer = row["reference"]["options"], row["reference"]["answer"]
    found = chosen(row["text"], options)
    return found is not None and (found == answer or options[found] == options.get(answer) != "")


def _notes(rows: Sequence[Row], known: Sequence[Row]) -> list[str]:
    notes = [] if len(known) == len(rows) else ["some references are not public: upload the answers"]
    without = sum(row["reference"]["answer"] == NO_OPTION for row in known)
    return notes + ([f"{without} references are no option of their questions, which count as wrong"] * bool(without))


# ---- MLVU: dev, the seven tasks with options


def read_mlvu(folder: Path, original: bool) -> tuple[list[Item], list[Row]]:
    folder = folder / "MLVU" if (folder / "MLVU" / "json").is_dir() else folder
    choices = []
    need(folder, ("json/*.json",), MLVU_SOURCE)
    for file in sorted((folder / "json").glob("*.json")):
        entries = checked(file, read_json(file), "video", "question")
        for place, entry in enumerate(entries):
            if "candidates" not in entry:
                continue  # free answers: sub-scenes and summaries
            options = [str(option) for option in entry["candidates"]]
            letters = {option: letter for letter, option in numbered(options).items()}
            answer = None if entry.get("answer") is None else letters.get(str(entry["answer"]), NO_OPTION)
            task = str(entry.get("question_type", file.stem))
            video = folder / "video" / file.stem / entry["video"]
            choices.append(Choice(f"{file.stem} {place}", video, entry["question"], options, answer, {"task": task}))
    return items_of(choices), []


# ---- Video-MME


def read_video_mme(folder: Path, original: bool, *, subtitles: bool = False) -> tuple[list[Item], list[Row]]:
    """Reads the repository's parquet file, or its evaluation's JSON, where each video has a list of questions."""
    file = need(folder, ("videomme/test-*.parquet", "*.parquet", "*.json"), VIDEO_MME_SOURCE)
    fields = (
        "video_id",
        "duration",
        "domain",
        "sub_category",
        "question_id",
        "task_type",
        "question",
        "options",
        "answer",
    )
    entries = _parquet(file) if file.suffix == ".parquet" else _flat(checked(file, read_json(file), "questions"))
    videos = need(folder, ("data", "video", "videos"), VIDEO_MME_SOURCE)
    texts = need(folder, ("subtitle", "subtitles"), VIDEO_MME_SOURCE) if subtitles else None
    choices = []
    for entry in checked(file, entries, *fields):
        options = [str(option).removeprefix(f"{letter}. ") for letter, option in zip(LETTERS, entry["options"])]  # noqa: B905
        stem = entry.get("videoID") or entry["video_id"]
        spoken = texts / f"{stem}.srt" if texts else None
        groups = {name: str(entry[name]) for name in ("duration", "domain", "sub_category", "task_type")}
        choices.append(
            Choice(
                str(entry["question_id"]),
                video_file(videos, stem),
                entry["question"],
                options,
                entry["answer"],
                groups,
                spoken if spoken and spoken.exists() else None,
            )
        )
    lost = {choice.video for choice in choices if texts and choice.subtitles is None}
    if choices and len(lost) == len({choice.video for choice in choices}):
        raise InputError(f"{texts} holds the subtitles of none of the {len(lost)} videos: {VIDEO_MME_SOURCE}")
    if lost:  # silent videos have none
        say(f"{len(lost)} of {len({choice.video for choice in choices})} videos have no subtitles in {texts}")
    return items_of(choices), []


def _parquet(file: Path) -> list[dict[str, Any]]:
    """The rows of a table, from all its files: test-00000-of-00002.parquet and so on."""
    import pyarrow
    import pyarrow.parquet

    try:
        files = sorted(file.parent.glob(file.name.replace("-00000-of-", "-*-of-")))
        return [row for one in files for row in pyarrow.parquet.read_table(one).to_pylist()]
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"{file} is no parquet table ({error}); download it again") from None


def _flat(videos: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**video, **question} for video in videos for question in video["questions"]]


# ---- LongVideoBench


def read_longvideobench(folder: Path, original: bool, *, subtitles: bool = False) -> tuple[list[Item], list[Row]]:
    file = need(folder, ("lvb_val.json", "lvb_test_wo_gt.json"), LONGVIDEOBENCH_SOURCE)
    videos = need(folder, ("videos",), LONGVIDEOBENCH_SOURCE)
    texts = need(folder, ("subtitles",), LONGVIDEOBENCH_SOURCE) if subtitles else None
    choices = []
    for entry in checked(file, read_json(file), "id", "video_path", "question", "candidates"):
        correct = entry.get("correct_choice", -1)
        answer = LETTERS[correct] if isinstance(correct, int) and 0 <= correct < len(entry["candidates"]) else None
        names = "duration_group", "question_category", "topic_category"
        choices.append(
            Choice(
                str(entry["id"]),
                videos / entry["video_path"],
                entry["question"],
                [str(option) for option in entry["candidates"]],
                answer,
                {name: str(entry[name]) for name in names if name in entry},
                texts / entry["subtitle_path"] if texts and entry.get("subtitle_path") else None,
                float(entry.get("starting_timestamp_for_subtitles") or 0.0),
                float(entry.get("duration") or math.inf),
            )
        )
    return items_of(choices), []
