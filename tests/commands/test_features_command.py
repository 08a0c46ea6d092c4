"""`llamavid-features` as users run it."""

import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from clips import index_frame, write_clip
from paths import ROOT
from training_data import commands_together, environment

from llamavid_jax import LLaMAVIDLlavaForConditionalGeneration, LLaMAVIDLlavaImageProcessor
from llamavid_jax.commands import features, infer
from llamavid_jax.data import validate
from llamavid_jax.media.feature_file import FeatureWriter
from llamavid_jax.media.features import describe, iter_features, read_header
from llamavid_jax.text.subtitles import Cue


@pytest.fixture
def write(checkpoint, capsys):
    """Runs the command in this process; returns the exit code and stderr."""

    def run(*arguments: object) -> tuple[int, str]:
        code = features.main([*map(str, arguments), "--model", checkpoint])
        out, err = capsys.readouterr()
        assert out == ""
        return code, err

    return run


@pytest.fixture
def clips(tmp_path):
    folder = tmp_path / "clips"
    (folder / "deep").mkdir(parents=True)
    write_clip(folder / "a.mp4", [index_frame(i) for i in range(5)], rate=1)
    write_clip(folder / "deep" / "a.mkv", [index_frame(i) for i in range(40)], rate=1)
    (folder / "b.mp4").write_bytes(b"no video")
    (folder / "notes.txt").write_text("not ours")
    return folder


def test_a_folder(write, clips, checkpoint, tmp_path):
    """Complete files are skipped, failures are named, and the features are the tower's."""
    out = tmp_path / "out"
    code, err = write(clips, "--out", out)
    assert code == 1 and err.splitlines()[-1] == f"1 of 3 videos failed; {out / 'failures.jsonl'} names them"
    lines = [json.loads(line) for line in (out / "failures.jsonl").read_text().splitlines()]
    assert [line["video"] for line in lines] == [str(clips / "b.mp4")] and "is not a video" in lines[0]["error"]
    names = sorted(str(path.relative_to(out)) for path in out.rglob("*.safetensors"))
    assert names == ["a.mp4.safetensors", "deep/a.mkv.safetensors"]

    path = out / "deep" / "a.mkv.safetensors"
    model = LLaMAVIDLlavaForConditionalGeneration.from_pretrained(checkpoint)
    pixels, times = LLaMAVIDLlavaImageProcessor(56).video_pixels(clips / "deep" / "a.mkv")
    found, said = np.stack(list(iter_features(path, keep_cls=True))), describe(path)
    np.testing.assert_array_equal(found, model.vision_features(pixels))
    assert said["timestamps"] == times.tolist() and said["tower"]["sha256"] == model.tower.rounded()
    assert said["source"]["name"] == "a.mkv" and said["sampling"] == {"fps": 1.0, "rule": "stride", "seconds": 40.0}
    assert said["source"]["bytes"] == (clips / "deep" / "a.mkv").stat().st_size

    before = path.stat().st_mtime_ns
    shutil.copy(clips / "a.mp4", clips / "b.mp4")
    code, err = write(clips, "--out", out)
    assert code == 0 and err.count("there already") == 2 and "b.mp4: 5 frames" in err
    assert not (out / "failures.jsonl").exists() and path.stat().st_mtime_ns == before


def test_what_has_changed_or_is_damaged_is_made_again(write, clips, tmp_path):
    out, clip = tmp_path / "out", clips / "a.mp4"
    path = out / "a.mp4.safetensors"

    def made(*options: object) -> bool:
        code, err = write(clip, "--out", out, *options)
        assert code == 0 and len(list(iter_features(path))) == read_header(path).frames
        return "there already" not in err

    assert made() and not made()
    assert made("--int8") and not made("--int8") and 0 < describe(path)["error"]["relative"] < 0.02
    assert made("--fps", 0.5) and read_header(path).frames == 3
    assert made("--dtype", "float32") and describe(path)["dtype"] == "F16"
    write_clip(clip, [index_frame(i + 9) for i in range(5)], rate=1)
    assert made("--dtype", "float32")
    path.write_bytes(path.read_bytes()[:-1])
    assert made("--dtype", "float32") and not made("--dtype", "float32")


