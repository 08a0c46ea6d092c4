"""Shards: what goes in comes out, by index and in every process; what is incomplete or damaged says so."""

import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from clips import index_frame, write_clip
from damage import assert_told_or_harmless
from paths import ROOT
from PIL import Image

from llamavid_jax.data import build_shards
from llamavid_jax.data.beam import LOCAL
from llamavid_jax.data.build_shards import build
from llamavid_jax.data.record import DataError
from llamavid_jax.data.records import read_records
from llamavid_jax.data.shards import MediaHeader, read_shards
from llamavid_jax.errors import InputError

TURNS = [{"from": "human", "value": "<image>\nWas ist „é“?"}, {"from": "gpt", "value": "Ein Buchstabe."}]
SAMPLES = [
    {"id": "picture", "image": "folder/a.jpg", "conversations": TURNS},
    {"id": "clip", "video": "clip.mp4", "conversations": TURNS},
    {"id": "gone", "image": "gone.jpg", "conversations": TURNS},
    {"id": "text", "conversations": TURNS},
    {"id": "movie", "video": "movie.npz", "conversations": TURNS},
    {"id": "no picture", "image": "text.png", "conversations": TURNS},
]
BROKEN = {"gone": "does not exist", "no picture": "is not a picture"}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A JSON file of six samples, two of them broken, beside its media."""
    folder = tmp_path_factory.mktemp("source")
    (folder / "folder").mkdir()
    Image.fromarray(index_frame(5)).save(folder / "folder" / "a.jpg")
    write_clip(folder / "clip.mp4", [index_frame(i) for i in range(30)], rate=10)
    np.savez(folder / "movie.npz", feats=np.ones((3, 17, 8), np.float16), inputs="Subtitles <image>")
    (folder / "text.png").write_text("no picture")
    (folder / "set.json").write_text(json.dumps(SAMPLES))
    return folder / "set.json"


@pytest.fixture(scope="module")
def shards(source, tmp_path_factory) -> Path:
    """The same data as shards of one sample each."""
    folder = tmp_path_factory.mktemp("shards") / "set"
    build(source, folder, max_broken=0.5, shard_bytes=1)
    return folder


def test_samples_and_bytes_come_back_in_order(source, shards):
    records = [record for record in read_records(source) if record.id not in BROKEN]
    found = read_shards(shards)
    assert [record.id for record in found] == ["picture", "clip", "text", "movie"]
    for record, shard_record in zip(records, found, strict=True):
        assert shard_record.conversations == record.conversations
        assert shard_record.kind == record.kind
        assert shard_record.data == (Path(record.media).read_bytes() if record.media else None)
    assert [record.media for record in found] == ["folder/a.jpg", "clip.mp4", None, "movie.npz"]
    assert found[-1] == found[3]
    with pytest.raises(IndexError):
        found[4]
    with Image.open(io.BytesIO(found[0].data)) as image:
        assert image.size == (160, 32)


def test_outline_has_headers_and_no_media(shards):
    found = [read_shards(shards).outline(index) for index in range(4)]
    assert [header for _, header in found] == [
        MediaHeader(1),
        MediaHeader(30, 10.0),
        MediaHeader(0),
        MediaHeader(3, inputs="Subtitles <image>"),
    ]
    assert [(record.id, record.kind, record.data) for record, _ in found] == [
        ("picture", "image", None),
        ("clip", "video", None),
        ("text", "text", None),
        ("movie", "features", None),
    ]


def test_manifest_counts_and_names_what_is_left_out(source, shards):
    manifest = json.loads((shards / "manifest.json").read_text())
    assert (manifest["samples"], manifest["frames"]) == (4, 34)
    media = [source.parent / name for name in ("folder/a.jpg", "clip.mp4", "movie.npz")]
    assert manifest["bytes"] == sum(path.stat().st_size for path in media)
    assert {kind: counts["samples"] for kind, counts in manifest["kinds"].items()} == dict.fromkeys(
        ("image", "video", "text", "features"), 1
    )
    assert [sample["index"] for sample in manifest["skipped"]] == [2, 5]
    for sample in manifest["skipped"]:
        assert BROKEN[sample["id"]] in sample["reason"]


def test_read_in_another_process_and_without_tensorflow(shards):
    code = "import pickle, sys; s = pickle.load(sys.stdin.buffer); print(s[1].id, 'tensorflow' in sys.modules)"
    opened = read_shards(shards)
    assert opened[1].id == "clip"
    done = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(opened), capture_output=True, cwd=ROOT)
    assert (done.stdout.decode().split(), done.stderr.decode()) == (["clip", "False"], "")


def test_too_many_broken_samples_leave_no_folder(source, tmp_path):
    with pytest.raises(InputError, match=r"2 of the first 6 samples cannot be used.*gone\.jpg"):
        build(source, tmp_path / "out", max_broken=0.3)
    assert not list(tmp_path.iterdir())


def test_built_again_is_the_same_and_another_source_is_refused(source, shards, tmp_path, capsys):
    before = {path: path.stat().st_mtime_ns for path in shards.iterdir()}
    assert build_shards.main([str(source), str(shards)]) == 0
    assert (
        "was complete already: 4 samples (1 features, 1 image, 1 text, 1 video), 2 skipped" in capsys.readouterr().out
    )
    assert before == {path: path.stat().st_mtime_ns for path in shards.iterdir()}
    (tmp_path / "other.json").write_text(json.dumps(SAMPLES[:1]))
    assert build_shards.main([str(tmp_path / "other.json"), str(shards)]) == 2
    assert "another set.json" in capsys.readouterr().err


def test_built_again_of_other_media_is_refused(source, shards, tmp_path, capsys):
    """In another media folder the same JSON names other files; another spelling of the same folder is accepted."""
    assert build_shards.main([str(source), str(shards), "--media", f"{source.parent}/folder/.."]) == 0
    capsys.readouterr()
    assert build_shards.main([str(source), str(shards), "--media", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"shards of the media in {source.parent}, not {tmp_path};" in error and error.count("\n") == 1


def test_killed_build_leaves_nothing_readable_and_the_next_one_completes(source, tmp_path):
    out, stop = tmp_path / "out", tmp_path / "written"
    code = f"""
