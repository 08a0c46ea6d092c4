"""Scores answers: `answers.jsonl` → a table, `result.json` and files to upload.  Nothing else is read."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llamavid_jax.errors import InputError
from llamavid_jax.evaluation.items import Figure, Row, Scores
from llamavid_jax.evaluation.llava import answers_file
from llamavid_jax.evaluation.sets import SETS
from llamavid_jax.evaluation.store import gather
from llamavid_jax.files import write_files

RESULT, DETAILS, SUBMISSION = "result.json", "details.json", "submission"


def score_folder(folder: Path, original: bool | None, judge: Any) -> dict[str, Any]:
    """Scores the answers in a folder, writes the files and returns the result.

    `original`: by the original's rules; None: by the rules of the mode in which the answers were made.
    """
    header, rows = gather(folder)
    original = header["like_original"] if original is None else original
    if (one := SETS.get(header["set"])) is None:
        raise InputError(f"the answers in {folder} are of {header['set']!r}, which is no set of this version")
    try:
        scores = one.score(rows, original, judge) if one.is_judged else one.score(rows, original)
    except InputError:
        raise
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        raise InputError(f"the answers in {folder} are not those of {one.title} ({error!r}); answer it anew") from None
    result = result_of(header, rows, scores, original, judge if one.is_judged else None)
    files = dict(scores.files)
    if not one.is_judged:
        more = (
            {"options": _field("options"), "option_char": _field("option_char")} if "mmbench" in header["set"] else {}
        )
        files["original_answers.jsonl"] = answers_file(rows, header["model"]["name"], **more)
    for name, content in files.items():
        write_files((folder / SUBMISSION / name).parent, {Path(name).name: content})
    written = {RESULT: result} | ({DETAILS: scores.details} if scores.details else {})
    for name, value in written.items():
        write_files(folder, {name: (json.dumps(value, indent=1) + "\n").encode()})
    return result


def _field(name: str) -> Any:
    return lambda row: row["reference"][name]


def result_of(header: Mapping[str, Any], rows: list[Row], scores: Scores, original: bool, judge: Any) -> dict[str, Any]:
    answered = [row for row in rows if row["text"] is not None]
    media = {row["id"]: row.get("media") for row in answered} | scores.media
    return {
        "header": {**header, "shard": None},
        "scored": {
            "like_original": original,
            "judge": None if judge is None else judge.name,
            "judge counts": None if judge is None else dict(judge.counts),
        },
        "answered": len(answered),
        "of": header["data"]["questions"],
        "broken": sum("error" in row for row in answered),
        "figures": {name: as_json(figure) for name, figure in scores.figures.items()},
        "groups": {
            title: {name: as_json(figure) for name, figure in group.items()} for title, group in scores.groups.items()
        },
        "counts": scores.counts,
        "notes": scores.notes,
        "items": scores.items,
        "media": {name: media.get(name) for name in scores.items},
    }


def as_json(figure: Figure) -> dict[str, Any]:
    value = None if math.isnan(figure.value) else figure.value
    return {"value": value, "error": figure.error, "questions": figure.count}


def table(result: Mapping[str, Any]) -> str:
    """The result as text."""
    header = result["header"]
    how = "like the original" if header["like_original"] else "by default"
    scored = "by the original's rules" if result["scored"]["like_original"] else "by default rules"
    lines = [f"{SETS[header['set']].title}: {header['model']['name']}, asked {how}, scored {scored}"]
    lines.append(f"{result['answered']} of {result['of']} questions answered, {result['broken']} broken")
    names = [*result["figures"], *(name for group in result["groups"].values() for name in group)]
    width = max(map(len, names), default=0) + 2
    lines += [_line(name, figure, width) for name, figure in result["figures"].items()]
    for title, group in result["groups"].items():
        lines += [f"  {title}", *(_line(f"  {name}", figure, width) for name, figure in group.items())]
    lines += [f"{name}: {value}" for name, value in result["counts"].items() if not isinstance(value, dict)]
    if counts := result["scored"]["judge counts"]:
        lines.append("judge: " + ", ".join(f"{value} {name}" for name, value in counts.items()))
    return "\n".join([*lines, *(f"note: {note}" for note in result["notes"])])


def _line(name: str, figure: Mapping[str, Any], width: int) -> str:
    value = "   none" if figure["value"] is None else f"{figure['value']:7.2f}"
    error = "        " if figure["error"] is None else f" ± {figure['error']:<5.2f}"
    return f"{name:{width}} {value}{error} ({figure['questions']})"
