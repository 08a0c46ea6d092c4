"""Uploads on disk: complete or absent, kept over a restart, bounded; deleted while in use."""

import os
import threading
import time

import pytest
from servers import ask, make_server, text_of, video
from starlette.testclient import TestClient

from llamavid_jax.errors import InputError
from llamavid_jax.serving import prepare as preparing
from llamavid_jax.serving.store import Store
from llamavid_jax.serving.uploads import FullError, NoFileError, Uploads


def test_an_upload_stays_over_a_restart(tmp_path):
    about = Uploads(tmp_path, 100).add([b"ab", b"c"], "film.mp4", "vision")
    for name, age in (("upload-left", 7200), ("upload-coming", 0), ("file-" + "0" * 64, 7200)):
        (tmp_path / name).write_bytes(b"half")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    again = Uploads(tmp_path, 100)
    assert again.all() == [about] and again.path(about["id"]).read_bytes() == b"abc"
    assert {path.name for path in tmp_path.iterdir()} == {"upload-coming", about["id"], f"{about['id']}.json"}


def test_the_same_content_is_kept_once(tmp_path):
    uploads = Uploads(tmp_path, 100)
    first, second = (uploads.add([b"abc"], name, "vision") for name in ("a.mp4", "b.mp4"))
    assert first["id"] == second["id"] and [one["filename"] for one in uploads.all()] == ["b.mp4"]
    uploads.delete(first["id"])
    assert not list(tmp_path.iterdir())
    with pytest.raises(NoFileError):
        uploads.path(first["id"])


def test_two_at_once_have_the_room_of_one(tmp_path):
    """Each fits alone, both do not; two of the same content do, because it is stored once."""
    uploads = Uploads(tmp_path, 100)

    def blocks(content: bytes, other: bytes):
        yield content
        uploads.add([other], "b.mp4", "vision")  # arrives in the meantime

    with pytest.raises(FullError, match="at the same time"):
        uploads.add(blocks(b"a" * 60, b"b" * 60), "a.mp4", "vision")
    uploads.delete(uploads.all()[0]["id"])
    first = uploads.add(blocks(b"a" * 60, b"a" * 60), "a.mp4", "vision")
    assert uploads.all() == [first] and uploads.path(first["id"]).read_bytes() == b"a" * 60


def test_what_is_deleted_goes_with_its_last_reader(tmp_path):
    uploads = Uploads(tmp_path, 100)
    key = uploads.add([b"abc"], "a.mp4", "vision")["id"]
    with uploads.reading(key) as path:
        with uploads.reading(key):
            uploads.delete(key)
        assert path.read_bytes() == b"abc" and not uploads.all() and uploads.room() == 100
        with pytest.raises(NoFileError), uploads.reading(key):
            pass
    assert not list(tmp_path.iterdir())
    with uploads.reading(key := uploads.add([b"abc"], "a.mp4", "vision")["id"]):
        uploads.delete(key)
        again = uploads.add([b"abc"], "b.mp4", "vision")
    assert uploads.all() == [again] and path.read_bytes() == b"abc"


def test_a_film_that_is_deleted_while_it_is_asked_about(tiny_model, engine, tmp_path, clip, monkeypatch):
    """Before its decoder has opened it, with a second question waiting for its frames: both are answered, a third gets
    the error that there is no such film."""
    server = make_server(tiny_model, engine, tmp_path / "uploads", media_root=clip.parent)
    client, waiting, both, deleted = TestClient(server.app), [], threading.Event(), []
    expected = [text_of(ask(client, video("clip.mp4"), fps=2.0, max_tokens=length)) for length in (5, 12)]
    server.preparer.features = Store(0)  # the next ones are encoded again
    content = clip.read_bytes()
    key = client.post("/v1/files", files={"file": ("clip.mp4", content)}).json()["id"]
    use, decoded = server.preparer.features.use, preparing.decoded

    def used(*arguments):
        waiting.append(arguments)
        if len(waiting) == 2:
            both.set()
        return use(*arguments)

    def decoded_late(*arguments):
        assert both.wait(60)
        deleted.append(client.delete(f"/v1/files/{key}").status_code)  # the second may come after the first is done
        return decoded(*arguments)

    monkeypatch.setattr(server.preparer.features, "use", used)
    monkeypatch.setattr(preparing, "decoded", decoded_late)
    found = {}

    def put(number: int, length: int) -> None:
        found[number] = ask(client, video(key), fps=2.0, max_tokens=length)

    threads = [threading.Thread(target=put, args=pair) for pair in enumerate((5, 12))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [text_of(found[number]) for number in (0, 1)] == expected
    assert deleted[0] == 200 and set(deleted[1:]) <= {404}
    assert ask(client, video(key), fps=2.0).status_code == 404 and not list((tmp_path / "uploads").iterdir())


def test_a_download_that_a_deletion_overtakes(tiny_model, engine, tmp_path, monkeypatch):
    server = make_server(tiny_model, engine, tmp_path)
    client = TestClient(server.app)
    key = client.post("/v1/files", files={"file": ("a", b"abc")}).json()["id"]
    find = server.uploads.find

    def found(asked: str):
        about = find(asked)
        monkeypatch.setattr(server.uploads, "find", find)
        server.uploads.delete(key)
        return about

    monkeypatch.setattr(server.uploads, "find", found)
    assert client.get(f"/v1/files/{key}/content").status_code == 404


def broken():
    yield b"ab"
    raise ConnectionError


@pytest.mark.parametrize("blocks, error", [([b"x" * 101], FullError), ([], InputError), (broken(), FullError)])
def test_what_fails_leaves_nothing(tmp_path, blocks, error):
    uploads = Uploads(tmp_path, 100)
    with pytest.raises(error):
        uploads.add(blocks, "film.mp4", "vision")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match="--uploads"):
        Uploads(tmp_path / "file", 100)