def test_what_is_said(write, clips, tmp_path):
    """`inputs` holds the film's subtitles and is written again when they change."""
    srt = clips / "a.srt"
    srt.write_text('1\n00:00:00,500 --> 00:00:01,500\nWho\'s "there"?\n')
    path = tmp_path / "a.mp4.safetensors"
    for words in ('Who\'s "there"?', "Nobody."):
        srt.write_text(f"1\n00:00:00,500 --> 00:00:01,500\n{words}\n")
        assert "5 frames" in write(clips / "a.mp4", "--out", tmp_path, "--subtitles")[1]
        assert read_header(path).inputs == f"<image><image>{words}<image><image><image>"
    assert "5 frames" in write(clips / "a.mp4", "--out", tmp_path)[1] and read_header(path).inputs is None
    srt.rename(clips / "a.SRT")
    err = write(clips / "a.mp4", clips / "deep", "--out", tmp_path, "--subtitles")[1]
    assert "1 of 2 videos have no .srt, .vtt, .ass of their name beside them" in err
    assert read_header(path).inputs == "<image><image>Nobody.<image><image><image>"


def test_much_that_is_said_between_few_frames(write, clips, tmp_path):
    cues = [
        f'00:00:{i // 1000:02},{i % 1000:03} --> 00:00:{i // 1000:02},{i % 1000:03}\n"{i}"\n\n' for i in range(4000)
    ]
    (clips / "a.srt").write_text("".join(cues))
    assert write(clips / "a.mp4", "--out", tmp_path, "--subtitles", "--fps", 0.2)[0] == 0
    assert read_header(tmp_path / "a.mp4.safetensors").inputs == "<image>" + " ".join(f'"{i}"' for i in range(4000))
    assert "there already" in write(clips / "a.mp4", "--out", tmp_path, "--subtitles", "--fps", 0.2)[1]


def test_what_is_heard(write, clips, tmp_path, monkeypatch):
    """Speech is transcribed if a video has no subtitle file, once per model; a video without sound works too."""
    heard = []

    def film_speech(video, model):
        heard.append((video.name, model))
        return [Cue(1.5, f"by {model}")]

    path, given = tmp_path / "a.mp4.safetensors", (clips / "a.mp4", "--out", tmp_path)
    monkeypatch.setitem(sys.modules, "faster_whisper", SimpleNamespace(WhisperModel=lambda *_, **__: None))
    assert "a.mp4 holds no sound" in write(*given, "--transcribe")[1] and read_header(path).inputs == "<image>" * 5
    monkeypatch.setattr(features, "film_speech", film_speech)
    for model in ("tiny", "tiny", "base"):
        assert write(*given, "--transcribe", model)[0] == 0
        assert read_header(path).inputs == f"<image><image>by {model}<image><image><image>"
    assert heard == [("a.mp4", "tiny"), ("a.mp4", "base")]
    (clips / "a.srt").write_text("1\n00:00:00,500 --> 00:00:01,500\nHello.\n")
    write(*given, "--transcribe", "--subtitles")
    assert len(heard) == 2 and read_header(path).inputs == "<image><image>Hello.<image><image><image>"


def test_shards_share_the_work(write, clips, tmp_path):
    for index in range(2):
        write(clips, "--out", tmp_path / "out", "--shard", f"{index}/2")
    assert len(list((tmp_path / "out").rglob("*.safetensors"))) == 2
    assert sorted(os.listdir(tmp_path / "out")) == ["a.mp4.safetensors", "deep", "failures.1-of-2.jsonl"]


def test_two_processes_share_the_work(write, clips, checkpoint, tmp_path):
    """Their files equal those of one process."""
    (clips / "b.mp4").unlink()
    write(clips, "--out", tmp_path / "one")
    command = [sys.executable, "-m", "llamavid_jax.commands.features", str(clips), "--out", str(tmp_path / "two")]
    said = commands_together([*command, "--model", checkpoint])
    assert all("1/1 " in text for text in said)
    for path in (tmp_path / "one").rglob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()


