"""Two processes, which stand for hosts, under many faults, end as if nothing had been: `make test-pods`.

What an orchestrator does is done here: when one process ends, the other is killed, and both are started again.
"""

import random
import signal
import socket
import time
from pathlib import Path

import pytest
from training_data import command, environment, losses, start, write_data, write_tokenizers

from llamavid_jax.training.goodput import in_words, tally
from llamavid_jax.training.log import JsonLines
from llamavid_jax.training.pace import HUNG

pytestmark = pytest.mark.pods
FAULTS, SAVE_EVERY = 20, 2  # each fault is behind at most one save more
CODES = {"kill": -signal.SIGKILL, "hang": HUNG, "disk": 2}  # of the process that has it
KINDS = tuple(CODES)


def both(arguments: list[str]) -> tuple[list[int], str]:
    """Exit codes and what both print of one life of the run."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    every = [
        start(
            [*arguments, "--coordinator", f"localhost:{port}", "--processes", "2", "--process", str(number)],
            environment(1),
        )
        for number in range(2)
    ]
    while all(process.poll() is None for process in every):
        time.sleep(0.1)
    if any(process.poll() for process in every):
        time.sleep(1)
        for process in every:
            process.kill()
    texts = [process.communicate()[0] for process in every]
    return [process.returncode for process in every], "\n".join(texts)


def saved(output: Path) -> int:
    steps = [int(folder.name) for folder in (output / "checkpoints").glob("*") if folder.name.isdecimal()]
    return max(steps, default=0)


def test_many_faults_change_nothing(tmp_path):
    data, tokenizers = write_data(tmp_path / "data"), write_tokenizers(tmp_path / "tokenizers")

    def run_in(name: str, *extra: str) -> list[str]:
        settings = (
            f"training.steps={FAULTS * SAVE_EVERY + 4}",
            f"training.save_every={SAVE_EVERY}",
            "training.hang_after=5",
        )
        return command("tiny/stage2_instruct.yaml", data, tokenizers, tmp_path / name, *settings, *extra)

    codes, text = both(run_in("undisturbed"))
    assert codes == [0, 0], text
    output, chance = tmp_path / "struck", random.Random(0)
    for number in range(FAULTS):
        kind, last = KINDS[number % len(KINDS)], saved(output)
        at = last + chance.randint(2, SAVE_EVERY + 1)  # a process is watched from its second step on
        codes, text = both([*run_in("struck"), "--simulate-fault", f"{kind}@{at}"])
        print(f"{kind}@{at} behind the save of step {last}: codes {codes}")
        assert CODES[kind] in codes and 0 not in codes, text
    codes, text = both([*run_in("struck"), "--simulate-fault", "slow@1"])
    assert codes == [0, 0] and "process 1 (" in text and "is slow" in text, text
    assert losses(output) == losses(tmp_path / "undisturbed")
    print(in_words(tally(JsonLines(output / "goodput.jsonl", print).rows())))
