"""Copies on the hosts' local disks: the newest that all processes have, of this run and this mesh, or none."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from training_data import two_processes

from llamavid_jax.errors import CheckpointError
from llamavid_jax.parallel.mesh import make_mesh
from llamavid_jax.training.local_copies import NUMBER, LocalCopies


def state(step: int, **mesh: int) -> dict:
    """An array split over `fsdp` and replicated over `data`, and one replicated on every device."""
    mesh, draw = make_mesh(**mesh), np.random.default_rng(step).standard_normal
    return {
        "w": jax.device_put(draw((64, 8)).astype(np.float32), NamedSharding(mesh, PartitionSpec("fsdp"))),
        "b": jax.device_put(jnp.float32(step), NamedSharding(mesh, PartitionSpec())),
    }


@pytest.fixture
def run(tmp_path) -> Path:
    """A run's checkpoints, and copies of its steps 1 to 3 at `tmp_path / "local"`, of which two are kept."""
    (tmp_path / "checkpoints").mkdir()
    with open_copies(tmp_path) as copies:
        for step in (1, 2, 3):
            copies.save(step, state(step, data=2, fsdp=4), {"next": step}, {})
    return tmp_path


def open_copies(run: Path, report=pytest.fail, **mesh: int) -> LocalCopies:
    return LocalCopies(run / "local", run / "checkpoints", make_mesh(**mesh or {"data": 2, "fsdp": 4}), report)


def newest(run: Path, at_least: int = 0, report=pytest.fail, **mesh: int) -> int | None:
    """The step that is restored, after a check of its values."""
    mesh = mesh or {"data": 2, "fsdp": 4}
    with open_copies(run, report, **mesh) as copies:
        found = copies.restore(state(0, **mesh), at_least)
    if found is None:
        return None
    expected = state(found.step, **mesh)
    assert found.position == {"next": found.step}
    assert all(np.array_equal(found.arrays[name], expected[name]) for name in expected)
    return found.step


def test_the_newest_comes_back_unless_a_checkpoint_is_newer(run):
    assert newest(run) == newest(run, at_least=3) == 3
    assert newest(run, at_least=4) is None


def test_of_another_mesh_or_another_run_there_is_none(run):
    assert newest(run, data=4, fsdp=2) is None
    (run / "checkpoints" / NUMBER).unlink()  # removing the checkpoints starts a new run
    assert newest(run) is None


def test_a_damaged_copy_gives_way(run):
    lines, (folder,) = [], (run / "local").glob("*/*/0")
    shutil.rmtree(folder / "3" / "arrays")
    assert newest(run, report=lines.append) == 2 and "3 is damaged" in lines[0]
    (folder / "2" / "run" / "metadata").write_text("{")
    assert newest(run, report=lines.append) is None and "no copy can be read" in lines[-1]


def test_a_folder_that_cannot_be_made_is_named(run):
    shutil.rmtree(run / "local")
    (run / "local").write_text("")
    with pytest.raises(CheckpointError, match=r"training\.local_copies: .* cannot be made \(.*; give a folder"):
        open_copies(run)


TWO_HOSTS = """
import os, pathlib, shutil, time
import numpy as np
(folder,) = arguments
make = os.mkdir
if process == 1:  # its disk is slow
    os.mkdir = lambda *given, **named: (time.sleep(0.1), make(*given, **named))
folder = pathlib.Path(folder)
from jax.sharding import NamedSharding, PartitionSpec
from llamavid_jax.parallel.mesh import make_mesh
from llamavid_jax.training.local_copies import LocalCopies

def state(step, mesh):
    w = np.random.default_rng(step).standard_normal((64, 8)).astype(np.float32)
    places = {"cut": PartitionSpec("fsdp"), "copied": PartitionSpec("tensor"), "whole": PartitionSpec()}
    shardings = {name: NamedSharding(mesh, place) for name, place in places.items()}
    return {name: jax.make_array_from_callback(w.shape, one, lambda index: w[index]) for name, one in shardings.items()}

def newest(mesh):
    with jax.set_mesh(mesh), LocalCopies(folder / f"host{process}", folder / "shared", mesh, print) as copies:
        found = copies.restore(state(0, mesh))
    if found is None:
        return None
    for name, array in state(found.step, mesh).items():
        for got, wanted in zip(found.arrays[name].addressable_shards, array.addressable_shards):
            assert (np.asarray(got.data) == np.asarray(wanted.data)).all(), name
    return found.step

mesh = make_mesh(fsdp=4, tensor=2)
with jax.set_mesh(mesh), LocalCopies(folder / f"host{process}", folder / "shared", mesh, print) as copies:
    for step in (1, 2):
        copies.save(step, state(step, mesh), {}, {})
assert newest(mesh) == 2
(own,) = (folder / f"host{process}").glob("*/*/*")
assert own.name == str(process) and len(list((folder / f"host{process}").glob("*/*/*"))) == 1
if process == 1:  # it was killed before its part had its name
    shutil.rmtree(own / "2")
assert newest(mesh) == 1 and not (own / "2").exists()
assert newest(make_mesh(data=4, fsdp=2)) is None
if process == 1:  # another machine came in its place
    shutil.rmtree(folder / "host1")
assert newest(mesh) is None
print("done")
"""


@pytest.mark.sharding
def test_two_hosts(tmp_path):
    (tmp_path / "shared").mkdir()
    outputs = two_processes(TWO_HOSTS, str(tmp_path))
    assert all("done" in output for output in outputs), "\n".join(outputs)
