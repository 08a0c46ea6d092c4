"""The benchmark of the train step runs; its numbers are for machines that nobody else uses."""

from benchmarks import timing, train_throughput


def test_the_train_step_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(timing, "WARM_UP", 1)
    sizes = {"rows": 1, "tokens": 64, "frames": 1, "steps": 1, "layers": 1, "mesh": "fsdp=1", "remat": "none"}
    assert train_throughput.main([f"--{name}={value}" for name, value in sizes.items()]) == 0
    assert "1 rows of 1 frames and 64 tokens" in capsys.readouterr().out