def tree(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_workers_of_beam_are_given(write, clips, tmp_path, monkeypatch):
    """The worker is picklable and its tasks are JSON; they run in any order and in any working folder."""

    def elsewhere(make, tasks, pipeline, file):
        assert (pipeline, str(file)) == ("pipeline", "out/.outcomes.jsonl")
        make, tasks = pickle.loads(pickle.dumps(make)), json.loads(json.dumps(tasks))
        with monkeypatch.context() as patch:
            patch.chdir("/")
            call = make()
            outcomes = [call(*task) for task in reversed(tasks)]
        yield from reversed(outcomes)

    shutil.copy(clips / "a.mp4", clips / os.fsdecode(b"latin\xe9.mp4"))
    assert write(clips, "--out", tmp_path / "plain", "--subtitles")[0] == 1
    monkeypatch.setattr(features, "beam_options", lambda flags: flags and "pipeline")
    monkeypatch.setattr(features, "beam_map", elsewhere)
    monkeypatch.chdir(tmp_path)
    for word, count in (("5 frames", 2), ("there already", 3)):
        code, err = write("clips", "--out", "out", "--subtitles", "--beam")
        assert code == 1 and err.count(word) == count and "4 of 4 videos have no .srt" in err
        assert err.endswith("1 of 4 videos failed; out/failures.jsonl names them\n")
    assert tree(tmp_path / "out") == tree(tmp_path / "plain")


BEAM = {"threads": "--direct_running_mode=multi_threading", "processes": "--direct_running_mode=multi_processing"}


@pytest.mark.parametrize("workers", BEAM)
def test_beam_writes_the_same(workers, write, clips, tmp_path, monkeypatch):
    """Runs where Beam is installed.  Threads share one model."""
    pytest.importorskip("apache_beam")
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "true")  # for the worker processes
    loads, load = [], features.load_model
    monkeypatch.setattr(features, "load_model", lambda options: loads.append(1) or load(options))
    shutil.copy(clips / "a.mp4", clips / os.fsdecode(b"latin\xe9.mp4"))
    write(clips, "--out", tmp_path / "plain")
    del loads[:]
    code, err = write(clips, "--out", tmp_path / "out", f"--beam=--direct_num_workers=2 {BEAM[workers]}")
    assert code == 1 and "1 of 4 videos failed" in err
    assert tree(tmp_path / "out") == tree(tmp_path / "plain")
    assert len(loads) == (workers == "threads")


