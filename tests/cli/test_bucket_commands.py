"""Commands with all their files in an emulated bucket, and their behaviour under its faults."""

import json
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from bucket import NAME, Bucket, emulated
from converted import ORIGINAL, assert_equal, restore, state_dict, tensors
from paths import ROOT
from training_data import command, environment, losses, run, start, write_data, write_tokenizers

from conversion import check, jax_to_torch, merge_lora, torch_to_jax
from llamavid_jax import copies
from llamavid_jax.checkpoints.weights import load_weights
from llamavid_jax.commands import batch, features, goodput, infer
from llamavid_jax.config.schema import LLaMAVIDLlavaConfig
from llamavid_jax.data import build_shards, to_llava, validate
from llamavid_jax.data.records import read_records
from llamavid_jax.evaluation import command as evaluate
from llamavid_jax.media.features import read_header
from llamavid_jax.precompile import compile_check
from train import main as train_main

STAGE2 = "tiny/stage2_instruct.yaml"
SIX = ("training.steps=6", "training.save_every=3")


@pytest.fixture(scope="module")
def disk(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("disk")
    write_data(root / "data set", count=12)
    write_tokenizers(root / "tokenizers")
    return root


@pytest.fixture(scope="module")
def bucket(disk, tmp_path_factory):
    with emulated(tmp_path_factory.mktemp("places")) as bucket, pytest.MonkeyPatch.context() as patch:
        for name, value in bucket.env.items():
            patch.setenv(name, value)
        bucket.put(disk / "data set", "data set")
        bucket.put(disk / "tokenizers", "tokenizers")
        yield bucket


@pytest.fixture(scope="module")
def env(bucket) -> dict[str, str]:
    return environment(1)


def train(place: str, output: str, *extra: str) -> list[str]:
    return command(STAGE2, f"{place}/data set/data.json", f"{place}/tokenizers", output, *SIX, *extra)


@pytest.fixture(scope="module")
def whole(disk, env) -> Path:
    """Six training steps on the local disk, without interruption."""
    run(train(str(disk), str(disk / "whole")), env)
    return disk / "whole"


def load_all(model: Path) -> dict[str, bytes]:
    """The bytes of every weight of a model."""
    params = load_weights(model, LLaMAVIDLlavaConfig.from_pretrained(model), "float32")
    return {path: np.asarray(value).tobytes() for path, value in params.items()}


def until(condition: Callable[[], bool], process) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)


def test_training_goes_on(bucket: Bucket, disk, env, whole):
    """kill -9, bucket faults during a save, kill -9 during the model's upload, and damage do not change the losses."""
    output = f"{bucket.url}/runs/one"
    command = train(bucket.url, output, "training.save_every=1")
    run([*command, "--simulate-fault", "kill@5"], env, -signal.SIGKILL)
    for how in (503, 429, "reset", 2.0):
        bucket.fail("POST .*checkpoints(/|%2F)6", how)
    weights = "POST .*one(/|%2F)model(/|%2F)weights"
    bucket.fail(weights, 1e6, times=10**6)  # these never end
    killed = start(command, env)
    until(lambda: any(re.search(weights, line) for line in bucket.seen), killed)
    killed.kill()
    said = killed.communicate()[0]
    assert re.search(rf"resuming {output} at step [34] of 6", said), said
    assert not any(times for _, _, times in bucket.faults[:4]), "all of them befell it"
    bucket.faults.clear()
    assert bucket.files("runs/one/model") and "config.json" not in bucket.files("runs/one/model")

    largest, content = max(bucket.files("runs/one/checkpoints/6").items(), key=lambda file: len(file[1]))
    damaged = bytearray(content)
    damaged[len(content) // 2] ^= 1
    bucket.store.pipe_file(f"{NAME}/runs/one/checkpoints/6/{largest}", bytes(damaged))
    said = run(command, env)
    assert f"{output}/checkpoints/6 is damaged" in said and f"resuming {output} at step 5 of 6" in said, said
    found = bucket.files("runs/one")
    assert losses(bucket.get("runs/one", disk / "one")) == losses(whole)
    assert load_all(disk / "one" / "model") == load_all(whole / "model")
    assert {"checkpoints/6/commit_success.txt", f"checkpoints/damaged-6/{largest}"} <= found.keys()


def test_a_later_run_takes_over(bucket: Bucket, disk, env):
    """There is no lock for a killed process to leave behind; the older of two runs stops at its next save."""
    output = f"{bucket.url}/runs/two"
    older = start([*train(bucket.url, output, "training.save_every=1"), "--simulate-fault", "slow@1"], env)
    until(lambda: bucket.store.exists(f"{NAME}/runs/two/metrics.jsonl"), older)
    bucket.store.pipe_file(f"{NAME}/runs/two/.owner", b"7 on another\n")  # as a later run does when it starts
    said = older.communicate(timeout=600)[0]
    assert older.returncode == 2 and f"{output} was taken over by another run (7 on another)" in said, said


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("gs://films/three", "gs://films/three/.owner may not be used"),
        ("gs://none/three", "check the name of the bucket"),
        ("s3://films/three", "give gs:// or a folder"),
    ],
)
def test_it_is_said_before_the_hours(bucket: Bucket, env, output, said):
    """A bucket that does not exist or is not writable is reported before the weights are read."""
    if "gs://films" in output:
        bucket.fail("POST .*upload", 403)
    printed = run(train(bucket.url, output), env, code=2)
    assert said in printed and output in printed and len(printed.splitlines()) == 1, printed


