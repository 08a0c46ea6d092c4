"""Answers of a small model: each video is encoded once, batches are full, items are broken, runs stop at any point."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from paths import ROOT
from training_data import commands_together

from llamavid_jax import LLaMAVIDLlavaImageProcessor
from llamavid_jax.evaluation import command
from llamavid_jax.evaluation.answers import Asker, by_media
from llamavid_jax.evaluation.identity import settings
from llamavid_jax.evaluation.sets import SETS


def run(checkpoint: str, name: str, data: Path, out: Path, *more: str) -> int:
    arguments = ["--model", checkpoint, "--set", name, "--data", str(data), "--out", str(out), "--dtype", "float32"]
    return command.main([*arguments, *more])


def rows(out: Path, name: str = "answers.jsonl") -> list[dict]:
    return [json.loads(line) for line in (out / name).read_bytes().split(b"\n")[1:-1]]


def texts(out: Path) -> dict[str, str]:
    return {row["id"]: row["text"] for row in rows(out)}


@pytest.fixture
def short(monkeypatch):
    """Limits answers to four tokens."""
    import dataclasses

    for name in ("gqa", "msvd", "scienceqa"):
        monkeypatch.setitem(SETS, name, dataclasses.replace(SETS[name], max_new_tokens=4))


def ask(tiny_model, items, batch: int, original: bool = False) -> list[dict]:
    found: list[dict] = []
    asked = settings(SETS["msvd"], Path("absent"), original, "float32", None) | {"max_new_tokens": 4}
    asker = Asker(tiny_model, LLaMAVIDLlavaImageProcessor(56), asked, batch, found.extend)
    asker.ask([[(place, items[place]) for place in group] for group in by_media(items)])
    return sorted(found, key=lambda row: row["index"])


def test_each_video_once_and_full_buckets(tiny_model, official, monkeypatch):
    """Nine questions about six clips: six encodings, and batched answers equal those asked one at a time."""
    items, _ = SETS["msvd"].read(official("msvd"), False)
    encoded, batches = [], []
    encode, generate = type(tiny_model).visual_tokens, type(tiny_model).generate

    def count_encoded(self, frames, asked):
        encoded.append(asked)
        return encode(self, frames, asked)

    def count_batches(self, ids, **more):
        batches.append(len(ids))
        return generate(self, ids, **more)

    monkeypatch.setattr(type(tiny_model), "visual_tokens", count_encoded)
    monkeypatch.setattr(type(tiny_model), "generate", count_batches)
    together = ask(tiny_model, items, 4)
    assert len(encoded) == 6 and sum(map(len, encoded)) == 9 and batches[0] == 4
    assert [row["frames"] for row in together] == [2] * 9
    monkeypatch.undo()
    alone = ask(tiny_model, items, 1)
    assert [row["text"] for row in together] == [row["text"] for row in alone]
    assert len({row["text"] for row in alone}) > 1


def test_the_next_video_is_read_meanwhile(tiny_model, official, monkeypatch):
    """The second video is being read before the first answer is given; the third is not read yet."""
    items, _ = SETS["msvd"].read(official("msvd"), False)
    begun, second, answered = [], threading.Event(), []
    stream, generate = LLaMAVIDLlavaImageProcessor.stream_video, type(tiny_model).generate

    def count_begun(self, video, *arguments, **more):
        begun.append(video)
        if len(begun) == 2:
            second.set()
        return stream(self, video, *arguments, **more)

    def wait(self, ids, **more):
        assert second.wait(60)
        answered.append(len(begun))
        return generate(self, ids, **more)

    monkeypatch.setattr(LLaMAVIDLlavaImageProcessor, "stream_video", count_begun)
    monkeypatch.setattr(type(tiny_model), "generate", wait)
    assert [row["frames"] for row in ask(tiny_model, items, 1)] == [2] * 9
    assert answered[0] == 2 and begun == list(dict.fromkeys(item.media for item in items))


def test_sampled_answers_do_not_depend_on_their_neighbours(tiny_model, official):
    """As in the original: temperature 0.2 and one question at a time; a subset gives the same answers."""
    items, _ = SETS["msvd"].read(official("msvd"), True)
    everything = ask(tiny_model, items, 4, original=True)
    some = ask(tiny_model, items[3:5], 4, original=True)
    assert [row["text"] for row in some] == [row["text"] for row in everything[3:5]]


def test_a_broken_item_costs_itself(checkpoint, official, tmp_path, short, capsys):
    """A file that is no video and a missing image, each with several questions; all other questions are answered."""
    data = official("msvd")
    (data / "video" / "vid101.avi").write_bytes(b"not a video")
    (data / "video" / "vid102.mkv").unlink()
    assert run(checkpoint, "msvd", data, tmp_path / "out") == 0
    found = rows(tmp_path / "out")
    assert {row["id"] for row in found if "error" in row} == {"39501", "39502", "39507"}
    assert all(row["text"] == "" for row in found if "error" in row) and len(found) == 9
    error = capsys.readouterr().err
    assert "1 of 6 pictures and videos are missing" in error and "3 questions are broken" in error
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert (result["answered"], result["of"], result["broken"]) == (9, 9, 3)
    official("msvd")  # restores the video
    assert run(checkpoint, "msvd", data, tmp_path / "out") == 0
    assert sum("error" in row for row in rows(tmp_path / "out")) == 3
    assert run(checkpoint, "msvd", data, tmp_path / "out", "--retry") == 0
    assert not [row for row in rows(tmp_path / "out") if "error" in row] and len(rows(tmp_path / "out")) == 9


def test_questions_that_are_no_text_cost_themselves(checkpoint, official, tmp_path, short):
    """Questions with half a character and with the placeholder fail; the others about the same images are answered."""
    data = official("gqa")
    file = data / "llava_gqa_testdev_balanced.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[0]["text"], lines[2]["text"] = "What \ud800?", "What is <image>?"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run(checkpoint, "gqa", data, tmp_path / "out") == 0
    found = rows(tmp_path / "out")
    assert {row["index"] for row in found if "error" in row} == {0, 2} and len(found) == 12
    assert run(checkpoint, "gqa", data, tmp_path / "out") == 0 and rows(tmp_path / "out") == found


def test_text_alone_and_the_limit(checkpoint, official, tmp_path, short):
    """ScienceQA's questions without an image are asked as text; a later run without --limit answers the rest."""
    data = official("scienceqa")
    assert run(checkpoint, "scienceqa", data, tmp_path / "out", "--limit", "3") == 0
    first = rows(tmp_path / "out")
    assert [row["frames"] for row in sorted(first, key=lambda row: row["index"]) if row["text"] is not None] == [
        0,
        1,
        0,
    ]
    assert run(checkpoint, "scienceqa", data, tmp_path / "out") == 0
    found = rows(tmp_path / "out")
    assert len(found) == len({row["id"] for row in found}) == 14 and found[: len(first)] == first


