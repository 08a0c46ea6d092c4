"""MMBench, in English and Chinese: a table that contains its images, scored by its server.

Some tables contain copies of a question with rotated options; their index is the question's plus a multiple of a
million.  Circular accuracy counts a question only if all its copies are right.  `rounds` makes such copies of every
question.
"""

import io
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llamavid_jax.errors import InputError
from llamavid_jax.evaluation.choice import toolkit
from llamavid_jax.evaluation.folder import need, read_table
from llamavid_jax.evaluation.items import LETTER, LETTERS, Item, Row, Scores, by_group, lettered, mean, unique

SOURCE = "it is at download.openmmlab.com/mmclassification/datasets/mmbench/"
INSTRUCTIONS = {"en": LETTER, "cn": "请直接回答选项字母。"}
TABLES = {
    "en": ("mmbench_dev_20230712.tsv", "*_dev_en*.tsv", "*_DEV_EN*.tsv", "*_test_en*.tsv", "*_TEST_EN*.tsv"),
    "cn": ("mmbench_dev_cn_20231003.tsv", "*_dev_cn*.tsv", "*_DEV_CN*.tsv", "*_test_cn*.tsv", "*_TEST_CN*.tsv"),
}
COPIES = 1_000_000
NOT_UPLOADED = {"hint", "category", "source", "image", "comment", "l2-category"}
PREDICTION_PLACE = 6  # index among the upload's columns
# cells that the original's table reader treats as empty
MISSING = {"", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A"}
MISSING |= {"NA", "NULL", "NaN", "None", "n/a", "nan", "null"}


def read(folder: Path, original: bool, *, language: str = "en", rounds: bool = False) -> tuple[list[Item], list[Row]]:
    import openpyxl  # noqa: F401  for the upload: fails now if it is missing, not after all answers

    file = need(folder, TABLES[language], SOURCE)
    rows = list(read_table(file))
    for name in ("index", "question", "image", "A"):
        if rows and name not in rows[0]:
            raise InputError(f"{file} has no column {name!r}; is it another table of that name?")
    pictures = {row["index"]: row["image"] for row in rows}
    items: list[tuple[str, dict[str, Any]]] = []
    for row in rows:
        row = {name: _cell(value, original) for name, value in row.items() if name}
        options = _options(row, original)
        letters = list(options)
        for number in range(len(options) if rounds else 1):
            turned = letters[number:] + letters[:number]
            asked = [(letter, options[meant]) for letter, meant in zip(letters, turned, strict=True)]
            question = "\n".join([*_hint(row), row["question"] or "", *([lettered(asked)] if asked else [])])
            image = row["image"] or ""
            image = pictures.get(image, image) if len(image) <= 64 else image
            reference = {
                "question_id": int(row["index"]),
                "round": number,
                "letters": letters,  # as shown; `option_char`: the table's letter of each
                "options": [option for _, option in asked],
                "option_char": turned,
                "choices": {letter: row[letter] for letter in _letters(row) if row[letter] is not None},
                "answer": row.get("answer"),
                "category": row.get("category"),
                "cells": {name: value for name, value in row.items() if name not in NOT_UPLOADED},
            }
            fields = {"text": question + "\n" + INSTRUCTIONS[language], "question": question, "prompt": question}
            fields |= {"media": f"data:image/png;base64,{image}", "reference": reference}
            items.append((row["index"] if not number else f"{row['index']}, round {number}", fields))
    copies = Counter(fields["reference"]["question_id"] % COPIES for _, fields in items)
    for _, fields in items:
        fields["reference"]["copies"] = copies[fields["reference"]["question_id"] % COPIES]
    names = unique(name for name, _ in items)
    return [Item(id=name, is_video=False, **fields) for name, (_, fields) in zip(names, items, strict=True)], []


def _cell(value: str | None, original: bool) -> str | None:
    return None if value is None or value in (MISSING if original else {""}) else value


def _letters(row: dict[str, Any]) -> list[str]:
    return [letter for letter in LETTERS if letter in row]


def _is_none(value: str | None) -> bool:
    return value is None or value.lower() in ("nan", "none")


def _options(row: dict[str, Any], original: bool) -> dict[str, str]:
    """The options by letter; the original's list ends at the first missing one and has at most four."""
    options = {}
    for letter in _letters(row)[: 4 if original else None]:
        if not (_is_none(row[letter]) if original else row[letter] is None):
            options[letter] = row[letter]
        elif original:
            break
    return options


def _hint(row: dict[str, Any]) -> list[str]:
    return [] if _is_none(row.get("hint")) else [row["hint"]]


def score(rows: Sequence[Row], original: bool) -> Scores:
    right, extracted, copies, pictures, whole = {}, {}, defaultdict(list), {}, {}
    known = [row for row in rows if row["reference"]["answer"] is not None and row["text"] is not None]
    for row in known:
        reference = row["reference"]
        shown = dict(zip(reference["letters"], reference["options"], strict=True))
        meant = dict(zip(reference["letters"], reference["option_char"], strict=True))
        found = toolkit(row["text"], shown if reference["round"] else reference["choices"])
        extracted[row["id"]] = meant.get(found, found)
        right[row["id"]] = float(extracted[row["id"]] == reference["answer"])
        copies[name := str(reference["question_id"] % COPIES)].append(right[row["id"]] == 1.0)
        pictures.setdefault(name, row.get("media") or name)
        if len(copies[name]) >= reference.get("copies", 1):
            whole[name] = float(all(copies[name]))
    notes = ["by the rules of VLMEvalKit before a judge is asked; the paper's figure is the server's: upload the sheet"]
    if lost := len(copies) - len(whole):
        notes.append(f"{lost} questions, of whose copies some are not answered, are not in the circular accuracy")
    values = list(right.values())
    clusters = [pictures[str(row["reference"]["question_id"] % COPIES)] for row in known]
    # the first is the server's metric
    figures = {"circular accuracy": mean([*whole.values()], 100.0, [pictures[name] for name in whole])}
    figures["accuracy"] = mean(values, 100.0, clusters)
    return Scores(
        figures if known else {},
        {"category": by_group((row["reference"]["category"] or "" for row in known), values, clusters)},
        right,
        {"mmbench.xlsx": sheet(rows, original)} if rows else {},
        notes=notes,
        details={"circular groups": dict(copies), "extracted": extracted},
    )


def cells(rows: Sequence[Row], original: bool = False) -> list[list[Any]]:
    """The cells of the sheet to upload, with its header.

    With several rounds it has the answer to the first, whose letters are the sheet's; in the original to the last.
    """
    header = list(rows[0]["reference"]["cells"])
    shown = [row for row in rows if original or row["reference"]["round"] == 0]
    predictions = {row["reference"]["question_id"]: row["text"] for row in shown}
    table: list[list[Any]] = [[*header[:PREDICTION_PLACE], "prediction", *header[PREDICTION_PLACE:]]]
    for reference in (row["reference"] for row in rows if row["reference"]["round"] == 0):
        number, line = reference["question_id"], list(reference["cells"].values())
        line[header.index("index")] = number
        table.append([*line[:PREDICTION_PLACE], predictions[number] or None, *line[PREDICTION_PLACE:]])
    return table


def sheet(rows: Sequence[Row], original: bool = False) -> bytes:
    """The upload as .xlsx.  Raises ModuleNotFoundError without openpyxl."""
    from openpyxl import Workbook
    from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE

    book = Workbook(write_only=True)
    page = book.create_sheet("Sheet1")
    for line in cells(rows, original):
        page.append([ILLEGAL_CHARACTERS_RE.sub("", cell) if isinstance(cell, str) else cell for cell in line])
    content = io.BytesIO()
    book.save(content)
    return content.getvalue()
