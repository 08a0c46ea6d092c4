"""The log's lines, resuming it, the table of peaks."""

import json

import jax
import jax.numpy as jnp
import pytest

from llamavid_jax.parallel.chips import PEAK_TFLOPS, peak_flops
from llamavid_jax.training import metrics
from llamavid_jax.training.metrics import Metrics, Throughput, console_line


@pytest.mark.parametrize(
    "kind,tera",
    [
        ("TPU v5 lite", 197),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("TPU v4", 275),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA L40S", 362),
        ("NVIDIA RTX A1000", None),
        ("cpu", None),
    ],
)
def test_peaks(kind, tera):
    assert peak_flops(kind) == (tera and tera * 1e12)


def test_no_row_of_the_peaks_hides_another():
    for name, tera in PEAK_TFLOPS.items():
        assert peak_flops(f"NVIDIA {name} 80GB") == tera * 1e12


def test_log_and_resume(tmp_path):
    lines = []
    with Metrics(tmp_path, report=lines.append) as log:
        for step in range(1, 6):
            log.log(step, {"loss": jnp.float32(1 / step), "grad_norm": float("nan"), "new": float("inf")})
            assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == step  # flushed
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')  # a kill in the middle of a line
    with Metrics(tmp_path, first_step=4, report=lines.append) as log:
        log.log(4, {"loss": 9})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and rows[-1] == {"step": 4, "loss": 9.0}
    assert rows[1] == {"step": 2, "loss": 0.5, "grad_norm": None, "new": None}
    assert len(lines) == 6 and len({line.index("loss") for line in lines}) == 1
    written = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    assert written.count(b"loss") == 6 and b"grad_norm" not in written


def test_only_process_0_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with Metrics(tmp_path, report=lambda line: pytest.fail(line)) as log:
        log.log(1, {"loss": 1.0})
    assert not list(tmp_path.iterdir())


def test_throughput(monkeypatch):
    now = iter([100.0, 103.0, 203.0, 210.0, 210.0, 212.0, 212.0])
    monkeypatch.setattr(metrics, "peak_flops", lambda kind: 1e9)
    meter = Throughput(devices=2, clock=lambda: next(now))
    meter.add(tokens=300.0, slots=400.0, frames=10.0, flops=4 * 10**9, wait=1.0)
    with meter.pause():  # 100 s
        pass
    meter.add(tokens=200.0, slots=400.0, frames=30.0, flops=4 * 10**9, wait=0.5)
    values = meter.read()
    assert values.pop("memory_gib") > 0.05
    expected = {"tokens_per_second": 50, "frames_per_second": 4, "mfu": 0.8 / 2, "data_wait": 0.15, "padding": 0.375}
    assert values == pytest.approx(expected)
    assert meter.read()["tokens_per_second"] == 0  # since the last `read`


def test_console_line():
    line = console_line(12, {"loss": 2.34567, "learning_rate": 1e-3, "tokens_per_second": 12345.6, "mfu": 0.412})
    assert line == "step     12  loss  2.3457  lr 1.00e-03  tokens/s    12,346  MFU 41.2%"
