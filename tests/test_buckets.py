"""Buckets, with an emulator: copies are current, complete and bounded; uploads appear completely or not at all."""

import os
import threading
import time
from pathlib import Path

import pytest
from bucket import NAME, emulated

from llamavid_jax import buckets, copies, uploads
from llamavid_jax.config.recipe import read_recipe
from llamavid_jax.config.schema import LLaMAVIDLlavaConfig, stated_pixels
from llamavid_jax.errors import InputError, OutageError, printable
from llamavid_jax.files import find, local, write_files
from llamavid_jax.media.processor_settings import read_settings


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    monkeypatch.setattr(copies, "_seen", {})
    monkeypatch.setattr(copies, "FRESH", 0.0)
    with emulated(tmp_path / "places") as bucket:
        for name, value in bucket.env.items():
            monkeypatch.setenv(name, value)
        yield bucket


def put(bucket, name: str, content: bytes) -> Path:
    bucket.store.pipe_file(f"{NAME}/{name}", content)
    return local(f"gs://{NAME}/{name}")


@pytest.mark.parametrize("name", ["a.json", "a b/c #1?.json", "Übung/映画 [1]*.json", "50%25.json", "deep/er/a.b.json"])
def test_names(bucket, name):
    """Each name has one local path and one address, whatever its characters, even if pathlib has dropped a slash."""
    path = put(bucket, name, b"[1]")
    address = f"gs://{NAME}/{name}"
    assert find(address) == find(Path(address)) == find(f"{address}/") == path == find(path)
    assert path.read_bytes() == b"[1]" and buckets.url(path) == address
    assert path == find(Path(f"gs://{NAME}") / name)
    write_files(Path(address).parent, {Path(name).name: b"[2]"})
    assert bucket.store.cat_file(f"{NAME}/{name}") == b"[2]"
    with pytest.raises(InputError, match="x is 1"):
        raise InputError("x is 1")
    assert str(InputError(f"{path} is bad")) == f"{address} is bad"


@pytest.mark.parametrize("address", ["gs://a//b", "gs://a/../b", "gs://a/./b", "s3://a/b/.."])
def test_what_is_no_name(address):
    with pytest.raises(InputError, match="write gs://BUCKET"):
        find(address)


@pytest.mark.parametrize("path", ["gs", "a/gs://b", "http://a/b", "gsx://a", ""])
def test_other_paths_stay(path):
    assert local(path) == Path(path) and buckets.url(path) is None and buckets.kvstore(path) is None


def test_the_newest_object(bucket):
    """A changed object is fetched again even if its size is the same; a deleted object's copy is deleted."""
    path = put(bucket, "data/a.json", b"one")
    assert find(path).read_bytes() == b"one" and not path.stat().st_mode & 0o222
    downloads = sum("/download/" in line for line in bucket.seen)
    find(path)
    assert sum("/download/" in line for line in bucket.seen) == downloads, "it is there already"
    put(bucket, "data/a.json", b"two")
    assert find(path).read_bytes() == b"two"
    put(bucket, "data/b.json", b"")
    assert sorted(file.name for file in find(path.parent).iterdir()) == ["a.json", "b.json"]
    bucket.store.rm_file(f"{NAME}/data/a.json")
    assert [file.name for file in find(path.parent).iterdir()] == ["b.json"] and not find(path).exists()
    bucket.store.rm_file(f"{NAME}/data/b.json")
    assert not find(path.parent).exists()


def test_a_folder_without_its_films(bucket):
    """Videos are listed but not fetched; nor are deeper files, a folder of a similar name and an empty "folder"."""
    for name in ("set/a.json", "set/film.mp4", "set/", "set/deep/b.json", "set2/c.json"):
        put(bucket, name, b"1") if not name.endswith("/") else bucket.store.pipe_file(f"{NAME}/{name}", b"")
    folder = find(f"gs://{NAME}/set")
    assert [file.name for file in folder.iterdir()] == ["a.json"]
    assert set(buckets.listing(folder)) == {"a.json", "film.mp4", "deep/b.json"}
    assert buckets.kind(folder) == "directory" and buckets.kind(folder / "film.mp4") == "file"
    copies.fetch_all(folder, media=False)
    assert (folder / "deep" / "b.json").exists() and not (folder / "film.mp4").exists()
    assert [file.name for file in buckets.glob(local(f"gs://{NAME}/set*/*.json"))] == ["a.json", "c.json"]


