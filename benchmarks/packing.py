"""How much of a recipe's rows is padding, on a mixed set of samples: 60 % images, 25 % videos, 15 % texts.

    python -m benchmarks.packing [--config configs/stage2_instruct.yaml] [section.key=value ...]

Prints the table that a training run prints for its data: the rows of each bucket, and the share of their tokens that is
padding.  Sizes are random: images of 1 to 8 turns, videos of 90 s at one frame a second (median), texts of 400 tokens
(median).
"""

import sys

import numpy as np

from llamavid_jax.data.examples import SampleSize
from llamavid_jax.data.plan import describe, plan_epoch
from llamavid_jax.data.sizes import Sizes
from llamavid_jax.errors import Parser, command
from llamavid_jax.training.config import read_config


def mixed(samples: int, tokens_per_frame: int, seed: int = 0) -> Sizes:
    """The sizes of a mixed set of samples."""
    random = np.random.default_rng(seed)

    def log_normal(median: float, spread: float) -> float:
        return float(np.exp(random.normal(np.log(median), spread)))

    sizes = []
    for what in random.random(samples):
        if what < 0.6:
            turns = int(random.integers(1, 9))
            tokens = 60 + log_normal(40, 0.6) * turns + tokens_per_frame * turns
            sizes.append(SampleSize("pixels", 1, turns, int(tokens)))
        elif what < 0.85:
            frames = int(np.clip(log_normal(90, 0.7), 4, 300))
            sizes.append(SampleSize("pixels", frames, 1, int(60 + log_normal(55, 0.6)) + frames * tokens_per_frame))
        else:
            sizes.append(SampleSize("text", 0, 0, int(np.clip(log_normal(400, 0.9), 50, 2048))))
    return Sizes.of(sizes)


@command()
def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="packing", description=__doc__, allow_abbrev=False)
    parser.add_argument("--config", default="configs/stage2_instruct.yaml", metavar="FILE")
    parser.add_argument("--samples", type=int, default=10_000, metavar="N")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_intermixed_args(arguments)
    config = read_config(options.config, options.overrides)
    width, data = config.model_config().tokens_per_frame, config.data
    sizes = mixed(options.samples, width)
    plan = plan_epoch(sizes, data.shapes, config.training.batch_size, width, data.seed, 0, data.packing)
    print(describe(plan, sizes, data.shapes, width))
    print(f"{options.samples / len(plan):.0f} samples a step of {config.training.batch_size} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
