"""Train LLaMA-VID, one stage at a time: see `python train.py --help` and `llamavid_jax/commands/train.py`."""

import sys

from llamavid_jax.commands.train import main, parse_arguments

__all__ = ["main", "parse_arguments"]

if __name__ == "__main__":
    sys.exit(main())
