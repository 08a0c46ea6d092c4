"""Uploads in parts: they go on where they broke off, and are whole or not there."""

import os
import time

import pytest

from llamavid_jax.errors import InputError
from llamavid_jax.serving.parts import DAY, Parts
from llamavid_jax.serving.uploads import FullError, NoFileError, Uploads

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
    done = again.complete(key, [first["id"], second["id"]])
    assert done["status"] == "completed" and done["file"]["filename"] == "film.mp4" and done["file"]["bytes"] == 7
    assert again.uploads.path(done["file"]["id"]).read_bytes() == b"abcdefg" and again.uploads.room() == 13
    with pytest.raises(NoFileError):
        again.find(key)


def test_what_cannot_be(parts):
    key = parts.create(FILM)["id"]
    assert parts.uploads.room() == 13  # what was begun is kept free
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
            parts.complete(key, order)
    for other in ("upload_" + "0" * 24, "../uploads", "part_" + "0" * 24, key[:-1]):
        with pytest.raises(NoFileError):
            parts.add(other, [b"abc"])
    assert parts.cancel(key)["status"] == "cancelled" and not list(parts.uploads.folder.iterdir())


def test_what_is_left_for_a_day_goes(parts):
    old, new = (parts.create(FILM)["id"] for _ in range(2))
    os.utime(parts.uploads.folder / old, (time.time() - DAY - 1,) * 2)
    parts.create(FILM | {"bytes": 1})
    with pytest.raises(NoFileError):
        parts.find(old)
    assert parts.find(new)["status"] == "pending"
