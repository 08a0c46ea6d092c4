"""Draws the demo model's training: the loss of every stage, on the training and the held-out set.

python -m demo.plot docs/demo_training.png
"""

import json
import sys
from pathlib import Path

from llamavid_jax.errors import InputError, Parser, command

STAGES = ("stage0", "stage0_refer", "stage1", "stage2", "stage3")
RUNS = Path(__file__).parent.parent / "runs" / "demo"


@command()
def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="plot", description=__doc__, allow_abbrev=False)
    parser.add_argument("picture", type=Path)
    options = parser.parse_args(arguments)
    import matplotlib.pyplot as plt  # here: it comes with the extra `demo`

    plt.switch_backend("agg")
    figure, axes = plt.subplots(1, len(STAGES), figsize=(15, 3.2), sharey=True, layout="constrained")
    for axis, stage in zip(axes, STAGES, strict=True):
        if not (RUNS / stage / "metrics.jsonl").is_file():
            raise InputError(f"{RUNS / stage} holds no run; train it first: make demo-model")
        lines = [json.loads(line) for line in (RUNS / stage / "metrics.jsonl").read_text().splitlines()]
        for name, style in (("loss", {}), ("evaluation_loss", {"marker": "o"})):
            points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), label=name.replace("_", " "), **style)
        axis.set(title=stage, xlabel="step", yscale="log")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("cross-entropy, nats a token")
    axes[0].legend()
    figure.savefig(options.picture, dpi=110)
    return 0


if __name__ == "__main__":
    sys.exit(main())