import pathlib, time
from llamavid_jax.data import build_shards, shard_builder
write = shard_builder.PlannedShard.__call__
def stall(self):
    for number, example in write(self):
        if example["id"] == "text":
            pathlib.Path({str(stop)!r}).touch()
            time.sleep(3600)
        yield number, example
shard_builder.PlannedShard.__call__ = stall
build_shards.build({str(source)!r}, {str(out)!r}, max_broken=0.5, shard_bytes=1)
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    deadline = time.monotonic() + 1200
    while not stop.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    with pytest.raises(InputError, match="another build"):
        build(source, out, max_broken=0.5)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert stop.exists() and not out.exists() and (tmp_path / "out.incomplete").exists()
    assert list((tmp_path / "out.incomplete").rglob("*-00000-of-*"))  # killed while writing
    for folder in tmp_path.rglob("*"):
        with pytest.raises(DataError, match=r"no complete folder|cannot be read"):
            read_shards(folder)
    assert build(source, out, max_broken=0.5)["samples"] == 4
    assert {path.name for path in tmp_path.iterdir()} == {"out", "written"}
    assert len(read_shards(out)) == 4


@pytest.mark.parametrize("damage", ["cut", "absent", "flipped"])
def test_damaged_shard_is_named(shards, tmp_path, damage):
    for path in shards.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    file = tmp_path / "llamavid-train.array_record-00001-of-00004"
    content = bytearray(file.read_bytes())
    if damage == "absent":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    else:
        middle = 400  # within the clip's bytes
        content[middle : middle + 8] = bytes(255 - value for value in content[middle : middle + 8])
        file.write_bytes(content)
    with pytest.raises(DataError, match=f"{file}.*(damaged|absent|says).*copy the folder again"):
        read_shards(tmp_path)[1]
    if damage == "flipped":
        assert read_shards(tmp_path)[0].id == "picture"  # the other shards are intact


