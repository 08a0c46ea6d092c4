"""Loading: every sample once, each process its own rows, exact positions, broken samples by name, worker processes."""

import dataclasses
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from paths import GOLDEN, ROOT
from PIL import Image

from llamavid_jax.data.build_shards import build
from llamavid_jax.data.examples import ExampleReader
from llamavid_jax.data.loader import FrameLayout, Loader
from llamavid_jax.data.record import DataError
from llamavid_jax.data.records import read_records
from llamavid_jax.data.sizes import read_sizes
from llamavid_jax.media.feature_file import Description, FeatureWriter
from llamavid_jax.shapes import RowShape
from llamavid_jax.text.qformer_tokenizer import QFormerTokenizer
from llamavid_jax.text.tokenizer import load_tokenizer

FRAMES = {"pixels": FrameLayout((8, 8, 3), np.uint8), "features": FrameLayout((4, 6), np.float16)}
SHAPES = [RowShape(frames=4, pairs=4, questions=4, tokens=256), RowShape(frames=0, pairs=0, questions=0, tokens=192)]
SETTINGS = {"batch_size": 4, "question_tokens": 16, "seed": 5, "packing": True}


def write_data(folder: Path, samples: int = 30) -> Path:
    """Writes texts, images and features in turn; each answer names its sample."""
    random = np.random.default_rng(0)
    rows = []
    for number in range(samples):
        row = {"id": f"sample{number}"}
        question = "What is it?" + " Look again." * int(random.integers(6))
        if number % 3 == 1:
            row["image"] = f"{number}.png"
            Image.fromarray(np.full((12, 12, 3), number, np.uint8)).save(folder / row["image"])
        if number % 3 == 2:
            row["video"] = f"{number}.npz"
            np.savez(folder / row["video"], feats=np.full((1 + number % 7, 4, 6), number, np.float16))
        place = "<image>\n" if number % 3 else ""
        row["conversations"] = [
            {"from": "human", "value": place + question},
            {"from": "gpt", "value": f"Number {number}."},
        ]
        rows.append(row)
    path = folder / "data.json"
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture(scope="module")
def reader():
    return ExampleReader(load_tokenizer(GOLDEN / "text"), "imgsp_v1", 8, "pad", 2, 1.0, 0)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


def make_loader(path, reader, **settings) -> Loader:
    records = read_records(path)
    qformer_tokenizer = QFormerTokenizer(GOLDEN / "short_video_mean" / "qformer_tokenizer")
    sizes = read_sizes(records, reader)
    return Loader(records, sizes, reader, qformer_tokenizer, SHAPES, FRAMES, **SETTINGS | settings)


def in_another_form(path: Path, kind: str) -> Path:
    """The same data with features of `kind`: a dtype of the feature file, or "pkl", the original's pickle."""
    rows = json.loads(path.read_text())
    for row in rows:
        if row.get("video") is not None:
            file = path.parent / row["video"]
            feats, row["video"] = (
                np.load(file)["feats"],
                f"{file.stem}-{kind}.{'pkl' if kind == 'pkl' else 'safetensors'}",
            )
            if kind == "pkl":
                (path.parent / row["video"]).write_bytes(pickle.dumps({"feats": feats}))
            else:
                write_features(path.parent / row["video"], feats, kind)
    path = path.with_name(f"{kind}.json")
    path.write_text(json.dumps(rows))
    return path


def write_features(path: Path, feats: np.ndarray, dtype: str) -> None:
    writer = FeatureWriter(path, len(feats), dtype)
    for frame in feats:
        writer.add(frame)
    times, sampling = [float(number) for number in range(len(feats))], {"fps": 1.0, "rule": "stride", "seconds": 9.0}
    writer.commit(Description(False, times, {"name": "a"}, sampling, {"size": 8}, {"sha256": "b"}))


@pytest.mark.parametrize("kind", ["BF16", "F16", "F32", "I8", "pkl"])
def test_features_of_every_form_are_one(data, reader, kind):
    assert_equal(list(make_loader(in_another_form(data, kind), reader)), list(make_loader(data, reader)))


def ids_of(batches) -> list[str]:
    return [name for batch in batches for row in batch.ids for name in row]


def assert_equal(ours, theirs):
    assert [batch.ids for batch in ours] == [batch.ids for batch in theirs]
    for one, other in zip(ours, theirs, strict=True):
        for name, a, b in zip(one.batch._fields, one.batch, other.batch, strict=True):
            np.testing.assert_array_equal(a, b, err_msg=name)


