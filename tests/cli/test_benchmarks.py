"""The benchmarks run; their numbers are meaningful only on an otherwise idle machine."""

import dataclasses
import json
import re

import pytest
from paths import ROOT

from benchmarks import cpu, decode, device, film, packing, timing, train_throughput


def test_the_train_step_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(timing, "WARM_UP", 1)
    sizes = {"rows": 1, "tokens": 64, "frames": 1, "steps": 1, "layers": 1, "mesh": "fsdp=1", "remat": "none"}
    assert train_throughput.main([f"--{name}={value}" for name, value in sizes.items()]) == 0
    assert "1 rows of 1 frames and 64 tokens" in capsys.readouterr().out


def test_the_padding_of_the_shipped_recipe_is_printed(monkeypatch, capsys):
    """For the recipe as shipped, and with one sample per row."""
    printed = []
    for overrides in ([], ["data.packing=false"]):
        monkeypatch.setattr("sys.argv", ["packing", "--samples", "4000", *overrides])
        packing.main()
        total = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("    all"))
        printed.append(float(re.search(r"([\d.]+) %", total)[1]))
    assert printed[0] < 10 < 50 < printed[1]


def test_readers_of_a_film_are_compared(capsys):
    film = str(ROOT / "demo" / "space.mp4")
    assert decode.main([film, "--fps", "2", "--readers", "parts", "key frames"]) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert [row[0] for row in rows] == ["| in order", "| parts", "| key frames"]
    assert [row[-1] for row in rows[:2]] == ["equal |"] * 2 and "off by" in rows[2][-1]


def test_a_film_and_its_stages(capsys):
    """`measure` asserts that both ways to read the film give equal features."""
    assert film.main([str(ROOT / "demo" / "space.mp4"), "--fps", "0.5"]) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert [row[0] for row in rows] == ["| 0.5"] * 8
    assert {"plain: file to first word", "session: file to first word"} < {row[1] for row in rows}


@pytest.mark.parity
def test_a_device_beside_pytorch(tmp_path, monkeypatch, capsys):
    """Both give the same results in every row that has both; parts measured before are not measured again."""
    monkeypatch.setattr(timing, "WARM_UP", 1)
    kept, parts = tmp_path / "kept.jsonl", [part for part in device.PARTS if part != "film"]
    command = ["--rehearse", "--kept", str(kept)]
    assert device.main(command) == 0
    table = capsys.readouterr().out
    found = [json.loads(line) for line in kept.read_text().splitlines()]
    assert [part["part"] for part in found] == parts
    errors = {row["work"]: row["error"] for part in found for row in part["rows"]}
    bars = {"int8": 0.05, "train": 0.02, "": 1e-5}  # kernels quantized in other blocks; bfloat16; float32
    assert len(errors) == 6
    for work, error in errors.items():
        assert error < next(bar for name, bar in bars.items() if name in work), work

    def again(_):
        raise AssertionError("measured a second time")

    for part in parts:
        monkeypatch.setitem(device.PARTS, part, again)
    assert device.main(command) == 0
    assert capsys.readouterr().out == table
    kept.write_text(kept.read_text()[:-20])  # cut off in the middle of a line
    monkeypatch.setitem(device.PARTS, parts[-1], lambda _: found[-1]["rows"])
    assert device.main(command) == 0
    assert capsys.readouterr().out == table
    assert [json.loads(line) for line in kept.read_text().splitlines()] == found


@pytest.mark.parity
def test_a_cpu_beside_pytorch(monkeypatch, capsys):
    """Both give the same results."""
    tiny = {"vocab_size": 99, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    monkeypatch.setattr(cpu, "SMALL", dataclasses.replace(cpu.SMALL, **tiny, **heads))
    sizes = {"image_size": 28, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
    monkeypatch.setattr(cpu, "VIT_G", dataclasses.replace(cpu.VIT_G, **sizes))
    monkeypatch.setattr(cpu, "TOKENS", 64)
    assert cpu.main(["--rounds", "1"]) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 3 and all(float(row[-1].strip(" |")) < 1e-5 for row in rows)
