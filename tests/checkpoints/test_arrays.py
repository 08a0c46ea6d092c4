"""Arrays on disk: no bit of them flips unnoticed, they are Orbax's to read, and Orbax's own form is read."""

import json
import os
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from converted import CONFIG, ORIGINAL, convert
from damage import assert_told_or_harmless
from jax.sharding import NamedSharding, PartitionSpec
from paths import ROOT
from training_data import two_processes

from llamavid_jax.checkpoints.arrays import CHUNK_BYTES, Arrays, chunk_shape, nest
from llamavid_jax.checkpoints.weights import check_params, load_part, load_weights, save_part, save_weights
from llamavid_jax.errors import CheckpointError
from llamavid_jax.parallel.mesh import make_mesh


@pytest.fixture(scope="module")
def part() -> dict[str, jax.Array]:
    """Every stored dtype, sharded, replicated or on one device; zeros, which need no file."""
    draw, mesh = np.random.default_rng(0), make_mesh(fsdp=4, tensor=2)

    def place(value: np.ndarray, dtype: str, *axes: str) -> jax.Array:
        return jax.device_put(value.astype(dtype), NamedSharding(mesh, PartitionSpec(*axes)))

    return {
        "a.kernel": place(draw.standard_normal((16, 12)), "float32", "fsdp", "tensor"),
        "a.bias": place(draw.standard_normal(12), "bfloat16"),
        "b.0.qvalue": place(draw.integers(-8, 8, (8, 10)), "int4", "fsdp"),
        "b.1.qvalue": place(draw.integers(-128, 128, (8, 10)), "int8", None, "tensor"),
        "scale": jnp.float32(3),
        "zero": jnp.zeros((4, 3)),
    }


@pytest.mark.sharding
def test_a_flipped_bit_of_a_saved_part(part, tmp_path):
    save_part(tmp_path, part)
    assert_told_or_harmless(tmp_path, lambda: jax.tree.map(np.asarray, load_part(tmp_path, part)), least=85)


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_a_flipped_bit_of_converted_weights(quantize, tmp_path):
    """In some of the converted arrays, read and checked as by `load_weights` and the conversion back to PyTorch."""
    convert(ORIGINAL, tmp_path / "out", quantize=quantize)
    folder, kept = tmp_path / "out/weights", ("llama.layers.attn.q.kernel", "llama.norm.scale", "visual_tokens.")
    for array in folder.glob("*.*/"):
        if not array.name.startswith(kept):
            shutil.rmtree(array)
    shapes = {path: store.shape for path, store in Arrays(folder).items()}

    def read() -> dict[str, np.ndarray]:
        arrays = Arrays(folder)
        check_params(folder, arrays, shapes)
        return {path: arrays.read(path) for path in arrays}

    assert_told_or_harmless(folder, read, least=85)


def test_the_shipped_model_has_sums():
    for file in (ROOT / "demo/model/weights").glob("*/zarr.json"):
        assert json.loads(file.read_text())["codecs"][-1]["name"] == "crc32c"
    assert len(Arrays(ROOT / "demo/model/weights")) == 78


@pytest.mark.sharding
def test_orbax_reads_it_and_is_read(part, tmp_path):
    """Orbax's own folders have no checksums: damage of their index is reported, damage of values goes unnoticed."""
    save_part(tmp_path / "new", part)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore((tmp_path / "new/weights").absolute())
        checkpointer.save((tmp_path / "old/weights").absolute(), nest(part))
    jax.tree.map(np.testing.assert_array_equal, restored, nest(part))
    assert (tmp_path / "old/weights/manifest.ocdbt").is_file()
    for path, value in load_part(tmp_path / "old", part).items():
        assert value.dtype == part[path].dtype and value.sharding == part[path].sharding
        np.testing.assert_array_equal(value, part[path])
    os.truncate(tmp_path / "old/weights/manifest.ocdbt", 40)
    with pytest.raises(CheckpointError, match=r"is damaged \(.*manifest\.ocdbt.*; copy it again"):
        load_part(tmp_path / "old", part)


