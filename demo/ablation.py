"""The paper's tables 4, 5 and 6 at the demo's size: kinds of tokens, their number, the text decoder.

    python -m demo.ablation PICTURE [--steps N] [--limit N] [--seeds N] [--only NAME ...]        # prints the table

Each variant starts from the same stage 1 and trains stage 2 with the same data and steps, once with each seed, which
sets the data's order; then it answers the held-out questions.  Stages 0 and 1 are shared and had both tokens: what the
other variants lack, they learned with.  BERT is another module: it begins anew where the Q-Former does, in the second
part of stage 0.  A variant and seed in runs/ablation that has been evaluated is not trained again.
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from llamavid_jax.errors import InputError, Parser, command

MODEL, STAGES = Path("configs/models/demo.yaml"), Path("configs/demo")
DATA, RUNS, SHARED = Path("build/demo_data"), Path("runs/ablation"), Path("runs/demo")


class Variant(NamedTuple):
    """Fields of the model, tokens of a frame here and in the paper, and the paper's GQA, POPE, SQA and VQA-T."""

    fields: dict[str, str]
    tokens: int
    paper_tokens: str
    paper: tuple[float, float, float, float]


VARIANTS = {
    "content": Variant({"frame_tokens": "content"}, 1, "0 + 1", (53.3, 80.9, 66.1, 46.5)),
    "context": Variant({"frame_tokens": "context"}, 1, "1 + 0", (54.3, 82.4, 67.7, 48.3)),
    "both": Variant({}, 2, "1 + 1", (55.5, 83.1, 68.8, 49.0)),
    "grid:2": Variant({"compress_type": "grid:2"}, 5, "1 + 4", (56.2, 83.5, 68.7, 49.1)),
    "grid:3": Variant({"compress_type": "grid:3"}, 10, "1 + 16", (58.2, 83.1, 67.4, 50.8)),
    "all": Variant({"compress_type": "none"}, 37, "1 + 256", (63.0, 86.6, 67.7, 53.8)),
    "all content": Variant(
        {"compress_type": "none", "frame_tokens": "content"}, 36, "0 + 256", (61.9, 85.5, 67.5, 53.0)
    ),
    "bert": Variant({"bert_type": "raw_bert"}, 2, "1 + 1", (54.1, 80.8, 67.9, 48.1)),
}
TABLES = {
    "kinds (table 4)": ("content", "context", "both"),
    "numbers (table 5)": ("both", "grid:2", "grid:3", "all", "all content"),
    "text decoder: none, BERT, Q-Former (table 6)": ("content", "bert", "both"),
}


def accuracy(name: str, seed: int, steps: int, limit: int) -> dict[str, float]:
    """Trains a variant and asks it; the part of exact answers by type of question."""
    variant = VARIANTS[name]
    run = RUNS / f"{name.replace(':', '').replace(' ', '_')}_{seed}"
    result, model = run / "accuracy.json", run.with_suffix(".yaml")
    if not result.exists():
        run.mkdir(parents=True, exist_ok=True)
        model.write_text(yaml.safe_dump(yaml.safe_load(MODEL.read_text()) | variant.fields))
        start = SHARED / "stage1" / "model" if name != "bert" else stage1_of_bert(model)
        bucket = yaml.safe_load((STAGES / "stage2_instruct.yaml").read_text())["data"]["buckets"][0]
        bucket["tokens"] += (variant.tokens - 2) * bucket["pairs"]
        settings = {"data.buckets": f"[{json.dumps(bucket)}]", "data.evaluation_path": "", "data.seed": seed}
        settings |= {"training.seed": seed, "training.steps": steps, "training.evaluate_every": 0}
        train("stage2_instruct", model, start, run, settings)
        asked = [str(run / "model"), str(DATA / "instruct_test.json"), "--limit", str(limit), "--json", str(result)]
        run_python("-m", f"{__package__}.evaluate", *asked)
    found = json.loads(result.read_text())["accuracy"]
    return {kind: part["exact"] for kind, part in found.items()}


def stage1_of_bert(model: Path) -> Path:
    """Stages 0 (second part) and 1 with BERT in the Q-Former's place, for all seeds."""
    run = RUNS / "bert"
    if not (run / "stage1" / "model").exists():
        fresh = ["--bert-type", "raw_bert"]
        run_python("-m", f"{__package__}.fresh_qformer", str(SHARED / "stage0" / "model"), str(run / "fresh"), *fresh)
        train("stage0_refer", model, run / "fresh", run / "refer", {})
        train("stage1_align", model, run / "refer" / "model", run / "stage1", {})
    return run / "stage1" / "model"


def train(stage: str, model: Path, start: Path, output: Path, settings: dict[str, Any]) -> None:
    settings = {"model": model, "start.model": start, "output": output} | settings
    run_python("train.py", "--config", str(STAGES / f"{stage}.yaml"), *(f"{k}={v}" for k, v in settings.items()))


def run_python(*arguments: str) -> None:
    if subprocess.run([sys.executable, *arguments]).returncode:
        raise InputError(f"{' '.join(arguments[:4])} failed, as it says above; mend that and run the same again")


def error(values: Sequence[float]) -> float:
    """The standard error of a mean over seeds; one seed has none."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def percent(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.1f}" + (f" ± {error(values):.1f}" if len(values) > 1 else "")


def table(found: dict[str, dict[str, list[float]]], kinds: list[str]) -> str:
    lines = []
    for title, names in TABLES.items():
        names = [name for name in names if name in found]
        heads = [title, "tokens", *kinds, "paper's tokens", "GQA", "POPE", "SQA", "VQA-T"]
        lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"] if names else []
        for name in names:
            ours, paper = [percent(found[name][kind]) for kind in kinds], map(str, VARIANTS[name].paper)
            cells = [name, str(VARIANTS[name].tokens), *ours, VARIANTS[name].paper_tokens, *paper]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


@command()
def main(arguments: list[str] | None = None) -> int:
    """Prints the table and draws the picture."""
    import matplotlib.pyplot as plt  # here: it comes with the extra `demo`

    plt.switch_backend("agg")
    parser = Parser(prog="ablation", description=__doc__, allow_abbrev=False)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--limit", type=int, default=400, help="held-out clips")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    options = parser.parse_args(arguments)
    found = {}
    for name in options.only:
        runs = [accuracy(name, seed, options.steps, options.limit) for seed in range(options.seeds)]
        found[name] = {kind: [100.0 * run[kind] for run in runs] for kind in runs[0]}
    kinds = sorted(next(iter(found.values())), key=lambda kind: (kind == "all", kind))
    print(table(found, kinds))

    figure, axis = plt.subplots(figsize=(9, 3.4), layout="constrained")
    width = 0.8 / len(found)
    for number, (name, parts) in enumerate(found.items()):
        places = [place + width * (number - (len(found) - 1) / 2) for place in range(len(kinds))]
        means, errors = ([of(parts[kind]) for kind in kinds] for of in (statistics.mean, error))
        axis.bar(places, means, width, yerr=errors, capsize=2, label=name)
    axis.set(xticks=range(len(kinds)), xticklabels=kinds, ylabel="exact answers, %")
    title = f"{options.steps} steps of training, {options.seeds} seeds"
    figure.legend(title=title, ncols=4, loc="outside upper center")
    figure.savefig(options.picture, dpi=110)
    return 0


if __name__ == "__main__":
    sys.exit(main())
