"""Checkpoints of a run: complete or absent, the one before if the newest is damaged, any mesh, two processes."""

import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from damage import assert_told_or_harmless
from jax.sharding import NamedSharding, PartitionSpec
from paths import ROOT
from training_data import environment, two_processes

from llamavid_jax.errors import CheckpointError, InputError
from llamavid_jax.models.structure import flat_paths
from llamavid_jax.parallel.mesh import make_mesh
from llamavid_jax.training.checkpoint import RunCheckpoints


def on_mesh(tree, **sizes):
    """The tree with every matrix split over both axes of the mesh, the rest replicated."""
    mesh = make_mesh(**sizes)

    def sharding(leaf):
        spec = PartitionSpec("fsdp", "tensor") if leaf.ndim == 2 else PartitionSpec()
        return NamedSharding(mesh, spec)

    return jax.tree.map(lambda leaf: jax.device_put(leaf, sharding(leaf)), tree)


def run_state(step: int) -> dict:
    """Parameters in two types, an optimiser's named tuples, RNG key data."""
    draw = np.random.default_rng(step).standard_normal
    params = {
        "llama": {"layers": {0: {"kernel": jnp.asarray(draw((64, 64)), jnp.float32)}}, "norm": jnp.asarray(draw(8))},
        "visual_tokens": [jnp.asarray(draw((64, 64)), jnp.bfloat16), jnp.asarray(draw(8)) > 0],
    }
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, mask=lambda p: True)).init(params)
    counted = jax.tree.map(lambda leaf: leaf + jnp.asarray(step, leaf.dtype), optimiser)
    return {"params": params, "optimiser": counted, "key": jax.random.key_data(jax.random.key(step))}


def abstract_of(tree):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), tree)


def assert_same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> Path:
    """Checkpoints of steps 10, 20 and 30, of which the two newest are kept."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    with RunCheckpoints(folder, keep=2) as checkpoints:
        for step in (10, 20, 30):
            checkpoints.save(step, on_mesh(run_state(step), fsdp=4, tensor=2), {"next": step}, {"seed": 1})
    return folder


@pytest.mark.sharding
def test_restore_onto_another_mesh(three):
    assert sorted(path.name for path in three.iterdir()) == ["20", "30"]
    target = on_mesh(run_state(0), fsdp=2, tensor=4)
    with RunCheckpoints(three, keep=2) as checkpoints:
        step, arrays, position, config = checkpoints.restore(abstract_of(target))
        checkpoints.save(30, target, {}, {})  # exists: left unchanged
    assert (step, position, config) == (30, {"next": 30}, {"seed": 1})
    assert_same(arrays, run_state(30))
    assert [leaf.sharding for leaf in jax.tree.leaves(arrays)] == [leaf.sharding for leaf in jax.tree.leaves(target)]
    assert json.loads((three / "30/run/metadata").read_text())["run"]["config"] == {"seed": 1}


def test_nothing_there(tmp_path):
    with RunCheckpoints(tmp_path / "none", keep=2) as checkpoints:
        assert checkpoints.restore(run_state(0)) is None
    with pytest.raises(CheckpointError, match="keep is 1; use 2 or more"):
        RunCheckpoints(tmp_path, keep=1)


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "missing": lambda path: path.unlink(),
    "garbage": lambda path: path.write_bytes(b"{garbage"),
    "a flipped bit": lambda path: path.write_bytes(flipped(path.read_bytes())),
}


def flipped(data: bytes) -> bytes:
    place = len(data) // 3
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_of_any_file_falls_back_or_harms_nothing(three, tmp_path, damage, capfd):
    """Some of Orbax's files are not needed for reading: then step 30 itself is restored."""
    target, fallen = run_state(0), []
    for number, path in enumerate(sorted(path for path in (three / "30").rglob("*") if path.is_file())):
        folder = tmp_path / str(number)
        shutil.copytree(three, folder)
        DAMAGE[damage](folder / path.relative_to(three))
        lines = []
        with RunCheckpoints(folder, keep=2, report=lines.append) as checkpoints:
            step, arrays, position, _ = checkpoints.restore(target)
            assert_same(arrays, run_state(step))
            assert position == {"next": step}
            if step == 20:
                (line,) = lines
                assert line.startswith(f"{folder}/30 is damaged (") and line.endswith("; trying the one before")
                assert "\n" not in line and len(line) < 500
                checkpoints.save(30, run_state(31), {"next": 31}, {})
                fallen.append(str(path.relative_to(three / "30")))
        if step == 20 and len(fallen) == 1:  # the step is saved again beside the damaged one
            assert sorted(path.name for path in folder.iterdir()) == ["20", "30", "damaged-30"]
            with RunCheckpoints(folder, keep=2) as checkpoints:
                assert_same(checkpoints.restore(target).arrays, run_state(31))
        shutil.rmtree(folder)
    assert {"run/metadata", "arrays/manifest.ocdbt"} <= set(fallen)
    assert any("ocdbt.process_0/d/" in name for name in fallen)
    assert not capfd.readouterr().err  # Orbax's tracebacks are suppressed


