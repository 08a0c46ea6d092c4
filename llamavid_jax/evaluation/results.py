"""Makes `docs/results.md` from result files: published numbers, measured ones, and how the runs differ."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llamavid_jax.evaluation.compare import read_result
from llamavid_jax.evaluation.sets import SETS

PUBLISHED = Path(__file__).with_name("published.json")


def page(paths: Sequence[str | Path]) -> str:
    """The page as Markdown."""
    published = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    results = [read_result(path) for path in paths]
    lines = [
        "# Results",
        "",
        "Made by `llamavid-evaluate results docs/results.md RUN ...`; edit nothing here. Published: "
        + published["source"],
        "",
        "± is the standard error over the questions, those of one picture or video not taken for independent. "
        f"{len(results)} results were measured."
        if results
        else "Nothing has been measured yet.",
    ]
    for name, one in SETS.items():
        known = [row for row in published["rows"] if name in row["figures"]]
        measured = [result for result in results if result["header"]["set"] == name]
        if not known and not measured:
            continue
        rows = [row["figures"][name] for row in known] or [result["figures"] for result in measured]
        figures = list(dict.fromkeys(figure for row in rows for figure in row))
        lines += ["", f"## {one.title}", "", "| " + " | ".join(["model", *figures, "how"]) + " |"]
        lines += ["|---" * (len(figures) + 2) + "|"]
        for row in known:
            values = [f"{row['figures'][name][figure]:.2f}".removesuffix("0") for figure in figures]
            lines.append("| " + " | ".join([row["model"], *values, "published"]) + " |")
        for result in measured:
            values = [_measured(result["figures"].get(figure)) for figure in figures]
            named = [result["header"]["model"]["name"], *values, how(result)]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in named) + " |")
    return "\n".join(lines) + "\n"


def _measured(figure: Mapping[str, Any] | None) -> str:
    if figure is None or figure["value"] is None:
        return "—"
    return f"{figure['value']:.2f}" + ("" if figure["error"] is None else f" ± {figure['error']:.2f}")


def how(result: Mapping[str, Any]) -> str:
    """What a reader has to know before comparing results."""
    header, scored = result["header"], result["scored"]
    settings = header["settings"]
    asked = "like the original" if header["like_original"] else "by default"
    rules = "" if scored["like_original"] == header["like_original"] else ", scored by the other rules"
    sampled = f"temperature {settings['temperature']:g}" if settings["temperature"] else "greedy"
    parts = [f"asked {asked}{rules}", sampled, f"{settings['quantize'] or settings['dtype']}"]
    parts += result["notes"]  # such as the judge, or that the paper's score is the server's
    parts += [f"{result['answered']} of {result['of']} questions"] if result["answered"] != result["of"] else []
    parts += [f"{result['broken']} broken"] if result["broken"] else []
    failed = (scored["judge counts"] or {}).get("failed")
    parts += [f"{failed} judgements failed and left out"] if failed else []
    parts.append(f"model {header['model']['sha256'][:12]}, llamavid_jax {header['versions']['llamavid_jax']}")
    return "; ".join(parts)
