"""The paper's tables 4, 5 and 6 at the demo's size: kinds of tokens, their number, the text decoder.

    python -m demo.ablation PICTURE [--steps N] [--limit N] [--seeds N] [--only NAME ...]        # prints the table
                            [--tower MODEL --runs FOLDER]

The vision tower is the shipped model's, or that of `--tower`, and is frozen; its features of the training clips are
made once.  Everything else starts from scratch, at that model's sizes.  Variants with the same text decoder share
stages 0 and 1, which train with both kinds of tokens.  Then each variant trains stage 2 on the same questions, one a
row, once with each seed, which sets their order, and answers the held-out questions.  Runs that the folder already
holds are not repeated; the table and the figure include all of them that have these steps.
"""

import dataclasses
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from llamavid_jax.config.schema import LLaMAVIDLlavaConfig
from llamavid_jax.errors import InputError, Parser, command

STAGES, DATA = Path("configs/demo"), Path("build/demo_data")
ROWS, WORDS = 12, 48  # rows of a step, and tokens of a row beside its visual ones
SHARED_STEPS = {"stage0_pretrain": 600, "stage0_refer": 1000}


class Place(NamedTuple):
    """The checkpoint whose vision tower, sizes and tokenizers all variants use, and the folder of their runs."""

    tower: Path = Path("demo/model")
    runs: Path = Path("runs/ablation")


class Variant(NamedTuple):
    """Fields of the model; the paper's tokens of a frame, GQA, POPE, SQA and VQA-T."""

    fields: dict[str, str]
    paper_tokens: str
    paper: tuple[float, float, float, float]


VARIANTS = {
    "content": Variant({"frame_tokens": "content"}, "0 + 1", (53.3, 80.9, 66.1, 46.5)),
    "context": Variant({"frame_tokens": "context"}, "1 + 0", (54.3, 82.4, 67.7, 48.3)),
    "both": Variant({}, "1 + 1", (55.5, 83.1, 68.8, 49.0)),
    "grid:2": Variant({"compress_type": "grid:2"}, "1 + 4", (56.2, 83.5, 68.7, 49.1)),
    "grid:3": Variant({"compress_type": "grid:3"}, "1 + 16", (58.2, 83.1, 67.4, 50.8)),
    "grid:4": Variant({"compress_type": "grid:4"}, "1 + 16", (58.2, 83.1, 67.4, 50.8)),
    "all": Variant({"compress_type": "none"}, "1 + 256", (63.0, 86.6, 67.7, 53.8)),
    "all content": Variant({"compress_type": "none", "frame_tokens": "content"}, "0 + 256", (61.9, 85.5, 67.5, 53.0)),
    "bert": Variant({"bert_type": "raw_bert"}, "1 + 1", (54.1, 80.8, 67.9, 48.1)),
}
TABLES = {
    "kinds (table 4)": ("content", "context", "both"),
    "numbers (table 5)": ("both", "grid:2", "grid:3", "grid:4", "all", "all content"),
    "text decoder: none, BERT, Q-Former (table 6)": ("content", "bert", "both"),
}


def result(at: Place, name: str, seed: int | str, steps: int) -> Path:
    """Where the accuracy of a variant and seed lies."""
    return at.runs / f"{name.replace(':', '').replace(' ', '_')}_{steps}_{seed}" / "accuracy.json"


def config(at: Place, name: str) -> LLaMAVIDLlavaConfig:
    return dataclasses.replace(LLaMAVIDLlavaConfig.from_pretrained(at.tower), **VARIANTS[name].fields)


def measure(at: Place, name: str, seed: int, steps: int, limit: int) -> None:
    """Trains a variant and asks it."""
    variant, found = config(at, name), result(at, name, seed, steps)
    run, model = found.parent, found.parent.with_suffix(".yaml")
    start = stage1(at, variant.bert_type)
    model.write_text(yaml.safe_dump(dataclasses.asdict(variant)))
    row = {"frames": 8, "pairs": 8, "questions": 1, "tokens": 8 * variant.tokens_per_frame + WORDS}
    settings = {"model": model, "data.path": questions(at), "data.buckets": f"[{json.dumps(row)}]", "data.seed": seed}
    settings |= {"training.batch_size": ROWS, "training.seed": seed, "training.steps": steps}
    train("stage2_instruct", start, run, settings)
    asked = [str(run / "model"), str(DATA / "instruct_test.json"), "--limit", str(limit), "--json", str(found)]
    run_python("-m", f"{__package__}.evaluate", *asked)


def stage1(at: Place, decoder: str) -> Path:
    """Stages 0 and 1 with a text decoder."""
    run, both = at.runs / decoder, at.runs / "stage0" / "model"
    if not both.exists():
        run_python("-m", f"{__package__}.fresh_qformer", str(at.tower), str(at.runs / "tower"), "--tower-alone")
        train("stage0_pretrain", at.runs / "tower", both.parent)
    if not (run / "stage1" / "model").exists():
        run_python("-m", f"{__package__}.fresh_qformer", str(both), str(run / "fresh"), "--bert-type", decoder)
        train("stage0_refer", run / "fresh", run / "refer")
        train("stage1_align", run / "refer" / "model", run / "stage1")
    return run / "stage1" / "model"


