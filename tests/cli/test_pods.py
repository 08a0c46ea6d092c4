"""Two processes, which stand for hosts, train under many faults with the same result as without: `make test-pods`.

The test does what an orchestrator would: if one process ends, it kills the other and starts the run again.  Every other
time one process, with the devices of both, replaces the two.
"""

import itertools
import signal
import socket
import time
from collections import Counter
from pathlib import Path

import pytest
from training_data import command, environment, losses, start, write_data, write_tokenizers

from llamavid_jax.training.goodput import in_words, tally
from llamavid_jax.training.log import JsonLines
from llamavid_jax.training.pace import HUNG

pytestmark = pytest.mark.pods
FAULTS, SAVE_EVERY = 50, 3
CODES = {"kill": -signal.SIGKILL, "hang": HUNG, "disk": 2}  # exit code of the process with the fault
BESIDE = "slow", "nan"  # which end no process: each life has both, then one of CODES before its next save


def life(arguments: list[str], processes: int = 2) -> tuple[list[int], str]:
    """One life of the run, which has two devices: the exit codes and the output of all its processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    every = [
        start(
            [*arguments, "--coordinator", address, "--processes", str(processes), "--process", str(number)],
            environment(2 // processes),
        )
        for number in range(processes)
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
    output, lives = tmp_path / "struck", -(-FAULTS // (1 + len(BESIDE)))

    def run_in(folder: Path, *extra: str) -> list[str]:
        settings = (
            f"training.steps={(lives + 1) * SAVE_EVERY}",
            f"training.save_every={SAVE_EVERY}",
            "training.hang_after=5",
        )
        return command("tiny/stage2_instruct.yaml", data, tokenizers, folder, *settings, *extra)

    codes, text = life(run_in(tmp_path / "undisturbed"))
    assert codes == [0, 0], text
    had: Counter[str] = Counter()
    for number, kind in zip(range(lives), itertools.cycle(CODES)):
        began, last = time.monotonic(), saved(output)
        at = last + SAVE_EVERY  # after the steps up to the next save, which all count
        faults = [f"slow@{last + 1}", f"nan@{at + 1}", f"{kind}@{at + 3}"]  # a step is checked after the next one
        arguments = itertools.chain(*(("--simulate-fault", one) for one in faults))
        codes, text = life([*run_in(output), *arguments], processes=2 - number % 2)
        print(*faults, f"codes {codes}, {time.monotonic() - began:.0f} s", flush=True)
        assert CODES[kind] in codes and 0 not in codes, text
        assert f"step {at + 1}: loss nan" in text, text
        had.update([*BESIDE, kind])
    codes, text = life([*run_in(output), "--simulate-fault", "slow@1"])
    assert codes == [0, 0] and "process 1 (" in text and "is slow" in text, text
    assert losses(output) == losses(tmp_path / "undisturbed")
    print(f"{had.total()} faults: {dict(had)}", in_words(tally(JsonLines(output / "goodput.jsonl", print).rows())))