def test_a_flipped_bit_of_shards(shards, tmp_path):
    """In any file: samples, outlines and descriptions.  Most bytes of a small shard are padding."""
    shutil.copytree(shards, tmp_path / "set")

    def read() -> dict[str, np.ndarray]:
        found = read_shards(tmp_path / "set")
        samples = [(found[index], *found.outline(index)) for index in range(len(found))]
        return {"samples": np.array(repr(samples))}

    assert_told_or_harmless(tmp_path / "set", read, least=20)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("features.json", lambda values: values | {"pythonClassName": "evil.X"}, "describes other fields"),
        ("features.json", lambda values: [], "cannot be read"),
        ("manifest.json", lambda values: values | {"samples": "4"}, "samples is no int"),
        ("manifest.json", lambda values: values | {"files": [1]}, "files is no dict"),
        ("manifest.json", lambda values: values | {"files": {"../x": 1}}, "lists the file '../x'"),
        ("manifest.json", lambda values: values | {"format_version": [2]}, "has format version"),
        ("manifest.json", lambda values: [], "cannot be read"),
    ],
)
def test_damaged_descriptions(shards, tmp_path, name, change, message):
    """tensorflow-datasets imports the modules that features.json names, so only what a build writes is accepted."""
    shutil.copytree(shards, tmp_path / "copy")
    file = tmp_path / "copy" / name
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    manifest = tmp_path / "copy" / "manifest.json"
    if name != "manifest.json":  # an attacker could change the manifest, too
        values = json.loads(manifest.read_text())
        values["files"][name] = file.stat().st_size
        manifest.write_text(json.dumps(values))
    with pytest.raises(DataError, match=message):
        read_shards(tmp_path / "copy")


def test_other_folder_is_left_alone(source, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="holds no complete shards"):
        build(source, tmp_path, max_broken=0.5)
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_beam_writes_the_same(tmp_path):
    """Runs where Beam is installed: it needs older versions of some packages than requirements.lock has."""
    pytest.importorskip("apache_beam")
    (tmp_path / "set.json").write_text(json.dumps([{"id": str(i), "conversations": TURNS} for i in range(23)]))
    # two samples a shard, the last one shorter; tfds confuses the order of ten or more shards
    manifests = [
        build(tmp_path / "set.json", tmp_path / name, beam=beam, shard_bytes=750)
        for name, beam in (("plain", None), ("beam", LOCAL))
    ]
    assert len([name for name in manifests[1]["files"] if "train" in name]) == 12
    assert manifests[0]["files"].keys() == manifests[1]["files"].keys()
    assert list(read_shards(tmp_path / "beam")) == list(read_shards(tmp_path / "plain"))


def test_beam_absent_is_one_line(source, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    monkeypatch.setitem(sys.modules, "apache_beam.options.pipeline_options", None)
    assert build_shards.main([str(source), str(tmp_path / "out"), "--beam"]) == 2
    assert capsys.readouterr().err == "error: --beam needs Apache Beam; install it with: pip install apache-beam\n"
    assert not list(tmp_path.iterdir())


def test_names_that_utf8_cannot_hold(tmp_path):
    """Names are stored with escapes; files are found by their real names, and missing ones are listed."""
    file = os.fsdecode(b"latin\xe9.jpg")
    Image.fromarray(index_frame(5)).save(tmp_path / file)
    names = {"half \ud83d": file, "whole": file, "gone": "gone\udce9.jpg"}
    samples = [{"id": name, "image": image, "conversations": TURNS} for name, image in names.items()]
    (tmp_path / "set.json").write_text(json.dumps(samples))
    manifest = build(tmp_path / "set.json", tmp_path / "set", max_broken=0.5)
    assert [sample["id"] for sample in manifest["skipped"]] == ["gone"]
    assert json.loads((tmp_path / "set" / "manifest.json").read_text())["skipped"] == manifest["skipped"]
    found = [(record.id, record.media) for record in read_records(tmp_path / "set")]
    assert found == [(r"half \ud83d", r"latin\udce9.jpg"), ("whole", r"latin\udce9.jpg")]
    assert read_records(tmp_path / "set")[0].data == (tmp_path / file).read_bytes()
