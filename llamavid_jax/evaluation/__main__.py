"""`python -m llamavid_jax.evaluation`."""

from llamavid_jax.evaluation.command import run

if __name__ == "__main__":
    run()