def restored(folder: Path, aside: Path) -> dict[str, np.ndarray]:
    """Step 30 of a copy of `folder`; CheckpointError where it fell back to 20."""
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(folder, aside)
    lines = []
    with RunCheckpoints(aside, keep=2, report=lines.append) as checkpoints:
        step, arrays, position, config = checkpoints.restore(run_state(0))
    assert (step, position, config) == (20 if lines else 30, {"next": step}, {"seed": 1})
    assert_same(arrays, run_state(step))
    if lines:
        raise CheckpointError(" ".join(lines))
    return {path: np.asarray(value) for path, value in flat_paths(arrays).items()}


def test_a_flipped_bit_of_any_file(three, tmp_path, capfd):
    """None of 100 changes a restored value; damage in files that are not needed to read is harmless."""
    shutil.copytree(three, tmp_path / "run")
    assert_told_or_harmless(tmp_path / "run/30", lambda: restored(tmp_path / "run", tmp_path / "copy"), least=15)
    assert not capfd.readouterr().err


@pytest.mark.parametrize(
    "name", ["_CHECKPOINT_METADATA", "arrays/_METADATA", "arrays/_sharding", "arrays/array_metadatas/process_0"]
)
def test_damage_that_is_still_json(three, tmp_path, name):
    """Another character in a key, a number or a name: Orbax's own files are not read, even when 30 is moved aside."""
    shutil.copytree(three, tmp_path / "run")
    draw, content = random.Random(0), (three / "30" / name).read_text()
    places = draw.sample([place for place, letter in enumerate(content) if letter.isalnum()], 12)
    changed = [content[:place] + "78"[content[place] == "7"] + content[place + 1 :] for place in places]
    for number, text in enumerate([*changed, "{}", "[]", "null", "1", ""]):
        for step in ("20", "30"):
            (tmp_path / "run" / step / name).write_text(text)
        restored(tmp_path / "run", tmp_path / "copy")
        if number % 4 == 0:  # another file is damaged too, and a step is saved
            (tmp_path / "copy/30/run/metadata").unlink()
            with RunCheckpoints(tmp_path / "copy", keep=2, report=lambda line: None) as checkpoints:
                assert checkpoints.restore(run_state(0)).step == 20
                checkpoints.save(30, run_state(31), {}, {})
                checkpoints.wait()
                assert_same(checkpoints.restore(run_state(0)).arrays, run_state(31))