def test_beam_absent_is_one_line(write, clips, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam.options.pipeline_options", None)
    code, err = write(clips, "--out", tmp_path / "out", "--beam")
    assert (code, err.count("\n")) == (2, 1) and "pip install apache-beam" in err and not (tmp_path / "out").exists()


def test_infer_and_validate_read_it(write, clips, checkpoint, tmp_path, capsys):
    """The answer from the feature file equals that from the video."""
    write(clips / "a.mp4", "--out", tmp_path, "--dtype", "float32")
    path = tmp_path / "a.mp4.safetensors"
    assert describe(path)["dtype"] == "F16"
    write(clips / "a.mp4", "--out", tmp_path)
    asked = ["--model", checkpoint, "--question", "who?", "--max-new-tokens", "8", "--json"]
    answers = []
    for video in (clips / "a.mp4", path):
        assert infer.main([*asked, "--video", str(video)]) == 0
        answers.append(json.loads(capsys.readouterr().out))
    video, file = ({**answer, "seconds": None, "sampling": None} for answer in answers)
    assert video == file and file["frames"] == 5
    times = [0, 1, 2, 3, 4]
    assert answers[1]["sampling"] == [{"video": str(path), "rule": "stride", "frames": 5, "times": times}]
    talk = [{"from": "human", "value": "<image>\nWho?"}, {"from": "gpt", "value": "Nobody."}]
    (tmp_path / "chat.json").write_text(json.dumps([{"id": "1", "features": path.name, "conversations": talk}]))
    assert validate.main([str(tmp_path / "chat.json"), "--model", checkpoint, "--decode"]) == 0


BAD = {
    "clips/*.webm holds no video": ["clips/*.webm"],
    "clips/deep/none holds no video": ["clips/deep/none"],
    "would both be written to a.mp4.safetensors": ["clips/a.mp4", "clips/deep/x/a.mp4"],
    "--fps is 0.0; give a number above 0": ["clips", "--fps", "0"],
    "--shard is '2/2'; give I/N": ["clips", "--shard", "2/2"],
    "--shard is 'a'; give I/N": ["clips", "--shard", "a"],
    "--shard names the part that --distributed finds out": ["clips", "--shard", "0/2", "--distributed"],
    "--beam shares the work among its own workers": ["clips", "--beam", "--shard", "0/2"],
    "give it or --shard and --distributed": ["clips", "--beam", "--distributed"],
    "--beam is 'clips'; give the pipeline's options": ["clips/a.mp4", "--beam", "clips"],
    "--coordinator, --processes and --process go together": ["clips", "--processes", "2"],
    "cannot be written to": ["clips/a.mp4", "--out", "clips/notes.txt"],
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message, write, clips, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (clips / "deep" / "x").mkdir()
    (clips / "deep" / "none").mkdir()
    write_clip(clips / "deep" / "x" / "a.mp4", [index_frame(1)], rate=1)
    code, err = write("--out", "out", *BAD[message])
    assert code == 2 and err.startswith("llamavid-features: ") and message in err and err.count("\n") == 1


def test_a_file_that_is_not_there_costs_itself_alone(write, clips, tmp_path):
    code, err = write(clips / "nothing.mp4", clips / "a.mp4", "--out", tmp_path)
    assert code == 1 and "nothing.mp4 does not exist" in err and "5 frames" in err


def test_patterns(clips):
    assert [*features.find_videos([f"{clips}/**/*.mkv", f"{clips}/a.*4"])] == ["a.mkv.safetensors", "a.mp4.safetensors"]


def test_a_run_that_is_broken_off_leaves_whole_files_alone(write, clips, tmp_path, monkeypatch):
    def stop(*_, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(FeatureWriter, "commit", stop)
    assert write(clips / "a.mp4", "--out", tmp_path / "out")[0] == 130
    assert os.listdir(tmp_path / "out") == []


def test_killed_at_random_moments(write, clips, checkpoint, tmp_path):
    """kill -9 leaves only complete files, which are not made again; in the end no temporary files remain."""
    (clips / "b.mp4").unlink()
    shutil.copy(clips / "deep" / "a.mkv", clips / "c.mkv")
    write(clips, "--out", tmp_path / "whole")
    out, rng, seen = tmp_path / "out", random.Random(5), {}
    command = [sys.executable, "-m", "llamavid_jax.commands.features", str(clips), "--out", str(out)]
    command += ["--model", checkpoint]
    for wanted in (".*.part", "a*.safetensors", "nothing"):
        process = subprocess.Popen(command, env=environment(1), cwd=ROOT, stderr=subprocess.DEVNULL)
        while process.poll() is None and not list(out.rglob(wanted)):
            time.sleep(0.002)
        time.sleep(rng.random() * 0.02)
        process.kill()
        process.wait()
        assert all(path.stat().st_mtime_ns == time_ for path, time_ in seen.items())
        seen = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
        for path in seen:
            assert path.read_bytes() == (tmp_path / "whole" / path.relative_to(out)).read_bytes()
    assert sorted(file.name for file in out.rglob("*.*")) == [
        f"{name}.safetensors" for name in ("a.mkv", "a.mp4", "c.mkv")
    ]


def test_help_needs_no_model():
    code = [sys.executable, "-m", "llamavid_jax.commands.features", "--help"]
    done = subprocess.run(code, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--int8" in done.stdout and done.stderr == ""