@pytest.mark.parametrize("limit, count", [((), 9), (("--limit", "5"), 5)])
def test_two_parts_are_the_whole(checkpoint, official, tmp_path, short, limit, count):
    data = official("msvd")
    assert run(checkpoint, "msvd", data, tmp_path / "whole", *limit) == 0
    assert run(checkpoint, "msvd", data, tmp_path / "parts", *limit, "--shard", "0/2") == 0
    assert not (tmp_path / "parts" / "result.json").exists()
    assert run(checkpoint, "msvd", data, tmp_path / "parts", *limit, "--shard", "1/2") == 0
    whole, parts = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "parts"))
    assert parts["answered"] == count and parts["items"] == whole["items"] and parts["figures"] == whole["figures"]
    names = ("answers-0-of-2.jsonl", "answers-1-of-2.jsonl")
    both = [row for name in names for row in rows(tmp_path / "parts", name)]
    assert {row["id"]: row["text"] for row in both} == texts(tmp_path / "whole") and len(both) == count


def test_other_parts_go_on(checkpoint, official, tmp_path, short, capsys):
    """One of three shards is done, then one process does the rest; a shard with other settings is refused at once."""
    data, out = official("msvd"), tmp_path / "out"
    lost = SETS["msvd"].read(data, False)[0][0].media
    lost.rename(tmp_path / "lost")
    assert run(checkpoint, "msvd", data, out, "--shard", "0/3") == 0
    first = rows(out, "answers-0-of-3.jsonl")
    assert any("error" in row for row in first) and any("error" not in row for row in first)
    assert run(checkpoint, "msvd", data, out, "--shard", "1/3", "--like-original") == 2
    assert "was begun with another like original" in capsys.readouterr().err
    assert run(checkpoint, "msvd", data, out) == 0
    assert len(rows(out)) == 9 - len(first) and not {row["id"] for row in first} & texts(out).keys()
    (tmp_path / "lost").rename(lost)
    assert run(checkpoint, "msvd", data, out, "--retry") == 0
    result = json.loads((out / "result.json").read_text())
    assert (result["answered"], result["broken"]) == (9, 0)
    assert len(rows(out)) == 9 - sum("error" not in row for row in first)


def test_annotations_that_come_later(checkpoint, official, tmp_path, monkeypatch):
    """A resumed run uses them: no question is asked again, and the upload and the figures are complete."""
    import dataclasses

    monkeypatch.setitem(SETS, "vqav2", dataclasses.replace(SETS["vqav2"], max_new_tokens=4))
    data = official("vqav2")
    assert run(checkpoint, "vqav2", data, tmp_path / "whole") == 0
    later = [*data.glob("v2_mscoco*"), data / "llava_vqav2_mscoco_test2015.jsonl"]
    for file in later:
        file.rename(file.with_suffix(".later"))
    assert run(checkpoint, "vqav2", data, tmp_path / "out", "--limit", "4") == 0
    first = rows(tmp_path / "out")
    for file in later:
        file.with_suffix(".later").rename(file)
    assert run(checkpoint, "vqav2", data, tmp_path / "out") == 0
    assert texts(tmp_path / "out") == texts(tmp_path / "whole")
    assert [(row["id"], row["seconds"]) for row in rows(tmp_path / "out")[: len(first)]] == [
        (row["id"], row["seconds"]) for row in first
    ]
    uploads, results = (
        [(tmp_path / run / name).read_text() for run in ("whole", "out")]
        for name in ("submission/vqav2_test2015.json", "result.json")
    )
    assert uploads[0] == uploads[1]
    assert json.loads(results[0])["items"] == json.loads(results[1])["items"] != {}