def test_copies_are_bounded(bucket, monkeypatch):
    """The least recently used copies are deleted; files written here, not fetched, are kept."""
    monkeypatch.setenv("LLAMAVID_BUCKETS_SIZE", "0.000003")
    monkeypatch.setattr(copies, "_unswept", 0)
    write_files(f"gs://{NAME}/logs", {"own": b"0" * 1000})
    paths = [put(bucket, f"{number}.bin", bytes([number]) * 1000) for number in range(5)]
    for path in (*paths[:3], paths[0], *paths[3:]):
        assert find(path).read_bytes() == bytes([paths.index(path)]) * 1000
        time.sleep(0.01)
    assert [path.exists() for path in paths] == [True, False, False, True, True]
    assert local(f"gs://{NAME}/logs/own").exists()
    with pytest.raises(InputError, match="more than LLAMAVID_BUCKETS_SIZE; raise that"):
        find(put(bucket, "large", b"0" * 4000))


def test_many_at_once(bucket):
    """Of several threads, which stand for processes, only one fetches the object."""
    content = os.urandom(1 << 20)
    path, found = put(bucket, "film.mp4", content), []
    threads = [threading.Thread(target=lambda: found.append(find(path).read_bytes())) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [content] * 6
    assert sum("/download/" in line for line in bucket.seen) == 1
    assert not list(Path(bucket.env["LLAMAVID_BUCKETS"]).glob(".fetch-*"))


def test_a_torn_download(bucket, monkeypatch):
    """A download that differs from the object is fetched again and never kept."""
    path, store = put(bucket, "a.bin", b"0123456789"), bucket.store
    whole = store.get_file

    def torn(times: int):
        left = [times]

        def get_file(key, file):
            whole(key, file)
            if left[0]:
                left[0] -= 1
                Path(file).write_bytes(b"01234xxxxx")

        return get_file

    monkeypatch.setattr(store, "get_file", torn(copies.TRIES))
    with pytest.raises(OutageError, match="another object each time"):
        find(path)
    assert not path.exists()
    monkeypatch.setattr(store, "get_file", torn(1))
    assert find(path).read_bytes() == b"0123456789"


@pytest.mark.parametrize("how", [429, 503, "reset"])
def test_it_is_tried_again(bucket, how):
    """Failed uploads and downloads are retried."""
    bucket.fail("POST .*upload", how)
    write_files(f"gs://{NAME}/out", {"a.json": b"{}"})
    bucket.fail("GET .*download", how)
    put(bucket, "b.json", b"{}")
    assert find(f"gs://{NAME}/b.json").read_bytes() == b"{}" and bucket.files("out") == {"a.json": b"{}"}


def test_it_is_said_in_one_line(bucket, monkeypatch):
    with pytest.raises(InputError, match=r"^gs://none/out/a: .* does not exist; check the name of the bucket$"):
        write_files("gs://none/out", {"a": b""})
    bucket.fail("POST .*upload", 403)
    with pytest.raises(InputError, match=r"^gs://films/out/a may not be used .*give this account the role"):
        write_files(f"gs://{NAME}/out", {"a": b""})
    bucket.fail("GET", 403, times=9)
    with pytest.raises(InputError, match=r"^gs://films/b may not be used"):
        find(f"gs://{NAME}/b")

    bucket.faults.clear()

    async def at_once(*_):
        pass

    monkeypatch.setattr("gcsfs.retry.asyncio.sleep", at_once)
    bucket.fail("POST .*upload", 503, times=100)
    with pytest.raises(OutageError, match=r"^gs://films/out/a cannot be reached \(HttpError: .*; run the same again$"):
        write_files(f"gs://{NAME}/out", {"a": b""})


@pytest.fixture
def folder(bucket) -> Path:
    """A model to upload."""
    folder = local(f"gs://{NAME}/model")
    (folder / "weights").mkdir(parents=True)
    for name in ("a.json", "config.json", *(f"weights/{number}" for number in range(20))):
        (folder / name).write_text(name)
    return folder


@pytest.mark.parametrize("read", [LLaMAVIDLlavaConfig.from_pretrained, stated_pixels, read_settings, read_recipe])
def test_a_bucket_that_may_not_be_read_is_no_bad_file(bucket, read):
    bucket.fail("GET .*", 403, 99)
    with pytest.raises(InputError, match=r"^gs://films/model[^ ]* may not be used "):
        read(local(f"{bucket.url}/model"))


def test_a_folder_is_sent(bucket, folder):
    """Many files are sent in parallel: the mark UNFINISHED before them, config.json last."""
    puts, together = [], threading.Barrier(2)
    whole = bucket.store.put_file

    def put_file(file, key):
        puts.append(Path(file).name)
        assert bucket.store.exists(f"{NAME}/model/{uploads.UNFINISHED}")
        if len(puts) <= 2:
            together.wait(60)  # BrokenBarrierError if the first must end before the second begins
        whole(file, key)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bucket.store, "put_file", put_file)
        uploads.send_folder(folder, last="config.json")
    assert puts[-1] == "config.json" and len(puts) == 22
    assert bucket.files("model") == {name: name.encode() for name in bucket.files("model")}
    assert bucket.files("model").keys() == set(buckets.files_below(folder)) and len(bucket.files("model")) == 22
    uploads.delete(folder, first="config.json")
    deleted = [line for line in bucket.seen if line.startswith("DELETE")]
    assert "config.json" in deleted[1] and not bucket.files("model")  # deleted[0]: UNFINISHED, after the upload