def test_all_damaged_is_an_error_and_changes_nothing(three, tmp_path):
    shutil.copytree(three, tmp_path / "run")
    for step in (20, 30):
        (tmp_path / "run" / str(step) / "run/metadata").write_text("[1]")
    message = r"none of its 2 checkpoints can be read \(step 30: run: TypeError"
    with RunCheckpoints(tmp_path / "run", keep=2) as checkpoints, pytest.raises(CheckpointError, match=message):
        checkpoints.restore(run_state(0))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["20", "30"]


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda s: s["params"].update(new=jnp.zeros(3)), r"params\.new is absent there and float32\[3\] in this run"),
        (
            lambda s: s["params"].pop("visual_tokens"),
            r"params\.visual_tokens\.0 is bfloat16\[64, 64\] there and absent",
        ),
        (lambda s: s.update(key=jnp.zeros(4, jnp.uint32)), r"key is uint32\[2\] there and uint32\[4\] in this run"),
        (lambda s: s.update(key=jnp.zeros(2)), r"key is uint32\[2\] there and float32\[2\] in this run"),
    ],
)
def test_another_configuration_is_an_error_not_damage(three, change, message):
    state, lines = run_state(0), []
    change(state)
    with (
        RunCheckpoints(three, keep=2, report=lines.append) as checkpoints,
        pytest.raises(InputError, match=message),
    ):
        checkpoints.restore(state)
    assert not lines and sorted(path.name for path in three.iterdir()) == ["20", "30"]


def test_saved_arrays_may_be_donated_at_once(tmp_path):
    """The next step overwrites the buffers during the save."""
    step = jax.jit(lambda state: jax.tree.map(lambda x: x * 2, state), donate_argnums=0)
    state = {"w": jnp.arange(4_000_000, dtype=jnp.float32)}
    with RunCheckpoints(tmp_path / "run", keep=2) as checkpoints:
        checkpoints.save(0, state, {}, {})
        for _ in range(20):
            state = step(state)
        arrays = checkpoints.restore({"w": jnp.zeros(4_000_000)}).arrays
    np.testing.assert_array_equal(np.asarray(arrays["w"]), np.arange(4_000_000, dtype=np.float32))


def test_unwritable_and_full(tmp_path, capfd):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot be made .*give a folder that can be written to"):
        RunCheckpoints(tmp_path / "file", keep=2)
    values = np.random.default_rng(0).standard_normal(100_000)
    state = {f"w{number}": jnp.asarray(values, jnp.float32) for number in range(20)}
    checkpoints = RunCheckpoints(tmp_path / "run", keep=2)
    checkpoints.save(1, state, {}, {})
    checkpoints.wait()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # every longer file fails, as on a full disk
    try:
        with pytest.raises(CheckpointError, match=r"run: the checkpoint of step 2 cannot be written .*; free space"):
            checkpoints.save(2, state, {}, {})
            while checkpoints._manager.is_saving_in_progress():  # it fails during the run
                time.sleep(0.01)
            checkpoints.wait()
        with pytest.raises(CheckpointError, match="the checkpoint of step 2"):  # it is reported again
            checkpoints.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not capfd.readouterr().err
    with RunCheckpoints(tmp_path / "run", keep=2) as checkpoints:
        assert checkpoints.restore(state).step == 1


SAVES_FOR_EVER = """
import sys
import jax.numpy as jnp
from llamavid_jax.training.checkpoint import RunCheckpoints
folder, step = sys.argv[1], int(sys.argv[2])
checkpoints = RunCheckpoints(folder, keep=2)
while True:
    step += 1
    arrays = {name: jnp.full((200, 1000), step + ord(name), jnp.float32) for name in "abcd"}
    checkpoints.save(step, arrays, {"next": step}, {})
    print(step, flush=True)
"""


def test_kill_at_any_moment(tmp_path):
    """Six lives of one run, each killed at a random moment of a save; what is left restores the saved values."""
    pause, restored = random.Random(5), 0
    for _ in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVES_FOR_EVER, str(tmp_path / "run"), str(restored)],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=environment(1),
        )  # fmt: skip
        first, second = process.stdout.readline(), process.stdout.readline()  # a save starts when the last is complete
        time.sleep(pause.uniform(0, 0.25))
        process.send_signal(signal.SIGKILL)
        output, errors = process.communicate()
        assert int(first or -1) == restored + 1, errors
        last = int((second + output).split()[-1])
        with RunCheckpoints(tmp_path / "run", keep=2, report=lambda line: pytest.fail(line)) as checkpoints:
            found = checkpoints.restore({name: jnp.zeros((200, 1000)) for name in "abcd"})
        step = found.step if found else 0
        assert max(restored, last - 2) <= step <= last + 1  # saves run one after another, in the background
        if found:
            assert found.position == {"next": step}
            assert all((np.asarray(found.arrays[name]) == step + ord(name)).all() for name in "abcd")
        restored = step
    assert restored >= 6


