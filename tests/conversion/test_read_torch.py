"""The readers against torch and safetensors as independent writers, and against files that lie."""

import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from paths import GOLDEN

from conversion.read_torch import read_checkpoint
from llamavid_jax.errors import CheckpointError


def some_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(6, 8, generator=generator)
    found = {str(dtype): torch.randn(3, 5, generator=generator).to(dtype) for dtype in torch_floats()}
    found |= {
        str(dtype): torch.arange(-4, 8).reshape(3, 4).to(dtype) for dtype in (torch.int64, torch.int32, torch.int8)
    }
    found |= {"bool": torch.tensor([True, False]), "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3)}
    return found | {"whole": base, "transposed": base.t(), "part": base[2:5, 1::3], "expanded": base[:1].expand(4, 8)}


def torch_floats():
    return torch.float64, torch.float32, torch.float16, torch.bfloat16


def assert_same(read: dict, expected: dict[str, torch.Tensor]) -> None:
    assert read.keys() == expected.keys()
    for name, tensor in expected.items():
        value = read[name].read()
        assert (value.shape, str(value.dtype)) == (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        assert read[name].shape == value.shape and read[name].dtype == value.dtype and value.flags.c_contiguous
        bits = tensor.contiguous().reshape(-1).view(torch.uint8)
        np.testing.assert_array_equal(value.reshape(-1).view(np.uint8), bits.numpy(), err_msg=name)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_torch_files(tmp_path, zipped):
    """All dtypes and strides, and storages shared by several tensors."""
    torch.save(some_tensors(), tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    assert_same(read_checkpoint(tmp_path / "a.pth"), some_tensors())


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_state_dict_with_parameters_and_other_values(tmp_path, zipped):
    """A training checkpoint: the weights are in 'model', beside numbers and strings."""
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    values = {"model": module.state_dict(), "epoch": 3, "name": "run", "dtype": torch.float16}
    torch.save(values, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    assert_same(read_checkpoint(tmp_path / "a.pth"), module.state_dict())
    parameters = dict(module.named_parameters())
    torch.save(parameters, tmp_path / "b.pth", _use_new_zipfile_serialization=zipped)
    assert_same(read_checkpoint(tmp_path / "b.pth"), {name: value.detach() for name, value in parameters.items()})


def test_nested_dictionaries_are_joined_by_dots(tmp_path):
    torch.save({"a": {"b": torch.ones(2)}, "c": torch.zeros(1)}, tmp_path / "a.bin")
    assert_same(read_checkpoint(tmp_path), {"a.b": torch.ones(2), "c": torch.zeros(1)})


def test_safetensors(tmp_path):
    tensors = {name: tensor.contiguous().clone() for name, tensor in some_tensors().items()}
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_same(read_checkpoint(tmp_path), tensors)


def write_index(folder: Path, weight_map: dict, name: str = "pytorch_model.bin.index.json") -> None:
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_shards(tmp_path, suffix):
    """Weights come from the shard that the index names; weights missing from the index are found too."""
    shards = [{"a": torch.ones(2), "b": torch.zeros(3)}, {"b": torch.full((3,), 7.0), "forgotten": torch.ones(1)}]
    for number, shard in enumerate(shards):
        save = torch.save if suffix == "bin" else safetensors.torch.save_file
        save(shard, tmp_path / f"{number}.{suffix}")
    stem = {"bin": "pytorch_model", "safetensors": "model"}[suffix]
    weight_map = {"a": f"0.{suffix}", "b": f"1.{suffix}"}
    write_index(tmp_path, weight_map, f"{stem}.{suffix}.index.json")
    assert_same(read_checkpoint(tmp_path), {"a": torch.ones(2), "b": torch.full((3,), 7.0), "forgotten": torch.ones(1)})


def test_golden_shards_equal_torch():
    for folder in sorted({path.parent for path in GOLDEN.rglob("*.bin")}):
        expected = {}
        for shard in folder.glob("*.bin"):
            expected |= torch.load(shard, weights_only=True)
        assert_same(read_checkpoint(folder), expected)


class Payload:
    """Pickles as a call; actually unpickling it would create the file `executed`."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("kind", ["system", "eval", "open", "getattr", "numpy"])
def test_code_is_refused_by_name_and_not_run(tmp_path, zipped, kind):
    executed = tmp_path / "executed"
    payload, name = {
        "system": (Payload(os.system, f"touch {executed}"), "posix.system"),
        "eval": (Payload(eval, f"open({str(executed)!r}, 'w')"), "builtins.eval"),
        "open": (Payload(open, str(executed), "w"), f"{open.__module__}.open"),  # "_io" from Python 3.12 on
        "getattr": (Payload(getattr, Path(executed), "touch"), "builtins.getattr"),
        "numpy": (Payload(np.load, str(executed)), "numpy.load"),
    }[kind]
    torch.save({"a": torch.ones(2), "b": [payload]}, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=rf"a\.pth names {name}; only tensors are read"):
        read_checkpoint(tmp_path / "a.pth")
    assert not executed.exists()


def test_a_bare_pickle_is_not_run(tmp_path):
    (tmp_path / "a.bin").write_bytes(pickle.dumps(Payload(os.system, f"touch {tmp_path}/executed")))
    with pytest.raises(CheckpointError, match=r"names posix\.system"):
        read_checkpoint(tmp_path / "a.bin")
    assert not (tmp_path / "executed").exists()


def cut(file: Path, keep: float) -> None:
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * keep)])


def rezip(file: Path, change) -> None:
    """Rewrites a torch zip with `change(name, data)` → data, or None to drop the entry."""
    with zipfile.ZipFile(file) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in entries.items():
            if (data := change(name, data)) is not None:
                archive.writestr(name, data)


def write_safetensors_header(file: Path, header: object, data: bytes = b"") -> None:
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def save(folder: Path, value: object = None, zipped: bool = True) -> Path:
    value = {"a": torch.ones(64, 64), "b": torch.ones(64)} if value is None else value
    torch.save(value, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    return folder / "pytorch_model.bin"


def safetensors_entry(**changes) -> dict:
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


MALFORMED = {
    "missing folder": (lambda d: d.rmdir(), "does not exist"),
    "empty folder": (lambda d: None, "holds no weight file"),
    "two files without index": (lambda d: [(d / n).write_bytes(b"x") for n in ("a.bin", "b.bin")], "no index"),
    "empty file": (lambda d: (d / "pytorch_model.bin").touch(), "is empty"),
    "a text": (lambda d: (d / "pytorch_model.bin").write_text("version https://git-lfs"), "not a PyTorch checkpoint"),
    "truncated zip": (lambda d: cut(save(d), 0.5), "truncated or damaged"),
    "truncated legacy data": (lambda d: cut(save(d, zipped=False), 0.7), "truncated"),
    "truncated legacy pickle": (lambda d: cut(save(d, zipped=False), 0.005), "not a PyTorch checkpoint"),
    "zip without data.pkl": (lambda d: rezip(save(d), lambda n, x: None if "pkl" in n else x), "without data.pkl"),
    "zip without a storage": (lambda d: rezip(save(d), lambda n, x: None if "data/1" in n else x), "lacks the entry"),
    "short storage": (lambda d: rezip(save(d), lambda n, x: x[:99] if "data/0" in n else x), "longer than its storage"),
    "big-endian": (lambda d: rezip(save(d), lambda n, x: b"big" if "byteorder" in n else x), "big-endian"),
    "damaged pickle": (lambda d: rezip(save(d), lambda n, x: x[:50] if "pkl" in n else x), "is damaged"),
    "a list": (lambda d: save(d, [torch.ones(2)]), "holds a list"),
    "one tensor": (lambda d: save(d, torch.ones(2)), "dictionary of weights is needed"),
    "no tensor": (lambda d: save(d, {"epoch": 3}), "holds no tensor"),
    "missing shard": (lambda d: write_index(d, {"a": "gone.bin"}), "names the shard gone.bin, which does not exist"),
    "missing key": (lambda d: write_index(d, {"c": save(d).name}), "maps c to pytorch_model.bin, which does not"),
    "shard elsewhere": (lambda d: write_index(d, {"a": "../b.bin"}), "a file name in the same folder"),
    "index without map": (lambda d: (d / "pytorch_model.bin.index.json").write_text("{}"), "has no 'weight_map'"),
    "index not JSON": (lambda d: (d / "pytorch_model.bin.index.json").write_text("{"), "not readable JSON"),
    "index a list": (lambda d: (d / "pytorch_model.bin.index.json").write_text("[]"), "holds a JSON list"),
    "short header": (lambda d: (d / "model.safetensors").write_bytes(b"abc"), "truncated or not a safetensors file"),
    "long header": (lambda d: (d / "model.safetensors").write_bytes(b"\xff" * 90), "truncated or not a safetensors"),
    "header a list": (lambda d: write_safetensors_header(d / "model.safetensors", [1]), "damaged header"),
    "header without dtype": (lambda d: write_safetensors_header(d / "model.safetensors", {"a": {}}), "damaged header"),
    "8-bit floats": (
        lambda d: write_safetensors_header(d / "model.safetensors", safetensors_entry(dtype="F8_E4M3"), b"12345678"),
        "stored as F8_E4M3",
    ),
    "missing data": (
        lambda d: write_safetensors_header(d / "model.safetensors", safetensors_entry(), b"1234"),
        "does not fit the file",
    ),
    "wrong size": (
        lambda d: write_safetensors_header(d / "model.safetensors", safetensors_entry(shape=[3]), b"12345678"),
        "does not fit the file",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed(tmp_path, case):
    """Each error is one sentence that names the file."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    make, message = MALFORMED[case]
    make(folder)
    with pytest.raises(CheckpointError, match="checkpoint") as caught:
        read_checkpoint(folder)
    assert message in str(caught.value)


def test_compressed_zip(tmp_path):
    file = save(tmp_path)
    with zipfile.ZipFile(file) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    with pytest.raises(CheckpointError, match="was compressed or encrypted after saving"):
        read_checkpoint(file)
