"""`llamavid-batch`: answers equal those of single rows, and none is lost or written twice, whatever happens."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from clips import index_frame, write_clip
from paths import ROOT
from PIL import Image
from training_data import commands_together, environment

from llamavid_jax import LLaMAVIDLlavaForConditionalGeneration
from llamavid_jax.commands import batch, infer

QUESTIONS = ("what is in the video?", "who?", "which car is it, and where does it go?")


@pytest.fixture
def media(tmp_path, monkeypatch) -> Path:
    """Clips of 3, 6 and 9 seconds and an image, to be named without their folder."""
    monkeypatch.chdir(tmp_path)
    for number in (1, 2, 3):
        write_clip(tmp_path / f"{number}.mp4", [index_frame(90 * number + i) for i in range(3 * number)], rate=1)
    Image.new("RGB", (80, 60), "red").save(tmp_path / "red.png")
    return tmp_path


def rows() -> list[dict]:
    """Rows that take the videos in turn, so that each is used again later."""
    found = [
        {"id": f"{number}-{place}", "video": f"{number}.mp4", "question": question}
        for place, question in enumerate(QUESTIONS)
        for number in (1, 2, 3)
    ]
    return [*found, {"id": "picture", "image": "red.png", "question": "who?"}, {"id": "text", "question": "who?"}]


def save(path: Path, lines: list) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def read(path: Path) -> dict[str, dict]:
    """The answers by id; asserts that each id occurs once."""
    answers = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({answer["id"] for answer in answers}) == len(answers)
    return {answer["id"]: answer for answer in answers}


@pytest.fixture
def run(checkpoint, media, capsys):
    def run(*arguments: str, questions: str = "q.jsonl", out: str = "a.jsonl") -> tuple[int, str]:
        given = ["--in", questions, "--out", out, "--model", checkpoint, "--dtype", "float32", "--max-new-tokens", "8"]
        code = batch.main([*given, *arguments])
        return code, capsys.readouterr().err

    return run


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    counts, features = [], LLaMAVIDLlavaForConditionalGeneration.vision_features

    def counted(model, frames):
        found = features(model, frames)
        counts.append(len(found))
        return found

    monkeypatch.setattr(LLaMAVIDLlavaForConditionalGeneration, "vision_features", counted)
    return counts


def test_answers_are_those_of_the_rows_alone(run, checkpoint, media, encoded, capsys):
    """Answers to batched rows equal those of single rows, and each video is encoded once."""
    save(media / "q.jsonl", rows())
    code, err = run()
    found = read(media / "a.jsonl")
    assert code == 0 and sorted(encoded) == [1, 3, 6, 9] and set(found) == {row["id"] for row in rows()}
    assert "11 of 11 rows, " in err and "19 frames, " in err
    for row in rows()[-5:]:
        media_of = [part for kind in ("video", "image") if kind in row for part in (f"--{kind}", row[kind])]
        asked = ["--model", checkpoint, "--dtype", "float32", "--max-new-tokens", "8", "--json", *media_of]
        assert infer.main([*asked, "--question", row["question"]]) == 0
        alone = json.loads(capsys.readouterr().out)
        names = ("answer", "frames", "visual_tokens", "prompt_tokens", "new_tokens")
        assert found[row["id"]] == row | {name: alone[name] for name in names}


def test_rows_that_fail_cost_themselves_alone(run, media, monkeypatch):
    (media / "bad.mp4").write_bytes(b"no video")
    lines = [
        {"id": "good", "video": "1.mp4", "question": "who?"},
        {"id": "missing", "video": "nothing.mp4", "question": "who?"},
        {"id": "bad", "video": "bad.mp4", "question": "who?"},
        {"id": "long", "video": "1.mp4", "question": "word " * 2100},
        {"id": "placeholder", "video": "1.mp4", "question": "is <image> here?"},
        {"id": "empty", "video": "1.mp4", "question": " "},
        {"id": "none", "video": "1.mp4"},
        {"id": "number", "video": 7, "question": "who?"},
        {"id": "plural", "videos": ["1.mp4"], "question": "who?"},
        {"id": "film", "video": "1.mp4", "subtitles": "1.srt", "question": "who?"},
        {"video": "1.mp4", "question": "what?"},
        "[1]",
        "{torn",
        {"id": "two", "video": ["1.mp4", "2.mp4"], "question": "who?"},
    ]
    save(media / "q.jsonl", lines)
    code, err = run()
    found = read(media / "a.jsonl")
    failed = {name: answer["error"] for name, answer in found.items() if "error" in answer}
    assert code == 1 and set(found) - set(failed) == {"good", "10", "two"}
    assert found["two"]["frames"] == 9 and found["two"]["video"] == ["1.mp4", "2.mp4"]
    for name, message in {
        "missing": "nothing.mp4 does not exist",
        "bad": "bad.mp4 is not a video",
        "long": "more than the 2048 positions",
        "placeholder": "the question holds <image>",
        "empty": "the question is empty",
        "none": "the question is None",
        "number": "video is '7'",
        "plural": "it has 'videos', which is not read here",
        "film": "it has 'subtitles', which is not read here",
        "11": "row 11 is '[1]'",
        "12": "q.jsonl is not readable JSON",
    }.items():
        assert message in failed.pop(name) and f"llamavid-batch: {name}: " in err
    assert not failed and "failed: 11 of " in err

    lines[1]["video"] = "2.mp4"  # repaired; the line of its error is deleted below
    save(media / "q.jsonl", lines)
    kept = [line for line in (media / "a.jsonl").read_text().splitlines() if '"missing"' not in line]
    save(media / "a.jsonl", kept)
    assert run()[0] == 1 and "answer" in read(media / "a.jsonl")["missing"]


def test_other_settings_are_told_of_answers_that_are_there(run, media):
    """Existing answers are kept, with a warning: a failed row may be asked again at another rate."""
    save(media / "q.jsonl", rows()[:1])
    assert "was begun" not in run()[1] and "was begun" not in run()[1]
    code, err = run("--fps", "0.5", "--stop", "x")
    assert code == 0 and "1 of 1 rows are answered already" in err
    assert "a.jsonl was begun with fps None, now 0.5: " in err and "was begun with stop [], now ['x']: " in err
    (media / "a.jsonl").unlink()
    assert "was begun" not in run("--fps", "0.5")[1] and "with fps 0.5, now None" in run()[1]


def test_one_that_cannot_be_answered_does_not_cost_its_batch(run, media, monkeypatch):
    """If the model refuses the whole batch, its other rows are still answered."""
    from llamavid_jax.inference.request import RequestError

    generate, together = LLaMAVIDLlavaForConditionalGeneration.generate, []

    def picky(model, ids, **given):
        together.append(len(ids))
        if any(len(row) == lengths[0] for row in ids):
            raise RequestError("not this one")
        return generate(model, ids, **given)

    save(media / "q.jsonl", [{"id": str(i), "question": "who " * (i + 1)} for i in range(4)])
    lengths = [0]
    run(out="whole.jsonl")
    lengths[0] = read(media / "whole.jsonl")["2"]["prompt_tokens"]
    monkeypatch.setattr(LLaMAVIDLlavaForConditionalGeneration, "generate", picky)
    run()
    whole, found = read(media / "whole.jsonl"), read(media / "a.jsonl")
    assert found.pop("2")["error"] == "not this one" and whole.pop("2") and found == whole


def test_the_same_command_goes_on(run, media, encoded):
    """An incomplete last line is cut off; existing answers are neither asked again nor changed."""
    save(media / "q.jsonl", rows())
    run()
    lines = (media / "a.jsonl").read_text().splitlines(keepends=True)
    whole = read(media / "a.jsonl")
    for kept in (lines[:4], [*lines[:4], lines[4][:-1]], [*lines[:4], lines[4][:9]], [], lines):
        (media / "a.jsonl").write_text("".join(kept))
        code, _ = run()
        assert code == 0 and read(media / "a.jsonl") == whole
        assert (media / "a.jsonl").read_text().startswith("".join(kept[:4]))
    encoded.clear()
    _, err = run()
    assert encoded == [] and err == "11 of 11 rows are answered already\n"


def test_shards_share_the_videos(run, media, encoded):
    save(media / "q.jsonl", rows())
    found = {}
    for index in range(2):
        assert run("--shard", f"{index}/2")[0] == 0
        part = read(media / f"a.{index}-of-2.jsonl")
        assert not part.keys() & found.keys()
        found |= part
    assert set(found) == {row["id"] for row in rows()} and sorted(encoded) == [1, 3, 6, 9]


def test_two_processes_share_the_videos(run, media, checkpoint):
    """The processes connect, then work independently: the first, whose part exists, ends before the second begins."""
    save(media / "q.jsonl", [row | {"video": str(media / row["video"])} for row in rows()[:9]])
    run(out="whole.jsonl")
    parts, whole = [media / f"a.{index}-of-2.jsonl" for index in range(2)], read(media / "whole.jsonl")
    save(parts[0], [answer for answer in whole.values() if answer["id"][0] in "13"])
    command = [sys.executable, "-m", "llamavid_jax.commands.batch", "--in", str(media / "q.jsonl"), "--out"]
    command += [str(media / "a.jsonl"), "--model", checkpoint, "--dtype", "float32", "--max-new-tokens", "8"]
    said = commands_together([*command, "--mesh", "tensor=2"])
    assert "6 of 6 rows are answered already" in said[0] and "3 of 3 rows" in said[1]
    assert read(parts[0]) | read(parts[1]) == whole and len(read(parts[1])) == 3


def test_the_cache_is_used(run, media):
    save(media / "q.jsonl", rows())
    run("--cache", str(media / "cache"))
    assert len(list((media / "cache").glob("*.safetensors"))) == 3
    run("--cache", str(media / "cache"), out="b.jsonl")
    assert read(media / "a.jsonl") == read(media / "b.jsonl")


@pytest.mark.parametrize("tokens", [1, 1000, 100_000])
def test_how_many_are_answered_together_changes_nothing(run, media, tokens):
    save(media / "q.jsonl", rows()[:6])
    run("--batch-tokens", str(tokens))
    run(out="b.jsonl")
    assert read(media / "a.jsonl") == read(media / "b.jsonl")


def bad(case: str, media: Path) -> str:
    """Prepares a case; returns the expected message."""
    questions, answers = media / "q.jsonl", media / "a.jsonl"
    row = {"id": "a", "video": "1.mp4", "question": "who?"}
    save(questions, [row])
    match case:
        case "no questions":
            questions.write_text("")
            return "q.jsonl is empty"
        case "none there":
            questions.unlink()
            return "q.jsonl does not exist"
        case "twice":
            save(questions, [row, row])
            return "holds two rows of id 'a'"
        case "no answers":
            answers.write_text("hello\n")
            return "which is no answer; give another --out"
        case "a file of something else":
            answers.write_text("hello")  # no newline: would be cut as an incomplete line
            return "which is no answer; give another --out"
        case "of others":
            save(answers, [{"id": "b", "question": "who?", "answer": "x"}])
            return "holds the answer 'b' to another question"
        case "of another question":
            save(answers, [row | {"question": "what?", "answer": "x"}])
            return "holds the answer 'a' to another question"
        case "two answers":
            save(answers, [row | {"answer": "x"}] * 2)
            return "holds two answers of id 'a'"
        case "a folder":
            answers.mkdir()
            return "cannot be written to"
    raise AssertionError(case)


@pytest.mark.parametrize(
    "case",
    [
        "no questions",
        "none there",
        "twice",
        "no answers",
        "of others",
        "of another question",
        "two answers",
        "a folder",
    ],
)
def test_bad_input(case, run, media):
    message = bad(case, media)
    before = (media / "a.jsonl").read_text() if (media / "a.jsonl").is_file() else None
    code, err = run()
    assert code == 2 and err.startswith("llamavid-batch: ") and message in err and err.count("\n") == 1
    assert before is None or (media / "a.jsonl").read_text() == before


@pytest.mark.parametrize("option", [["--batch-tokens", "0"], ["--fps", "nan"], ["--cache-size", "0"], ["--shard", "1"]])
def test_bad_options(option, run):
    code, err = run(*option)
    assert code == 2 and f"{option[0]} is " in err


def test_a_full_disk_loses_nothing(run, media, monkeypatch):
    """Half a line is written, then writing fails; the same command resumes from there."""
    save(media / "q.jsonl", rows())
    write = os.write

    def full(file, data):
        if b'"answer"' in data:
            monkeypatch.setattr(os, "write", never)
            return write(file, data[: len(data) // 2])
        return write(file, data)

    def never(file, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    code, err = run()
    assert code == 2 and "a.jsonl cannot be written to (No space left on device)" in err
    monkeypatch.setattr(os, "write", write)
    assert run()[0] == 0 and set(read(media / "a.jsonl")) == {row["id"] for row in rows()}


def test_two_at_once_are_refused(run, media, checkpoint):
    from llamavid_jax.files import locked

    save(media / "q.jsonl", rows())
    with locked(media / ".a.jsonl.lock", "it"):
        code, err = run()
    assert code == 2 and "a.jsonl is in use by another process" in err


def test_killed_at_random_moments(run, media, checkpoint):
    """kill -9 while it starts, encodes, answers and writes: the answers are those of an uninterrupted run."""
    save(media / "q.jsonl", rows())
    run(out="whole.jsonl")
    command = [sys.executable, "-m", "llamavid_jax.commands.batch", "--in", "q.jsonl", "--out", "a.jsonl"]
    command += ["--model", checkpoint, "--dtype", "float32", "--max-new-tokens", "8", "--batch-tokens", "1"]
    env = environment(1) | {"PYTHONPATH": str(ROOT)}
    rng, seen = random.Random(7), b""
    for number in range(5):
        process = subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL)
        wanted = 2 * number  # lines in the file before the kill
        while process.poll() is None and (media / "a.jsonl").exists() * _lines(media / "a.jsonl") < wanted:
            time.sleep(0.002)
        time.sleep(rng.random() * (0.02 if wanted else 2.0))
        process.send_signal(signal.SIGKILL)
        process.wait()
        now = (media / "a.jsonl").read_bytes() if (media / "a.jsonl").exists() else b""
        whole = seen[: seen.rfind(b"\n") + 1]
        assert now.startswith(whole), "a finished answer is lost"
        seen = now
        if number == 2:
            with (media / "a.jsonl").open("ab") as file:  # as if killed within a line
                file.write(b'{"id": "3-')
    assert subprocess.run(command, env=env, stderr=subprocess.DEVNULL).returncode == 0
    assert (media / "a.jsonl").read_bytes().startswith(seen[: seen.rfind(b"\n") + 1])
    assert read(media / "a.jsonl") == read(media / "whole.jsonl")


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0
