"""A small data set in LLaVA's format, and runs of `train.py` in processes of their own."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
from clips import index_frame, write_clip
from paths import GOLDEN, ROOT
from PIL import Image


def write_data(folder: Path, count: int = 24) -> Path:
    """Images, clips and texts in turn; returns the JSON file."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    write_clip(folder / "clip.mp4", [index_frame(index) for index in range(75)])  # three seconds
    records = []
    for number in range(count):
        answer = " ".join(rng.choice(["a", "man", "walks", "in", "the", "park"], 4))
        record = {"id": f"sample {number}", "conversations": conversation("what is the man doing?", answer)}
        if number % 3 == 0:
            name = f"{number}.png"
            Image.fromarray(rng.integers(0, 256, (60, 70, 3)).astype(np.uint8)).save(folder / name)
            record["image"] = name
        elif number % 3 == 1:
            record["video"] = "clip.mp4"
        if number % 3 < 2:
            record["conversations"][0]["value"] = "<image>\n" + record["conversations"][0]["value"]
        records.append(record)
    path = folder / "data.json"
    path.write_text(json.dumps(records))
    return path


def conversation(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def write_tokenizers(folder: Path) -> Path:
    """The small tokenizers that fit the tiny model, in one folder."""
    from llamavid_jax.text.qformer_tokenizer import QFormerTokenizer
    from llamavid_jax.text.tokenizer import load_tokenizer

    load_tokenizer(GOLDEN / "text").save_pretrained(folder)
    QFormerTokenizer(GOLDEN / "short_video_mean" / "qformer_tokenizer").save_pretrained(folder)
    return folder


def command(config: str, data: Path, tokenizers: Path, output: Path, *extra: str) -> list[str]:
    return [
        sys.executable, str(ROOT / "train.py"), "--config", str(ROOT / "configs" / config),
        f"data.path={data}", f"data.tokenizer={tokenizers}", f"output={output}",
        "data.buckets=[{frames: 6, pairs: 6, questions: 2, tokens: 256}]", "data.question_tokens=16",
        "training.batch_size=4", "training.log_every=1", *extra,
    ]  # fmt: skip


def environment(devices: int) -> dict[str, str]:
    """The tests' environment, but with `devices` devices and without PyTorch."""
    return os.environ | {
        "XLA_FLAGS": re.sub(r"(device_count)=\d+", rf"\1={devices}", os.environ["XLA_FLAGS"]),
        "PYTHONPATH": str(ROOT / "tests" / "without_torch"),
    }


def run(arguments: list[str], env: dict[str, str], code: int = 0) -> str:
    done = subprocess.run(arguments, env=env, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert done.returncode == code, done.stderr[-4000:]
    return done.stdout + done.stderr


def start(arguments: list[str], env: dict[str, str]) -> subprocess.Popen:
    return subprocess.Popen(arguments, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


TOGETHER = """
import sys
import jax
port, process, *arguments = sys.argv[1:]
process = int(process)
jax.distributed.initialize(f"127.0.0.1:{port}", 2, process)
"""


def two_processes(code: str, *arguments: str) -> list[str]:
    """The output of two connected processes with four devices each; `code` sees `process` and `arguments`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    both = [
        start([sys.executable, "-c", TOGETHER + code, port, process, *arguments], environment(4)) for process in "01"
    ]
    return [process.communicate(timeout=1200)[0] for process in both]


def commands_together(command: list[str], devices: int = 2) -> list[str]:
    """The output of one command in two processes connected by --coordinator; both must end with code 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    both = [
        start([*command, "--coordinator", address, "--processes", "2", "--process", process], environment(devices))
        for process in "01"
    ]
    said = [process.communicate(timeout=1200)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    return said


def losses(output: Path) -> list[float]:
    """The losses of all steps, in order."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]
