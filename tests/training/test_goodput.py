"""Every second of a run counts for one part, over restarts; steps repeated after a restart are lost."""

import json
import math

import pytest
from PIL import Image

from llamavid_jax.commands import goodput as command
from llamavid_jax.training import goodput
from llamavid_jax.training.goodput import Goodput, in_words, spans, tally

LIVES = [  # two saves, at 4 and 8, and two restarts from the one at 4; the second life saved nothing
    {"time": 110.0, "step": 0, "began": 100.0, "start": 10.0},
    {"time": 130.0, "step": 4, "steps": 14.0, "compile": 6.0},
    {"time": 140.0, "step": 6, "steps": 8.0, "save": 1.0, "data wait": 1.0},
    {"time": 165.0, "step": 4, "began": 160.0, "start": 3.0, "restore": 2.0},
    {"time": 175.0, "step": 7, "steps": 10.0},
    {"time": 182.0, "step": 4, "began": 180.0, "start": 2.0},
    {"time": 202.0, "step": 8, "steps": 20.0},
]


def test_steps_that_were_done_again_are_lost():
    totals = tally(LIVES)
    assert totals == {
        "steps": 34.0, "compile": 6.0, "data wait": 1.0, "save": 1.0, "restore": 2.0, "evaluation": 0.0,
        "start": 15.0, "lost": 18.0, "idle": 25.0,
    }  # fmt: skip
    assert sum(totals.values()) == 202 - 100
    assert in_words(totals).startswith("0.03 hours: steps 33.3%, idle 24.5%, lost 17.6%")


def test_the_wall_clock_has_no_holes():
    found = spans(LIVES)
    assert [start for start, _, _ in found[1:]] == [end for _, end, _ in found[:-1]]
    assert found[2] == (130.0, 140.0, {"save": 1.0, "data wait": 1.0, "lost": 8.0})
    assert found[3] == (140.0, 160.0, {"idle": 20.0})


def test_odd_lines_are_left_out():
    odd = [{}, {"time": "now", "step": 3}, {"time": 50.0}, {"time": 131.0, "step": 4, "steps": "many"}]
    assert tally([*LIVES[:2], *odd, *LIVES[2:]]) == tally(LIVES)
    assert not any(tally([]).values()) and not any(tally([{"time": math.nan}]).values())


def test_a_stopwatch_is_always_on_one_part(tmp_path, monkeypatch):
    now, wall = [0.0], 1000.0
    monkeypatch.setattr(goodput.time, "time", lambda: wall + now[0])

    def passes(seconds: float) -> None:
        now[0] += seconds

    watch = Goodput(tmp_path, pytest.fail, clock=lambda: now[0])
    passes(3)
    with watch.of("restore"):
        passes(2)
    watch.begin(10)
    passes(5)
    watch.move(1.0, "steps", "data wait")
    with watch.of("save"):
        passes(4)
    watch.write(12)
    assert watch.share == pytest.approx(4 / 14)
    watch.write(12)  # no time has passed
    rows = [json.loads(line) for line in (tmp_path / goodput.FILE).read_text().splitlines()]
    assert rows == [
        {"time": 1005.0, "step": 10, "began": 1000.0, "restore": 2.0, "start": 3.0},
        {"time": 1014.0, "step": 12, "steps": 4.0, "data wait": 1.0, "save": 4.0},
    ]
    passes(6)
    again = Goodput(tmp_path, pytest.fail, clock=lambda: now[0])
    again.begin(11)  # one step back: how long each of the last two took is unknown
    assert again.share == 0 and "lost 20.0%" in str(again) and "idle 30.0%" in str(again)


def test_a_table_and_a_picture(tmp_path, capsys):
    (tmp_path / goodput.FILE).write_text("".join(json.dumps(row) + "\n" for row in LIVES))
    picture = tmp_path / "goodput.png"
    assert command.main([str(tmp_path), str(picture)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(goodput.PARTS) and lines[1].split()[:3] == ["steps", "0:34", "33.3%"]
    assert set(command.COLOURS) == set(goodput.PARTS)
    with Image.open(picture) as drawn:
        band = [drawn.getpixel((command.EDGE + round(second * command.WIDTH / 102), 60)) for second in (50, 95)]
        assert ["#{:02x}{:02x}{:02x}".format(*colour) for colour in band] == [
            command.COLOURS[part] for part in ("idle", "steps")
        ]
    assert command.main([str(tmp_path), str(tmp_path / "goodput.unknown")]) == 2
    assert command.main([str(tmp_path / "absent")]) == 2
    assert "holds no hours" in capsys.readouterr().err
