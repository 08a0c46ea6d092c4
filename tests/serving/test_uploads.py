"""Uploads on disk: whole or not there, kept over a restart, bounded."""

import os
import time

import pytest

from llamavid_jax.errors import InputError
from llamavid_jax.serving.uploads import FullError, NoFileError, Uploads


def test_an_upload_stays_over_a_restart(tmp_path):
    about = Uploads(tmp_path, 100).add([b"ab", b"c"], "film.mp4", "vision")
    for name, age in (("upload-left", 7200), ("upload-coming", 0)):
        (tmp_path / name).write_bytes(b"half")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    again = Uploads(tmp_path, 100)
    assert again.all() == [about] and again.path(about["id"]).read_bytes() == b"abc"
    assert [path.name for path in tmp_path.glob("upload-*")] == ["upload-coming"]


def test_the_same_content_is_kept_once(tmp_path):
    uploads = Uploads(tmp_path, 100)
    first, second = (uploads.add([b"abc"], name, "vision") for name in ("a.mp4", "b.mp4"))
    assert first["id"] == second["id"] and [one["filename"] for one in uploads.all()] == ["b.mp4"]
    uploads.delete(first["id"])
    assert not list(tmp_path.iterdir())
    with pytest.raises(NoFileError):
        uploads.path(first["id"])


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