def test_an_epoch_holds_every_sample_once(data, reader):
    batches = list(make_loader(data, reader))
    assert sorted(ids_of(batches)) == sorted(f"sample{number}" for number in range(30))
    for loaded in batches:
        rows, tokens = loaded.batch.token_ids.shape
        assert (rows, tokens * rows) == (4, loaded.slots)
        assert loaded.samples == len(ids_of([loaded])) and loaded.skipped == []
        assert loaded.tokens == (loaded.batch.segment_ids > 0).sum()
        assert [max(segments) for segments in loaded.batch.segment_ids] == [len(row) for row in loaded.ids]
    assert {batch.batch.frames.dtype.name for batch in batches} == {"uint8", "float16"}
    # features of 5 to 7 frames are truncated to the largest bucket, which has room for 4
    assert sum(batch.truncated for batch in batches) == sum(1 + n % 7 > 4 for n in range(2, 30, 3)) > 0


def test_frames_are_those_of_the_rows_samples(data, reader):
    for loaded in make_loader(data, reader):
        for names, frames in zip(loaded.ids, loaded.batch.frames, strict=True):
            numbers = {int(name.removeprefix("sample")) for name in names}
            assert set(np.unique(frames).tolist()) - {0} == {number for number in numbers if number % 3}


def test_more_frames_than_the_header_says_take_no_room_of_others(tmp_path, reader):
    write_data(tmp_path)
    rows = [row for row in json.loads((tmp_path / "data.json").read_text()) if row["id"] in ("sample8", "sample29")]
    (tmp_path / "data.json").write_text(json.dumps(rows))  # two frames each
    loader = make_loader(tmp_path / "data.json", reader, batch_size=1)
    planned = dataclasses.replace(loader.schedule.sizes, frames=np.array([1, 1], np.int32))
    shapes = [RowShape(frames=2, pairs=2, questions=2, tokens=256)]
    (loaded,) = Loader(
        read_records(tmp_path / "data.json"), planned, reader, loader._read.qformer_tokenizer, shapes, FRAMES,
        **SETTINGS | {"batch_size": 1},
    )  # fmt: skip
    assert sorted(np.unique(loaded.batch.frames).tolist()) == [8, 29]


def test_epochs_and_steps(data, reader):
    two = make_loader(data, reader, epochs=2)
    names = ids_of(two)
    assert two.steps == len(list(two)) and len(names) == 60 and set(names[:30]) == set(names[30:])
    assert names[:30] != names[30:]
    assert_equal(list(make_loader(data, reader, steps=3)), list(two)[:3])
    assert len(list(make_loader(data, reader, steps=11))) == 11


def test_rows_of_all_processes_are_those_of_one(data, reader):
    whole = list(make_loader(data, reader))
    for rows in ([0, 3], [1, 2]):  # rows of one process, on whichever devices
        part = list(make_loader(data, reader, rows=rows))
        for loaded, own in zip(whole, part, strict=True):
            assert own.ids == [loaded.ids[row] for row in rows]
            for all_rows, these in zip(loaded.batch, own.batch, strict=True):
                np.testing.assert_array_equal(all_rows[rows], these)


@pytest.mark.parametrize("threads", [0, 3])
def test_position_is_exact(data, reader, threads):
    loader = make_loader(data, reader, epochs=2, threads=threads)
    batches, states = [], [loader.get_state()]
    for batch in loader:
        batches.append(batch)
        states.append(json.loads(json.dumps(loader.get_state())))
    for done in (0, 1, len(batches) - 1, len(batches)):
        resumed = make_loader(data, reader, epochs=2, threads=threads)
        resumed.set_state(states[done])
        assert resumed.get_state() == states[done]
        assert_equal(list(resumed), batches[done:])
    assert_equal(list(loader), batches)  # a new pass starts at the beginning, as for a list


def test_position_holds_on_other_processes(data, reader):
    whole = list(make_loader(data, reader))
    loader = make_loader(data, reader)
    next(iter(loader))
    half = make_loader(data, reader, rows=[2, 3])
    half.set_state(loader.get_state())
    assert [batch.ids for batch in half] == [batch.ids[2:] for batch in whole[1:]]


def test_position_in_other_data_is_refused(data, reader):
    state = make_loader(data, reader).get_state()
    with pytest.raises(DataError, match="the saved position is in another order"):
        make_loader(data, reader, seed=6).set_state(state)


def test_worker_processes(data, reader):
    """They give the same rows as threads, also after resuming.  Runs as a script, since workers import the main module.

    A signal to the process group, such as Ctrl-C, does not stop the workers.
    """
    code = f"""
import os, signal, sys; sys.path[:0] = [{str(ROOT / "tests")!r}, {str(ROOT / "tests" / "data")!r}]
if __name__ == "__main__":
    import test_loader as t
    reader = t.ExampleReader(t.load_tokenizer(t.GOLDEN / "text"), "imgsp_v1", 8, "pad", 2, 1.0, 0)
    here, there = (t.make_loader({str(data)!r}, reader, processes=n) for n in (0, 2))
    batches = list(here)
    passes = iter(here); next(passes), next(passes)
    there.set_state(here.get_state())
    seen = iter(there)
    first = next(seen)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
        os.killpg(0, number)
    t.assert_equal([first, *seen], batches[2:])
    print("equal")
"""
    script = data.parent / "workers.py"
    script.write_text(code)
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, env=environment, timeout=1200, start_new_session=True
    )
    assert done.stdout.strip() == "equal", done.stderr[-3000:]


