"""Uploads in parts: they resume where they stopped, and are complete or absent."""

import hashlib
import os
import threading
import time

import pytest

from llamavid_jax.errors import InputError
from llamavid_jax.serving.parts import DAY, Parts, read_range
from llamavid_jax.serving.uploads import ConflictError, FullError, NoFileError, Uploads

FILM = {"filename": "film.mp4", "purpose": "user_data", "bytes": 7}


@pytest.fixture
def parts(tmp_path):
    return Parts(Uploads(tmp_path, 20))


def test_a_server_that_starts_again_takes_the_rest(parts, tmp_path):
    key = parts.create(FILM)["id"]
    first = parts.add(key, [b"ab", b"c"])
    again = Parts(Uploads(tmp_path, 20))
    about = again.find(key)
    assert about["status"] == "pending" and about["parts"] == [{"id": first["id"], "bytes": 3}]
    second = again.add(key, [b"defg"])
    done = again.complete(key, {"part_ids": [first["id"], second["id"]]})
    assert done["status"] == "completed" and done["file"]["filename"] == "film.mp4" and done["file"]["bytes"] == 7
    assert again.uploads.path(done["file"]["id"]).read_bytes() == b"abcdefg" and again.uploads.room() == 13
    assert again.find(key) == done and done["received"] == 7 and not list((tmp_path / key).glob("part_*"))


def test_what_cannot_be(parts):
    key = parts.create(FILM)["id"]
    assert parts.uploads.room() == 13  # room for started uploads is reserved
    for body, error in ((FILM | {"bytes": 14}, FullError), (FILM | {"bytes": "7"}, InputError), ({}, InputError)):
        with pytest.raises(error):
            parts.create(body)
    one = parts.add(key, [b"abc"])["id"]
    for blocks, error in (([b"x" * 5], FullError), ([], InputError), ([bytes(1 << 20)] * 65, InputError)):
        with pytest.raises(error):
            parts.add(key, blocks)
    for order, words in (
        ([one], "3 of 7 bytes"),
        (["part_" + "0" * 24], "part_ids"),
        ("x", "part_ids"),
        ([1], "part_ids"),
    ):
        with pytest.raises(InputError, match=words):
            parts.complete(key, {"part_ids": order})
    for other in ("upload_" + "0" * 24, "../uploads", "part_" + "0" * 24, key[:-1]):
        with pytest.raises(NoFileError):
            parts.add(other, [b"abc"])
    assert parts.cancel(key)["status"] == "cancelled" and not list(parts.uploads.folder.iterdir())


def test_what_is_left_for_a_day_goes(parts):
    old, new = (parts.create(FILM)["id"] for _ in range(2))
    for key in (old, new):
        for path in (*(parts.uploads.folder / key).iterdir(), parts.uploads.folder / key):
            os.utime(path, (time.time() - DAY - 1,) * 2)
    parts.put(new, 0, b"abc")
    parts.create(FILM | {"bytes": 1})
    with pytest.raises(NoFileError):
        parts.find(old)
    assert parts.find(new)["received"] == 3


def put(parts, key: str, start: int, content: bytes) -> dict:
    parts.put(key, start, content)
    return parts.finish(key)


def test_ranges_go_on_behind_a_server_that_starts_again(parts, tmp_path):
    """They resume at their end or before it; repeated ranges do no harm, even once the file is complete."""
    key = parts.create(FILM)["id"]
    assert put(parts, key, 0, b"abc")["received"] == 3
    again = Parts(Uploads(tmp_path, 20))
    assert again.find(key)["received"] == 3 and put(again, key, 0, b"ab")["received"] == 3
    assert put(again, key, 1, b"bcde")["received"] == 5
    for start, content in ((5, b"fg"), (0, b"abcdefg"), (3, b"de")):
        done = put(again, key, start, content)
        assert done["status"] == "completed" and done["file"]["bytes"] == 7 and done["received"] == 7
    assert again.uploads.path(done["file"]["id"]).read_bytes() == b"abcdefg" and again.uploads.room() == 13


