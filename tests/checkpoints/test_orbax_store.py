"""The checkpoint on disk: read whole or in shards, written in little memory, absent when the writer was killed."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
from converted import CONFIG, ORIGINAL, convert
from jax.sharding import NamedSharding, PartitionSpec
from paths import ROOT

from conversion.orbax_store import layer_chunk
from conversion.read_torch import read_checkpoint
from conversion.torch_config import original_config
from llamavid_jax.checkpoints.arrays import CHUNK_BYTES, Arrays
from llamavid_jax.config.parts import LlamaConfig
from llamavid_jax.config.schema import LLaMAVIDLlavaConfig
from llamavid_jax.errors import ConfigError
from llamavid_jax.weights.files import weight_table


def test_chunks_are_layers_or_parts_of_them():
    def chunk(shape, dtype, stacked):
        return layer_chunk(jax.ShapeDtypeStruct(shape, dtype), stacked)

    assert chunk((39, 1408), "bfloat16", True) == (39, 1408)  # small: whole
    assert chunk((32, 4096, 32, 128), "bfloat16", True) == (1, 4096, 32, 128)
    assert chunk((32, 4096, 11008), "bfloat16", True) == (1, 4096, 2752)
    for shape, stacked in (((32003, 4096), False), ((40, 5120, 13824), True), ((30523, 768), False)):
        found = chunk(shape, "float32", stacked)
        assert CHUNK_BYTES / 4 < np.prod(found) * 4 <= CHUNK_BYTES
        assert all(size % part == 0 for size, part in zip(shape, found, strict=True))
        assert np.prod([size // part for size, part in zip(shape, found, strict=True)]) < 800  # files


@pytest.mark.sharding
def test_restore_onto_eight_devices(tmp_path):
    """Each leaf is sharded over its last divisible axis and read as bfloat16, as `from_pretrained` does on a mesh."""
    convert(ORIGINAL, tmp_path / "out")
    mesh = jax.make_mesh((8,), ("x",))

    def target(leaf):
        axes = [axis for axis, size in enumerate(leaf.shape) if size % 8 == 0][-1:]
        spec = PartitionSpec(*("x" if axis in axes else None for axis in range(leaf.ndim)))
        return jax.ShapeDtypeStruct(leaf.shape, "bfloat16", sharding=NamedSharding(mesh, spec))

    with ocp.StandardCheckpointer() as checkpointer:
        plain = checkpointer.restore(tmp_path / "out/weights")
        sharded = checkpointer.restore(tmp_path / "out/weights", jax.tree.map(target, plain))
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(sharded))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), b.astype("bfloat16")), sharded, plain)


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """1.3 GB in one shard, 400 MB in one stacked parameter; the file is sparse."""
    text = LlamaConfig(512, 1024, 8192, 25, 8, 8, 128)
    config = dataclasses.replace(CONFIG, text_config=text)
    folder = tmp_path_factory.mktemp("large")
    values = {w.name: torch.empty(w.shape, dtype=torch.bfloat16) for w in weight_table(config, "original")}
    with torch.serialization.skip_data():
        torch.save(values, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(original_config(config)))
    yield folder
    shutil.rmtree(folder)


MEASURED = """
import pathlib, re, sys
from conversion import orbax_store, torch_to_jax
code = torch_to_jax.main(sys.argv[1:])
print(re.search(r"VmHWM:\\s*(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])
sys.exit(code)
"""


def run(*arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-c", MEASURED, *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_memory_is_that_of_one_tensor(large, tmp_path):
    """Peak memory beyond that of a tiny conversion is less than one stacked parameter (400 MB of the file's 1.3 GB)."""
    peaks = []
    for source, out in ((ORIGINAL, "tiny"), (large, "large")):
        process = run(str(source), str(tmp_path / out))
        output, errors = process.communicate()
        assert process.returncode == 0, errors
        peaks.append(int(output) / 1024)
    assert read_checkpoint(large)["model.layers.0.mlp.gate_proj.weight"].nbytes == 16 << 20
    assert np.prod(Arrays(tmp_path / "large/weights")["llama.layers.mlp.gate.kernel"].shape) * 2 == 400 << 20
    assert peaks[1] - peaks[0] < 380, peaks  # measured: 267
    shutil.rmtree(tmp_path / "large")


def test_a_killed_conversion_leaves_nothing_that_loads(large, tmp_path):
    process = run(str(large), str(tmp_path / "out"))
    deadline = time.monotonic() + 1200
    while not list(tmp_path.glob("out.partial/weights/llama.layers.mlp.down.kernel/c/[0-9]*")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match=r"config\.json does not exist"):
        LLaMAVIDLlavaConfig.from_pretrained(tmp_path / "out.partial")
    convert(ORIGINAL, tmp_path / "out")  # the leftovers, with their lock, do not block a new conversion
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