def questions(at: Place) -> Path:
    """The training questions, one a record, about the features of their clips."""
    listed, split = at.runs / "questions.json", at.runs / "split.json"
    if not listed.exists():
        made = ["--out", str(at.runs / "features"), "--model", str(at.tower), "--dtype", "float32"]
        run_python("-m", "llamavid_jax.commands.features", str(DATA / "clips"), *made)
        chat = str(DATA / "instruct.json")
        run_python("-m", "llamavid_jax.data.to_llava", "split_chat", chat, str(split), "--rounds", "1")
        records = json.loads(split.read_text())
        for record in records:
            record["features"] = f"features/{Path(record.pop('video')).name}.safetensors"
        listed.write_text(json.dumps(records))
    return listed


def train(stage: str, start: Path, output: Path, settings: dict[str, Any] | None = None) -> None:
    common = {"model": "", "start.model": start, "output": output, "trainable.vision.*": False}
    common |= {"data.evaluation_path": "", "training.evaluate_every": 0}
    common |= {"training.steps": SHARED_STEPS[stage]} if stage in SHARED_STEPS else {}
    overrides = (f"{key}={value}" for key, value in (common | (settings or {})).items())
    run_python("train.py", "--config", str(STAGES / f"{stage}.yaml"), *overrides)


def run_python(*arguments: str) -> None:
    if subprocess.run([sys.executable, *arguments]).returncode:
        raise InputError(f"{' '.join(arguments[:4])} failed, as it says above; mend that and run the same again")


def error(values: Sequence[float]) -> float:
    """The standard error of a mean over seeds; one seed has none."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def percent(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.1f}" + (f" ± {error(values):.1f}" if len(values) > 1 else "")


def table(at: Place, found: dict[str, dict[str, list[float]]], kinds: list[str]) -> str:
    lines = []
    for title, names in TABLES.items():
        names = [name for name in names if name in found]
        heads = [title, "tokens", "seeds", *kinds, "paper's tokens", "GQA", "POPE", "SQA", "VQA-T"]
        lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"] if names else []
        for name in names:
            ours, paper = [percent(found[name][kind]) for kind in kinds], map(str, VARIANTS[name].paper)
            size = str(config(at, name).tokens_per_frame), str(len(found[name]["all"]))
            lines.append(f"| {' | '.join([name, *size, *ours, VARIANTS[name].paper_tokens, *paper])} |")
        lines.append("")
    return "\n".join(lines)


@command()
def main(arguments: list[str] | None = None) -> int:
    """Prints the table and draws the picture."""
    import matplotlib.pyplot as plt  # here: it comes with the extra `demo`

    plt.switch_backend("agg")
    parser = Parser(prog="ablation", description=__doc__, allow_abbrev=False)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--limit", type=int, default=400, help="held-out clips")
    parser.add_argument("--seeds", type=int, default=3)
    shipped = [name for name in VARIANTS if name != "grid:4"]  # 4 x 4 does not divide the shipped tower's 36 patches
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=shipped, metavar="NAME")
    parser.add_argument("--tower", type=Path, default=Place().tower, help="checkpoint with the vision tower of all")
    parser.add_argument("--runs", type=Path, default=Place().runs, help="folder of the runs: one for each tower")
    options = parser.parse_args(arguments)
    at = Place(options.tower, options.runs)
    at.runs.mkdir(parents=True, exist_ok=True)
    for seed in range(options.seeds):
        for name in options.only:
            if not result(at, name, seed, options.steps).exists():
                measure(at, name, seed, options.steps, options.limit)
    found, counts = {}, set()
    for name in VARIANTS:
        files = sorted(at.runs.glob(f"{result(at, name, '*', options.steps).relative_to(at.runs)}"))
        runs = [json.loads(file.read_text())["accuracy"] for file in files]
        counts |= {run["all"]["questions"] for run in runs}
        if runs:
            found[name] = {kind: [100.0 * run[kind]["exact"] for run in runs] for kind in runs[0]}
    if len(counts) > 1:
        raise InputError(
            f"{at.runs} has runs about {sorted(counts)} questions; remove accuracy.json of another --limit"
        )
    kinds = sorted(next(iter(found.values())), key=lambda kind: (kind == "all", kind))
    print(table(at, found, kinds))

    figure, axis = plt.subplots(figsize=(9, 3.4), layout="constrained")
    width = 0.8 / len(found)
    for number, (name, parts) in enumerate(found.items()):
        places = [place + width * (number - (len(found) - 1) / 2) for place in range(len(kinds))]
        means, errors = ([of(parts[kind]) for kind in kinds] for of in (statistics.mean, error))
        axis.bar(places, means, width, yerr=errors, capsize=2, label=name)
    axis.set(xticks=range(len(kinds)), xticklabels=kinds, ylabel="exact answers, %")
    title = f"{options.steps} steps of training"
    figure.legend(title=title, ncols=4, loc="outside upper center")
    figure.savefig(options.picture, dpi=110)
    return 0


if __name__ == "__main__":
    sys.exit(main())