def test_one_that_cannot_be_sent_ends_it(bucket, folder):
    bucket.fail("POST .*upload", 0.0, times=5)
    bucket.fail("POST .*upload", 403, times=1)
    with pytest.raises(InputError, match=r"^gs://films/model/.* may not be used"):
        uploads.send_folder(folder, last="config.json")
    assert "config.json" not in bucket.files("model") and uploads.UNFINISHED in bucket.files("model")


def test_what_a_killed_process_left(bucket, folder):
    """An unfinished upload is deleted, but not if it holds other files or has no mark UNFINISHED."""
    bucket.fail("POST .*upload", 0.0, times=5)
    bucket.fail("POST .*upload", 403, times=1)
    with pytest.raises(InputError):
        uploads.send_folder(folder, last="config.json")
    put(bucket, "model/notes.txt", b"of somebody")
    uploads.discard_unfinished(folder)
    assert {"notes.txt", uploads.UNFINISHED} < bucket.files("model").keys() and folder.is_dir()
    bucket.store.rm_file(f"{NAME}/model/notes.txt")
    uploads.discard_unfinished(folder)
    assert not bucket.files("model") and not folder.exists()
    put(bucket, "model/a.json", b"of somebody")
    uploads.discard_unfinished(folder)
    assert bucket.files("model") == {"a.json": b"of somebody"}


def test_who_was_taken_over_finishes_nothing(bucket, folder):
    """Another process took over, believing this one killed; it stops, as half of each would be no model."""

    def put(file):
        bucket.store.pipe_file(f"{NAME}/model/{uploads.UNFINISHED}", b"7 on another\nconfig.json")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uploads, "put", put)
        with pytest.raises(InputError, match=r"model was taken over by another process \(7 on another\)"):
            uploads.send_folder(folder, last="config.json")
    assert bucket.files("model").keys() == {uploads.UNFINISHED}


def test_logs_are_sent_as_they_grow(bucket):
    put(bucket, "run/metrics.jsonl", b"1\n")
    folder = find(f"gs://{NAME}/run")
    (folder / ".lock").write_text("held here")
    with uploads.sending(folder, lambda name: name != "of-another.jsonl") as send:
        with (folder / "metrics.jsonl").open("a") as file:
            file.write("2\n")
        (folder / "of-another.jsonl").write_text("")
        send()
        assert bucket.files("run") == {"metrics.jsonl": b"1\n2\n"}
        (folder / "deep").mkdir()
        (folder / "deep" / "trace").write_text("3")
    assert bucket.files("run") == {"metrics.jsonl": b"1\n2\n", "deep/trace": b"3"}


def test_logs_that_cannot_be_sent_end_no_run(bucket):
    said, folder = [], local(f"gs://{NAME}/run")
    folder.mkdir(parents=True)
    bucket.fail("POST .*upload", 403, times=9)
    with uploads.sending(folder, report=lambda text: said.append(printable(text))) as send:
        (folder / "metrics.jsonl").write_text("1")
        send()
        send()
    assert len(said) == 1 and said[0].startswith(
        "gs://films/run: logs cannot be sent (gs://films/run/metrics.jsonl may"
    )


def test_the_newest_claim_holds(bucket):
    first = uploads.Claim(put(bucket, "run/.owner", b"1 on a\n"))
    assert first.holder() == ""
    second = uploads.Claim(put(bucket, "run/.owner", b"2 on b\n"))
    assert first.holder() == "2 on b" and second.holder() == ""
    with uploads.sending(local(f"gs://{NAME}/run"), taken=first.holder):
        (find(f"gs://{NAME}/run") / "metrics.jsonl").write_text("the older run's")
    assert bucket.files("run").keys() == {".owner"}