def test_what_is_missing_is_named(tmp_path, capfd):
    with pytest.raises(CheckpointError, match="is not an Orbax checkpoint"):
        Arrays(tmp_path)
    convert(ORIGINAL, tmp_path)
    weights = tmp_path / "weights"
    (weights / "_METADATA").write_text("{")  # Orbax's file, which we do not read
    load_weights(tmp_path, CONFIG)
    (weights / "llama.norm.scale/c/0").unlink()
    with pytest.raises(CheckpointError, match=r'llama\.norm\.scale/c/0" is missing\); convert again'):
        load_weights(tmp_path, CONFIG)
    shutil.rmtree(weights / "llama.norm.scale")
    with pytest.raises(CheckpointError, match=r"1 missing \(llama\.norm\.scale\)"):
        load_weights(tmp_path, CONFIG)
    assert not capfd.readouterr().err


def test_chunks_are_small_and_equal():
    for shape in ((32003, 4096), (40, 5120, 13824), (30523, 768), (7, 11, 2_000_003), (3,)):
        chunk = chunk_shape(shape, 4)
        assert all(size % part == 0 for size, part in zip(shape, chunk, strict=True))
        assert CHUNK_BYTES / 8 < np.prod(chunk) * 4 <= CHUNK_BYTES or chunk == shape


@pytest.mark.sharding
def test_a_chunk_is_of_one_device(part, tmp_path):
    save_part(tmp_path, part)
    files = {str(file.relative_to(tmp_path / "weights")) for file in (tmp_path / "weights").rglob("c/**/*")}
    assert {f"a.kernel/c/{row}/{column}" for row in range(4) for column in range(2)} <= files
    assert {"a.bias/c/0", "scale/c", "zero/c/0/0", "b.0.qvalue/c/3/0"} <= files | {"scale/c"}


SAVES = """
import resource, sys
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from llamavid_jax.checkpoints.weights import save_weights
from llamavid_jax.errors import CheckpointError
from llamavid_jax.parallel.mesh import make_mesh

def place(seed, dtype, *axes):
    value = np.random.default_rng(seed).standard_normal((16, 12)).astype(dtype)
    sharding = NamedSharding(make_mesh(fsdp=4, tensor=2), PartitionSpec(*axes))
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

params = {"cut": place(0, "float32", "fsdp", "tensor"), "some": place(1, "bfloat16", None, "tensor")}
save_weights(arguments[0], params | {"whole": place(2, "float32"), "host": np.arange(12, dtype="int8")})
if process == 1:  # longer files fail, as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))
try:
    save_weights(arguments[0] + "-full", params)
except CheckpointError as error:
    print(error)
"""


@pytest.mark.sharding
def test_two_processes(tmp_path):
    """Each writes its shards, with checksums; if one cannot, both report it and leave no files."""
    outputs = two_processes(SAVES, str(tmp_path / "saved"))
    for output, reason in zip(outputs, ("another process cannot write its part", "File too large"), strict=True):
        assert "saved-full/weights cannot be written (" in output and reason in output, outputs
    assert not list((tmp_path / "saved-full").iterdir())
    for file in (tmp_path / "saved/weights").glob("*/zarr.json"):
        assert json.loads(file.read_text())["codecs"][-1]["name"] == "crc32c"
    files = {str(file.relative_to(tmp_path / "saved/weights")) for file in tmp_path.glob("saved/weights/*/c/**/*")}
    assert {f"cut/c/{row}/{column}" for row in range(4) for column in range(2)} <= files

    def read() -> dict[str, np.ndarray]:
        arrays = Arrays(tmp_path / "saved/weights")
        check_params("saved", arrays, {name: (16, 12) for name in ("cut", "some", "whole")} | {"host": (12,)})
        return {path: arrays.read(path) for path in arrays}

    np.testing.assert_array_equal(read()["cut"], np.random.default_rng(0).standard_normal((16, 12)).astype("float32"))
    assert_told_or_harmless(tmp_path / "saved", read, least=75)


def test_no_room(tmp_path):
    """Files over 20,000 bytes fail, as on a full disk: an error of one line, and no files are left."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"weights cannot be written \(.*; free space there") as raised:
            save_weights(tmp_path, {"a.kernel": np.zeros(100_000, np.float32)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(raised.value) and not list(tmp_path.iterdir())
