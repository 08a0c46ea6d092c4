"""Files that come with the package, checksums of files, and locks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

from llamavid_jax import LLaMAVIDLlavaConfig
from llamavid_jax.errors import CheckpointError
from llamavid_jax.files import check_sums, find, locked, with_sums, write_files


@pytest.mark.parametrize("path", ["configs/models/tiny.yaml", "demo/model", "demo/held_out.mp4"])
def test_they_are_found_from_any_folder(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    assert find(path) == ROOT / path
    Path(path).parent.mkdir(parents=True)
    Path(path).touch()
    assert find(path) == Path(path), "what is there comes first"


@pytest.mark.parametrize("path", ["configs/models/no.yaml", "llamavid_jax/files.py", "README.md", "", "/demo/model"])
def test_other_paths_stay(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    assert find(path) == Path(path)


def test_they_are_read_and_never_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = LLaMAVIDLlavaConfig.from_pretrained("demo/model")
    config.save_pretrained("demo/model")
    assert Path("demo/model/config.json").exists()
    assert LLaMAVIDLlavaConfig.from_yaml("configs/models/demo.yaml").text_config == config.text_config


HOLDS = """
import sys, time
from pathlib import Path
from llamavid_jax.files import locked
with locked(Path(sys.argv[1]), "a folder"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_is_told_at_once_and_dies_with_its_process(tmp_path):
    file = tmp_path / ".lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLDS, file], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with (
        pytest.raises(CheckpointError, match=rf"a folder is in use by another process \({holder.pid} on "),
        locked(file, "a folder"),
    ):
        pytest.fail("two hold it")
    holder.kill()
    holder.wait()
    assert file.exists()
    with locked(file, "a folder"):
        with pytest.raises(CheckpointError, match=f"in use by another process .{os.getpid()} on "), locked(file, "it"):
            pytest.fail("two hold it")
        assert file.exists()
    assert not list(tmp_path.iterdir())


def test_a_lock_where_nothing_can_be_made(tmp_path):
    with (
        pytest.raises(CheckpointError, match=r"a folder cannot be made \(No such file"),
        locked(tmp_path / "gone" / ".lock", "a folder"),
    ):
        pass


def test_sums_are_those_of_sha256sum(tmp_path):
    write_files(tmp_path, with_sums({"a": b"1", "b": b"2"}))
    subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=tmp_path, check=True)
    subprocess.run("sha256sum -b a b > SHA256SUMS; echo 0 ../c >> SHA256SUMS", shell=True, cwd=tmp_path, check=True)
    check_sums(tmp_path)
    (tmp_path / "b").write_bytes(b"3")
    with pytest.raises(CheckpointError, match=r"/b is damaged: its SHA-256 is not that in SHA256SUMS; copy"):
        check_sums(tmp_path)