@pytest.fixture(scope="module")
def model(bucket, checkpoint) -> str:
    return bucket.put(Path(checkpoint), "a model")


@pytest.fixture
def here(tmp_path, monkeypatch, bucket) -> Iterator[Path]:
    """An empty working folder, in which no command may leave a folder `gs:`; buckets are always checked anew."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(copies, "FRESH", 0.0)
    yield tmp_path
    assert not list(tmp_path.glob("**/gs:*")) and not list(tmp_path.glob("**/*gs:"))


def test_answers(bucket: Bucket, disk, model, here, capsys):
    """infer.py and llamavid-batch give the same answers as from the local disk; llamavid-batch resumes."""
    common = ["--dtype", "float32", "--max-new-tokens", "4"]
    asked = ["--question", "what is the man doing?", *common]
    local = bucket.get("a model", here / "model")
    assert infer.main(["--model", str(local), "--video", str(disk / "data set" / "clip.mp4"), *asked]) == 0
    answer = capsys.readouterr().out
    picture = f"{bucket.url}/out/looked at.png"
    clip = f"{bucket.url}/data set/clip.mp4"
    assert infer.main(["--model", model, "--video", clip, "--evidence", picture, *asked]) == 0
    assert capsys.readouterr().out == answer and bucket.files("out")["looked at.png"].startswith(b"\x89PNG")

    rows = [{"id": str(n), "video": clip, "question": "what is the man doing?"} for n in "ab"]
    bucket.store.pipe_file(f"{NAME}/q.jsonl", "\n".join(map(json.dumps, rows)).encode())
    given = ["--in", f"{bucket.url}/q.jsonl", "--out", f"{bucket.url}/out/a.jsonl", "--model", model, *common]
    assert batch.main(given) == 0
    lines = bucket.files("out")["a.jsonl"].splitlines(keepends=True)
    assert [json.loads(line)["answer"] for line in lines] == [answer.strip()] * 2
    bucket.store.pipe_file(f"{NAME}/out/a.jsonl", lines[0])  # as left by another machine that stopped
    assert batch.main(given) == 0 and "1 of 2 rows are answered already" in capsys.readouterr().err
    assert bucket.files("out")["a.jsonl"] == b"".join(lines)


def test_data(bucket: Bucket, disk, model, here, capsys):
    """Validating a set, building and reading its shards, and making features, all from bucket to bucket."""
    data = f"{bucket.url}/data set/data.json"
    assert validate.main([data, "--json", f"{bucket.url}/out/report.json"]) == 0
    assert json.loads(bucket.files("out")["report.json"])["broken"] == []
    bucket.fail("POST .*upload", 0.0, times=3)
    bucket.fail("POST .*upload", 403)
    assert build_shards.main([data, f"{bucket.url}/shards"]) == 2 and "manifest.json" not in bucket.files("shards")
    assert build_shards.main([data, f"{bucket.url}/shards"]) == 0 and "manifest.json" in bucket.files("shards")
    on_disk, in_bucket = (read_records(path) for path in (disk / "data set" / "data.json", f"{bucket.url}/shards"))
    assert [one.id for one in in_bucket] == [one.id for one in on_disk]
    assert in_bucket[0].data == Path(on_disk[0].media).read_bytes()
    assert in_bucket.outline(1)[1].frames == 75 and validate.main([f"{bucket.url}/shards"]) == 0
    assert build_shards.main([data, f"{bucket.url}/shards"]) == 0
    assert "was complete already" in capsys.readouterr().out.splitlines()[-1]

    given = [f"{bucket.url}/data set", "--model", model, "--out", f"{bucket.url}/features", "--dtype", "float32"]
    assert features.main(given) == 0 and set(bucket.files("features")) == {"clip.mp4.safetensors"}
    assert features.main([f"{bucket.url}/data set/*.mp4", *given[1:]]) == 0
    assert "there already" in capsys.readouterr().err
    assert read_header(f"{bucket.url}/features/clip.mp4.safetensors").frames == 3
    to_llava.main(["split_chat", data, f"{bucket.url}/out/split.json", "--rounds", "1"])
    assert len(json.loads(bucket.files("out")["split.json"])) == 12


def test_shards_beyond_the_copies_are_refused(bucket: Bucket, disk, here, monkeypatch, capsys):
    assert build_shards.main([str(disk / "data set" / "data.json"), f"{bucket.url}/large"]) == 0
    monkeypatch.setenv("LLAMAVID_BUCKETS_SIZE", "0.00001")
    assert validate.main([f"{bucket.url}/large"]) == 2
    assert "more than LLAMAVID_BUCKETS_SIZE: samples are read in any order" in capsys.readouterr().err


def test_conversion_both_ways(bucket: Bucket, here, capsys):
    """Weights are equal bit for bit, and config.json is uploaded last; a failed conversion leaves no files."""
    source = bucket.put(ORIGINAL, "original")
    assert torch_to_jax.main([source, f"{bucket.url}/converted"]) == 0
    written = bucket.store.find(f"{NAME}/converted", detail=True).values()
    assert max(written, key=lambda one: int(one["generation"]))["name"] == f"{NAME}/converted/config.json"
    assert jax_to_torch.main([f"{bucket.url}/converted", f"{bucket.url}/back", "--layout", "original"]) == 0
    assert_equal(restore(bucket.get("converted", here / "converted")), state_dict())
    for name, value in tensors(bucket.get("back", here / "back")).items():
        assert torch.equal(value, state_dict()[name]), name
    assert bucket.env["LLAMAVID_BUCKETS"] not in capsys.readouterr().err
    bucket.fail("POST .*upload", 403)
    assert torch_to_jax.main([source, f"{bucket.url}/failed"]) == 2
    assert not bucket.files("failed") and "gs://films/failed/" in capsys.readouterr().err


def test_what_a_killed_conversion_left(bucket: Bucket, here, env, capsys):
    """After kill -9 during the upload the same command completes it, but refuses a folder that holds other files."""
    out = f"{bucket.url}/killed"
    command = [sys.executable, "-m", "conversion.torch_to_jax", str(ORIGINAL), out]
    before = len(bucket.seen)
    bucket.fail("POST .*upload", 0.0, times=5)
    bucket.fail("POST .*upload", 1e6, times=10**6)  # these never end
    killed = start(command, env | {"LLAMAVID_BUCKETS": str(here / "host")})
    until(lambda: sum("POST /upload" in line for line in bucket.seen[before:]) > 5, killed)
    killed.kill()
    killed.communicate()
    bucket.faults.clear()
    assert 1 < len(bucket.files("killed")) < 6 and "config.json" not in bucket.files("killed")

    bucket.store.pipe_file(f"{NAME}/killed/notes.txt", b"of somebody")
    assert torch_to_jax.main(command[-2:]) == 2 and "exists and is not empty" in capsys.readouterr().err
    bucket.store.rm_file(f"{NAME}/killed/notes.txt")
    assert torch_to_jax.main(command[-2:]) == 0
    assert torch_to_jax.main([str(ORIGINAL), str(here / "whole")]) == 0
    assert load_all(bucket.get("killed", here / "killed")) == load_all(here / "whole")
    assert torch_to_jax.main(command[-2:]) == 2, "it is there now"


COMMANDS = {
    "infer": (infer.main, "--model A --video B.mp4 --question who?"),
    "infer, evidence": (infer.main, "--model {model} --video B.mp4 --evidence A/deep/x.png --question who?"),
    "infer, subtitles": (infer.main, "--model {model} --video B.mp4 --subtitles A.srt --question who?"),
    "batch": (batch.main, "--model A --in B.jsonl --out C.jsonl"),
    "batch, out": (batch.main, "--model {model} --in {data} --out C.jsonl"),
    "features": (features.main, "A B/*.mp4 --model C --out D"),
    "validate": (validate.main, "A.json --media B --model C --json D.json"),
    "build_shards": (build_shards.main, "A.json B --media C"),
    "to_llava": (to_llava.main, "webvid A.csv B.json --media C"),
    "convert": (torch_to_jax.main, "A B --tokenizer C --bert-tokenizer D --vision E --qformer F --projectors G"),
    "back": (jax_to_torch.main, "A B --layout documented"),
    "merge": (merge_lora.main, "A B C"),
    "check": (check.main, "A --expected B.npz"),
    "goodput": (goodput.main, "A B.png"),
    "evaluate": (evaluate.main, "--model A --set gqa --data B --out C"),
    "score": (evaluate.main, "score A"),
    "compare": (evaluate.main, "compare A B --json C.json"),
    "compile": (compile_check.main, "--config A.yaml --topology v5e:1x1"),
    "train": (train_main, "--config A.yaml"),
    "train, output": (
        train_main,
        "--config {config} data.path=A.json start.model=B start.adapter=C output=D training.batch_size=8",
    ),
    "cache": (infer.main, "--model A --video B.mp4 --question who? --cache C"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_no_path_is_missed(bucket: Bucket, model, here, capsys, name):
    """No path exists: the error names an address, and no local folder `gs:` appears (checked by `here`)."""
    main, arguments = COMMANDS[name]
    arguments = re.sub(r"(?<![\w{-])([A-G])\b(?!=)", r"gs://films/none/\1", arguments)
    arguments = [
        argument.format(model=model, data=f"{bucket.url}/q.jsonl", config=ROOT / "configs/tiny/stage2_instruct.yaml")
        for argument in arguments.split()
    ]
    bucket.store.pipe_file(f"{NAME}/q.jsonl", b'{"question": ""}\n')
    code = main(arguments)
    said = capsys.readouterr().err
    assert code in (1, 2) and "gs:" in said.splitlines()[-1] and "Traceback" not in said, said
    assert bucket.env["LLAMAVID_BUCKETS"] not in said