def test_two_clients_send_the_same_at_once(tmp_path):
    """Byte by byte under one id: the file is made once, and each client gets its id."""
    parts, films = Parts(Uploads(tmp_path, 20)), []

    def send(key: str, begun: threading.Barrier) -> None:
        begun.wait()
        for at in range(7):
            parts.put(key, at, b"abcdefg"[at : at + 1])
        films.append(parts.finish(key)["file"]["id"])

    for _ in range(5):
        key, begun = parts.create(FILM)["id"], threading.Barrier(4)
        threads = [threading.Thread(target=send, args=(key, begun)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        parts.uploads.delete(films[-1])
    assert films == [f"file-{hashlib.sha256(b'abcdefg').hexdigest()}"] * 20


def test_the_last_bytes_again_while_the_file_is_made(parts, monkeypatch):
    """The first client's completion may not remove the bytes between another's lookup and comparison."""
    key, content, ending = parts.create(FILM)["id"], parts._content, []
    parts.put(key, 0, b"abcdefg")

    def overtaken(about):
        monkeypatch.setattr(parts, "_content", content)
        ending.append(threading.Thread(target=parts.finish, args=(key,)))
        ending[0].start()
        ending[0].join(1)  # it has to wait now
        return content(about)

    with parts._adding:  # `put` first looks up how much has arrived
        about = parts.find(key)
    monkeypatch.setattr(parts, "find", lambda _: dict(about))
    monkeypatch.setattr(parts, "_content", overtaken)
    parts.put(key, 3, b"defg")
    monkeypatch.undo()
    ending[0].join()
    assert parts.find(key)["status"] == "completed" and parts.finish(key)["file"]["bytes"] == 7


def test_a_completion_whose_reply_was_lost(parts):
    """OpenAI's client repeats the request by itself."""
    key = parts.create(FILM)["id"]
    order = {"part_ids": [parts.add(key, [b"abcdefg"])["id"]]}
    assert parts.complete(key, order) == parts.complete(key, order) == parts.find(key)


def test_two_films_are_never_glued_together(parts):
    """Another file of the same length under the same id is refused: bytes that overlap the received ones differ."""
    key = parts.create(FILM)["id"]
    put(parts, key, 0, b"abcde")
    for start, content in ((0, b"XXXXXXX"), (4, b"Xfg"), (3, b"dXfg")):
        with pytest.raises(ConflictError, match="another file"):
            put(parts, key, start, content)
    with pytest.raises(ConflictError, match="has 5 bytes; go on from there and not from 6"):
        put(parts, key, 6, b"g")
    with pytest.raises(InputError, match="more came"):
        put(parts, key, 5, b"fgh")
    done = put(parts, key, 5, b"fg")
    with pytest.raises(ConflictError, match="another file"):  # also once the file is complete
        put(parts, key, 0, b"XXXXXXX")
    assert parts.uploads.path(done["file"]["id"]).read_bytes() == b"abcdefg"


def test_a_sum_that_is_another(parts):
    """Without overlap the MD5 reveals another file; `complete` takes it in OpenAI's protocol too."""
    md5 = hashlib.md5(b"abcdefg").hexdigest()
    key = parts.create(FILM | {"md5": md5.upper()})["id"]
    put(parts, key, 0, b"abcde")
    with pytest.raises(ConflictError, match="send the file again"):
        put(parts, key, 5, b"XX")
    assert parts.find(key)["received"] == 0 and not parts.uploads.all()
    assert put(parts, key, 0, b"abcdefg")["file"]["id"] == f"file-{hashlib.sha256(b'abcdefg').hexdigest()}"
    key = parts.create(FILM)["id"]
    order = [parts.add(key, [content])["id"] for content in (b"abc", b"defg")]
    with pytest.raises(InputError, match="MD5"):
        parts.complete(key, {"part_ids": order[::-1], "md5": md5})
    with pytest.raises(InputError, match="md5sum"):
        parts.complete(key, {"part_ids": order, "md5": "0"})
    assert parts.complete(key, {"part_ids": order, "md5": md5})["status"] == "completed"


def test_a_disk_that_is_full_loses_nothing(parts, monkeypatch):
    """At the end of an upload, when the file is assembled."""

    def full(*_):
        raise FullError("no room")

    key = parts.create(FILM)["id"]
    with monkeypatch.context() as patch:
        patch.setattr(parts.uploads, "add", full)
        with pytest.raises(FullError):
            put(parts, key, 0, b"abcdefg")
    assert parts.find(key)["received"] == 7 and put(parts, key, 7, b"")["status"] == "completed"


def test_parts_and_ranges_are_not_mixed(parts):
    by_parts, by_ranges = (parts.create(FILM)["id"] for _ in range(2))
    parts.add(by_parts, [b"abc"])
    parts.put(by_ranges, 0, b"abc")
    with pytest.raises(ConflictError, match="in parts"):
        parts.put(by_parts, 3, b"d")
    with pytest.raises(ConflictError, match="by ranges"):
        parts.add(by_ranges, [b"d"])


@pytest.mark.parametrize(
    "said, length, found",
    [
        (None, None, (0, 7)),
        (None, 7, (0, 7)),
        ("bytes 3-6/7", 4, (3, 7)),
        ("bytes 3-4/7", None, (3, 5)),
        (None, 6, "6 come"),
        (None, 0, "0 come"),
        ("bytes 3-6/7", 3, "3 come"),
        ("bytes 3-6/8", 4, "of 8"),
        ("bytes 3-7/7", None, "3 to 7"),
        ("bytes 4-3/7", None, "4 to 3"),
        ("bytes */7", None, "FIRST-LAST"),
        ("bytes -1-3/7", None, "FIRST-LAST"),
        ("items 0-6/7", None, "FIRST-LAST"),
        ("bytes ٠-٦/7", None, "FIRST-LAST"),
        ("bytes 0-" + "9" * 5000 + "/7", None, "FIRST-LAST"),
    ],
)
def test_ranges_are_read_strictly(said, length, found):
    if isinstance(found, tuple):
        assert read_range(said, length, 7) == found
    else:
        with pytest.raises(InputError, match=found):
            read_range(said, length, 7)