def test_annotations_that_come_later_to_parts(checkpoint, official, tmp_path, monkeypatch, capsys):
    """No figure from the shards that know them alone, whether one shard resumes or a run without shards starts."""
    import dataclasses

    monkeypatch.setitem(SETS, "vqav2", dataclasses.replace(SETS["vqav2"], max_new_tokens=4))
    data, out = official("vqav2"), tmp_path / "out"
    (file,) = data.glob("v2_mscoco*")
    file.rename(tmp_path / file.name)
    for part in ("0/2", "1/2"):
        assert run(checkpoint, "vqav2", data, out, "--shard", part) == 0
    before = (out / "result.json").read_text()
    (tmp_path / file.name).rename(file)
    assert run(checkpoint, "vqav2", data, out, "--shard", "0/2") == 0
    assert run(checkpoint, "vqav2", data, out) == 2
    error = capsys.readouterr().err
    assert error.count("answers-1-of-2.jsonl does not know the annotations") == 2
    assert (out / "result.json").read_text() == before
    assert command.main(["score", str(out)]) == 0
    assert "answers have no reference and are not counted" in capsys.readouterr().out
    assert run(checkpoint, "vqav2", data, out, "--shard", "1/2") == 0
    result = json.loads((out / "result.json").read_text())
    assert len(result["items"]) == result["of"] + 1 and not any("no reference" in note for note in result["notes"])


def test_two_processes_are_the_whole(checkpoint, official, tmp_path):
    """Two processes find each other and share the images; the last one to end scores all answers."""
    arguments = ["--model", checkpoint, "--set", "gqa", "--data", str(official("gqa")), "--dtype", "float32"]
    assert command.main([*arguments, "--out", str(tmp_path / "whole")]) == 0
    code = [sys.executable, "-m", "llamavid_jax.evaluation", *arguments]
    commands_together([*code, "--out", str(tmp_path / "parts")])
    whole, parts = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "parts"))
    assert parts["answered"] == 12 and parts["items"] == whole["items"] and parts["figures"] == whole["figures"]
    assert all(rows(tmp_path / "parts", f"answers-{part}-of-2.jsonl") for part in (0, 1))


@pytest.mark.sharding
def test_eight_devices_answer_as_one(checkpoint, official, tmp_path, short):
    data = official("msvd")
    assert run(checkpoint, "msvd", data, tmp_path / "one") == 0
    assert run(checkpoint, "msvd", data, tmp_path / "eight", "--mesh", "data=4,tensor=2") == 0
    assert texts(tmp_path / "one") == texts(tmp_path / "eight") and len(texts(tmp_path / "one")) == 9


@pytest.mark.parametrize(
    "change, said",
    [
        (["--like-original"], "like original"),
        (["--quantize", "int8"], "settings"),
    ],
)
def test_a_folder_holds_one_run(checkpoint, official, tmp_path, short, capsys, change, said):
    data = official("gqa")
    assert run(checkpoint, "gqa", data, tmp_path / "out", "--limit", "1") == 0
    assert run(checkpoint, "gqa", data, tmp_path / "out", *change) == 2
    assert f"was begun with another {said}" in capsys.readouterr().err


def test_killed_runs_lose_and_repeat_nothing(checkpoint, official, tmp_path):
    """kill -9 after the first answer, and again after the sixth; each next run answers only the remaining questions."""
    data, out = official("gqa"), tmp_path / "killed"
    arguments = ["--model", checkpoint, "--set", "gqa", "--data", str(data), "--dtype", "float32", "--batch", "1"]
    start = [sys.executable, "-m", "llamavid_jax.evaluation", *arguments, "--out", str(out)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    before: list[dict] = []
    for count in (0, 5):
        process = subprocess.Popen(start, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not ((out / "answers.jsonl").exists() and len(rows_so_far(out)) > count):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        now = rows_so_far(out)
        assert now[: len(before)] == before and len(now) > count
        before = now
    assert subprocess.run(start, env=environment, capture_output=True).returncode == 0
    found = rows(out)
    assert found[: len(before)] == before
    assert sorted(row["index"] for row in found) == list(range(12))
    assert command.main([*arguments, "--out", str(tmp_path / "whole")]) == 0
    assert texts(out) == texts(tmp_path / "whole")


def rows_so_far(out: Path) -> list[dict]:
    """The rows of complete lines, without the header."""
    lines = (out / "answers.jsonl").read_bytes().split(b"\n")[1:-1]
    return [json.loads(line) for line in lines]
