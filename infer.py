"""Ask LLaMA-VID about videos and images: see `python infer.py --help` and `llamavid_jax/commands/infer.py`."""

from llamavid_jax.commands.infer import main, run

__all__ = ["main", "run"]

if __name__ == "__main__":
    run()
