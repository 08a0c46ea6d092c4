"""The paper's claim at the demo's size: a frame as content token, context token, both, or four content and context.

    python -m demo.ablation PICTURE [--steps N] [--limit N]        # prints the table

Each variant starts from the same stage 1 and trains stage 2 with the same data, seed and steps; then it answers the
held-out questions.  Stages 0 and 1 are shared and had both tokens: what the other variants lack, they learned with.
A variant in runs/ablation that has been evaluated is not trained again.
"""

import json
import subprocess
import sys
from pathlib import Path

import yaml

from llamavid_jax.errors import InputError, Parser, command

MODEL, STAGE2 = Path("configs/models/demo.yaml"), "configs/demo/stage2_instruct.yaml"
DATA, RUNS = Path("build/demo_data"), Path("runs/ablation")
VARIANTS = {  # name: fields of the model, tokens a frame
    "content": ({"frame_tokens": "content"}, 1),
    "context": ({"frame_tokens": "context"}, 1),
    "both": ({}, 2),
    "grid:2": ({"compress_type": "grid:2"}, 5),
}


def accuracy(name: str, steps: int, limit: int) -> dict[str, dict[str, float]]:
    """Trains a variant and asks it; the part of exact answers by type of question."""
    fields, tokens = VARIANTS[name]
    run = RUNS / name.replace(":", "")
    result = run / "accuracy.json"
    if not result.exists():
        run.mkdir(parents=True, exist_ok=True)
        model = run.with_suffix(".yaml")
        model.write_text(yaml.safe_dump(yaml.safe_load(MODEL.read_text()) | fields))
        bucket = yaml.safe_load(Path(STAGE2).read_text())["data"]["buckets"][0]
        bucket["tokens"] += (tokens - 2) * bucket["pairs"]
        settings = [f"model={model}", f"output={run}", f"data.buckets=[{json.dumps(bucket)}]"]
        settings += [f"training.steps={steps}", "training.evaluate_every=0", "data.evaluation_path="]
        run_python("train.py", "--config", STAGE2, *settings)
        asked = [str(run / "model"), str(DATA / "instruct_test.json"), "--limit", str(limit), "--json", str(result)]
        run_python("-m", f"{__package__}.evaluate", *asked)
    return json.loads(result.read_text())["accuracy"]


def run_python(*arguments: str) -> None:
    if subprocess.run([sys.executable, *arguments]).returncode:
        raise InputError(f"{' '.join(arguments[:4])} failed, as it says above; mend that and run the same again")


@command()
def main(arguments: list[str] | None = None) -> int:
    """Prints the table and draws the picture."""
    import matplotlib.pyplot as plt  # here: it comes with the extra `demo`

    plt.switch_backend("agg")
    parser = Parser(prog="ablation", description=__doc__, allow_abbrev=False)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--limit", type=int, default=400, help="held-out clips")
    options = parser.parse_args(arguments)
    found = {name: accuracy(name, options.steps, options.limit) for name in VARIANTS}
    kinds = sorted(found["both"], key=lambda kind: (kind == "all", kind))
    lines = ["| tokens of a frame | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 1) + "|"]
    for name, parts in found.items():
        cells = [f"{parts[kind]['exact']:.1%}" for kind in kinds]
        lines.append(f"| {name} ({VARIANTS[name][1]}) | " + " | ".join(cells) + " |")
    print("\n".join(lines))

    figure, axis = plt.subplots(figsize=(9, 3.4), layout="constrained")
    for number, (name, parts) in enumerate(found.items()):
        places = [place + 0.2 * (number - 1.5) for place in range(len(kinds))]
        axis.bar(places, [100 * parts[kind]["exact"] for kind in kinds], 0.2, label=name)
    axis.set(xticks=range(len(kinds)), xticklabels=kinds, ylabel="exact answers, %")
    figure.legend(title=f"tokens of a frame, {options.steps} steps of training", ncols=4, loc="outside upper center")
    figure.savefig(options.picture, dpi=110)
    return 0


if __name__ == "__main__":
    sys.exit(main())