TWO_PROCESSES = """
import pathlib, shutil
import numpy as np
(folder,) = arguments
from jax.sharding import NamedSharding, PartitionSpec
from jax.experimental.multihost_utils import sync_global_devices
from llamavid_jax.parallel.mesh import make_mesh
from llamavid_jax.training.checkpoint import RunCheckpoints

def state(step, **mesh):
    sharding = NamedSharding(make_mesh(**mesh), PartitionSpec("fsdp", "tensor"))
    full = np.random.default_rng(step).standard_normal((256, 64)).astype(np.float32)
    return {"w": jax.make_array_from_callback(full.shape, sharding, lambda index: full[index])}

lines = []
with jax.set_mesh(make_mesh(fsdp=8)), RunCheckpoints(folder, keep=2, report=lines.append) as checkpoints:
    for step in (1, 2, 3):
        checkpoints.save(step, state(step, fsdp=8), {"next": step}, {})
    checkpoints.wait()
    if process == 1:  # only what process 1 wrote, and so only one process may notice
        shutil.rmtree(folder + "/3/arrays/ocdbt.process_1/d")
    sync_global_devices("damaged")
    found = checkpoints.restore(state(0, fsdp=4, tensor=2))
    expected = state(2, fsdp=4, tensor=2)["w"]
    for got, wanted in zip(found.arrays["w"].addressable_shards, expected.addressable_shards):
        assert got.index == wanted.index and (np.asarray(got.data) == np.asarray(wanted.data)).all()
    assert found.step == 2 and found.position == {"next": 2} and len(lines) == 1, (found, lines)
    checkpoints.save(3, state(3, fsdp=8), {"next": 3}, {})
    checkpoints.wait()
    assert checkpoints.restore(state(0, fsdp=2, tensor=4)).step == 3
    if process == 0:  # a bit of a value
        values = max(pathlib.Path(folder, "3/arrays/ocdbt.process_1/d").iterdir(), key=lambda file: file.stat().st_size)
        content = bytearray(values.read_bytes())
        content[-2000] ^= 64
        values.write_bytes(content)
    sync_global_devices("flipped")
    assert checkpoints.restore(state(0, fsdp=8)).step == 2
    assert "3 is damaged (arrays: w is not what was written)" in lines[1]
print("done", lines)
"""

ONE_CANNOT_WRITE = (
    TWO_PROCESSES[: TWO_PROCESSES.index("lines = []")]
    + """
import resource, time
from llamavid_jax.commands.processes import leave
from llamavid_jax.errors import CheckpointError

try:
    with jax.set_mesh(make_mesh(fsdp=8)), RunCheckpoints(folder, keep=2) as checkpoints:
        checkpoints.save(1, state(1, fsdp=8), {}, {})
        checkpoints.wait()
        if process == int(other):
            resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        began = time.monotonic()
        checkpoints.save(2, state(2, fsdp=8), {}, {})
except CheckpointError as error:
    print(f"told after {time.monotonic() - began:.1f} s: {error}")
leave()  # else its end waits for the threads of the save
"""
).replace("(folder,) = arguments", "folder, other = arguments")


@pytest.mark.sharding
def test_two_processes(tmp_path):
    outputs = two_processes(TWO_PROCESSES, str(tmp_path / "run"))
    assert all("done" in output for output in outputs), "\n".join(outputs)


@pytest.mark.sharding
@pytest.mark.parametrize("other", [0, 1])
def test_a_save_that_fails_on_one_host_ends_all(tmp_path, other):
    """At once; Orbax alone would let the other processes wait for 20 minutes."""
    outputs = two_processes(ONE_CANNOT_WRITE, str(tmp_path / "run"), str(other))
    assert "the checkpoint of step 2 cannot be written" in outputs[other] and "too large" in outputs[other].lower()
    assert f"process {other} has not written its part" in outputs[1 - other], outputs