def test_a_broken_sample_leaves_its_room_empty(tmp_path, reader):
    path = write_data(tmp_path)
    whole = list(make_loader(path, reader))
    (tmp_path / "4.png").write_bytes(b"no picture")  # found when read: an image's size is known without opening it
    (tmp_path / "5.npz").unlink()  # found when measured
    np.savez(tmp_path / "8.npz", feats=np.zeros((2, 9, 6), np.float16))
    sizes = read_sizes(read_records(path), reader)
    assert [broken["id"] for broken in sizes.broken] == ["sample5"]
    assert "5.npz" in sizes.broken[0]["reason"]
    batches = list(make_loader(path, reader))
    skipped = [one for batch in batches for one in batch.skipped]
    assert sorted(one["id"] for one in skipped) == ["sample4", "sample8"]
    assert any("4.png" in one["reason"] for one in skipped)
    assert any("(9, 6)" in one["reason"] and "(4, 6)" in one["reason"] for one in skipped)
    assert set(ids_of(whole)) - set(ids_of(batches)) == {"sample4", "sample5", "sample8"}


def test_a_broken_record_is_named_by_its_place(tmp_path, reader):
    rows = json.loads(write_data(tmp_path, 6).read_text())
    rows[4]["conversations"] = None
    (tmp_path / "data.json").write_text(json.dumps(rows))
    loader = make_loader(tmp_path / "data.json", reader)
    (broken,) = loader.schedule.sizes.broken
    assert broken["id"] == "record 4" and "give a list of turns" in broken["reason"]
    assert len(ids_of(loader)) == 5


def test_shards_are_measured_without_their_media(tmp_path, reader, monkeypatch):
    path = write_data(tmp_path, 6)
    build(path, tmp_path / "shards")
    sizes = read_sizes(read_records(path), reader)
    batches = list(make_loader(path, reader))
    shards = read_records(tmp_path / "shards")
    assert_equal(list(make_loader(tmp_path / "shards", reader)), batches)
    monkeypatch.setattr(type(shards), "__getitem__", None)
    assert read_sizes(shards, reader).fingerprint() == sizes.fingerprint()


def test_other_errors_name_the_sample(data, reader):
    loader = make_loader(data, reader)

    def fail(*_):
        raise ZeroDivisionError("no such case")

    loader._read.reader = type("Failing", (), {"read": staticmethod(fail), "tokens_per_frame": 2})()
    with pytest.raises(RuntimeError, match=r"sample sample\d+ cannot be read: ZeroDivisionError: no such case"):
        list(loader)


def test_sizes_are_cached_until_something_changes(tmp_path, reader, monkeypatch):
    path, cache = write_data(tmp_path), tmp_path / "run" / "sizes.npz"
    (tmp_path / "5.npz").rename(tmp_path / "away.npz")
    measured = []
    size = ExampleReader.size
    monkeypatch.setattr(ExampleReader, "size", lambda self, *record: measured.append(record[1]) or size(self, *record))

    def read(reader=reader, media="", **options):
        measured.clear()
        return read_sizes(read_records(path, media), reader, path, cache, **options)

    first = read()
    assert sorted(measured) == list(range(30)) and [one["id"] for one in first.broken] == ["sample5"]
    again = read()
    assert measured == [5] and len(again.broken) == 1 and again.fingerprint() == first.fingerprint()
    (tmp_path / "away.npz").rename(tmp_path / "5.npz")  # the missing file is back; a resumed run ignores it
    resumed = read(retry=False)
    assert measured == [] and resumed.broken == first.broken and resumed.fingerprint() == first.fingerprint()
    whole = read()
    assert measured == [5] and len(whole.broken) == 0 and whole.fingerprint() != first.fingerprint()
    assert read().fingerprint() == whole.fingerprint() and measured == []
    np.savez(tmp_path / "8.npz", feats=np.zeros((9, 4, 6), np.float16))  # made again, with other frames
    read(retry=False)
    assert measured == []
    assert read().frames[8] == 9 and measured == [8]

    read(ExampleReader(reader.tokenizer, "imgsp_v1", 8, "pad", 2, 2.0, 0))
    assert len(measured) == 30
    cache.write_bytes(cache.read_bytes()[:100])
    read()
    assert len(measured) == 30
    (tmp_path / "elsewhere").mkdir()
    read(media=tmp_path / "elsewhere")
    assert len(measured) == 30
    path.write_text(path.read_text() + "\n")
    read()
    assert len(measured) == 30
