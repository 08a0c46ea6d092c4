"""The benchmarks run; their numbers are for machines that nobody else uses."""

import re

from paths import ROOT

from benchmarks import decode, packing, timing, train_throughput


def test_the_train_step_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(timing, "WARM_UP", 1)
    sizes = {"rows": 1, "tokens": 64, "frames": 1, "steps": 1, "layers": 1, "mesh": "fsdp=1", "remat": "none"}
    assert train_throughput.main([f"--{name}={value}" for name, value in sizes.items()]) == 0
    assert "1 rows of 1 frames and 64 tokens" in capsys.readouterr().out


def test_the_padding_of_the_shipped_recipe_is_printed(monkeypatch, capsys):
    """As it stands, and with one sample a row."""
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
