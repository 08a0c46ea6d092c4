"""The question files of LLaVA's eval.zip, which the image sets share, and the answer file of its scripts."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from llamavid_jax.evaluation.folder import LLAVA, need, read_lines
from llamavid_jax.evaluation.items import Item, Row, unique


def read_questions(
    folder: Path,
    questions: Sequence[str],
    images: tuple[Sequence[str], str],
    reference: Callable[[dict[str, Any]], dict[str, Any]],
) -> list[Item]:
    """Items of a question file: each line has question_id, image, and the text with its instruction.

    `images`: possible names of the image folder, and where to get it.  `reference(line)`: what else scoring needs.
    """
    lines = read_lines(need(folder, questions, LLAVA), "question_id", "image", "text")
    pictures = need(folder, *images)
    return [
        Item(
            id=name,
            text=line["text"],
            question=line["text"],
            prompt=line["text"],
            media=pictures / str(line["image"]),
            is_video=False,
            reference={"question_id": line["question_id"], **reference(line)},
        )
        for name, line in zip(unique(line["question_id"] for line in lines), lines, strict=True)
    ]


def answers_file(rows: Iterable[Row], model: str, **more: Callable[[Row], Any]) -> bytes:
    """The answers in the format of the original's scripts, for its other tools."""
    lines = [
        {
            "question_id": row["reference"]["question_id"],
            **({"round_id": row["reference"]["round"]} if "round" in row["reference"] else {}),
            "prompt": row["prompt"],
            "text": row["text"],
            **{name: value(row) for name, value in more.items()},
            "model_id": model,
            "metadata": {},
        }
        for row in rows
        if row["text"] is not None
    ]
    return json_lines(lines)


def json_lines(rows: Iterable[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()
