"""Files made to cost memory, time or the interpreter, and damaged ones: each is one sentence, at once."""

import json
import os
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from damage import assert_told_or_harmless

from conversion.read_gguf import read_gguf
from conversion.read_torch import read_checkpoint
from conversion.sources import unwrapped
from conversion.stored_tensor import check_sum
from conversion.sums import sha256_sums, verify
from llamavid_jax import pickles
from llamavid_jax.errors import CheckpointError

PROTO, STOP, MARK = b"\x80\x02", b".", b"("


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def call(module: str, name: str, arguments: bytes) -> bytes:
    return f"c{module}\n{name}\n".encode() + MARK + arguments + b"tR"


def tensor(size: int = 4, stride: int = 1, offset: int = 0) -> bytes:
    """The pickle of a tensor with `size` numbers of storage 0."""
    storage = MARK + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x04tQ"
    numbers = [b"\x8a\x08" + struct.pack("<q", number) for number in (offset, size, stride)]
    hooks = call("collections", "OrderedDict", b"")
    return call(
        "torch._utils",
        "_rebuild_tensor_v2",
        storage + numbers[0] + numbers[1] + b"\x85" + numbers[2] + b"\x85\x89" + hooks,
    )


def write_zip(folder: Path, body: bytes, data: bytes = bytes(16), byteorder: bytes = b"little", deflate=()) -> None:
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as archive:
        for name, content in {"data.pkl": PROTO + body + STOP, "byteorder": byteorder, "data/0": data}.items():
            kind = zipfile.ZIP_DEFLATED if name in deflate else zipfile.ZIP_STORED
            archive.writestr(f"archive/{name}", content, kind)


def one(name: str, value: bytes) -> bytes:
    """The pickle of `{name: value}`."""
    return b"}" + text(name) + value + b"s"


def shared_dictionaries(levels: int) -> bytes:
    """Each dictionary holds the one below ten times, so that 10**levels paths lead to the tensor."""
    body = one("t", tensor()) + b"q\x00"
    for level in range(1, levels):
        entries = b"".join(text(str(i)) + b"h" + bytes([level - 1]) for i in range(10))
        body += b"}" + MARK + entries + b"u" + b"q" + bytes([level])
    return body


def edit_zip(folder: Path, old: bytes, new: bytes, **options) -> None:
    write_zip(folder, one("w", tensor()), **options)
    file = folder / "pytorch_model.bin"
    content = file.read_bytes()
    assert old in content
    file.write_bytes(content.replace(old, new))


def write_legacy(folder: Path, *bodies: bytes) -> None:
    magic = b"\x8a\x0a" + (0x1950A86A20F9469CFC6C).to_bytes(10, "little")
    content = b"".join(PROTO + body + STOP for body in (magic, b"M\xe9\x03", *bodies))
    (folder / "pytorch_model.bin").write_bytes(content)


def write_safetensors(folder: Path, header: bytes, data: bytes = bytes(8)) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data)


def entry(name: str = "a", shape: str = "[2]", offsets: str = "[0,8]", dtype: str = '"F32"') -> bytes:
    return f'{{"{name}":{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}}}}}'.encode()


def write_index(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors.index.json").write_bytes(content)


def pipe(folder: Path) -> None:
    os.mkfifo(folder / "pytorch_model.bin")


DIRECTORY = b"PK\x01\x02\x14\x03\x14\0"  # start of an entry in a zip's directory; flags and method follow
ORDERED = call("collections", "OrderedDict", b"")
LEGACY = one("little_endian", b"\x88"), one("w", tensor())
NESTED = b"[" * 9000 + b"]" * 9000
HOSTILE = {
    "memo by number": (lambda d: write_zip(d, b"}r\xff\xff\xff\x7f"), "holds no tensor"),
    "tuple as key": (lambda d: write_zip(d, b"}K\x00" + b"\x85" * 12_000 + b"K\x01s"), "neither text nor number"),
    "list as key": (lambda d: write_zip(d, b"}]K\x01s"), "neither text nor number"),
    "empty lists": (lambda d: write_zip(d, b"]" + MARK + b"]" * 20_000 + b"e"), "too many instructions"),
    "long pickle": (lambda d: write_zip(d, b"N0" * (9 << 20)), "save the weights alone"),
    "text beyond": (lambda d: write_zip(d, b"X\xff\xff\xff\x7fabc"), "is damaged"),
    "bytes beyond": (lambda d: write_zip(d, b"\x8e" + b"\xff" * 7 + b"\x3f"), "is damaged"),
    "huge number": (lambda d: write_zip(d, b"\x8b\xff\xff\xff\x7f"), "is damaged"),
    "no stack": (lambda d: write_zip(d, b"tR"), "is damaged"),
    "no end": (lambda d: write_zip(d, b"}" + b"X"), "is damaged"),
    "shared dictionaries": (lambda d: write_zip(d, shared_dictionaries(20)), "in two places"),
    "itself": (lambda d: write_zip(d, b"}q\x00" + text("a") + b"h\x00s"), "in two places"),
    "long name": (lambda d: write_zip(d, one("n" * 5000, tensor())), "which no weight has"),
    "escape in name": (lambda d: write_zip(d, one("\x1b[2Jx", tensor())), "which no weight has"),
    "method replaced": (lambda d: write_zip(d, ORDERED + one("items", b"K\x05") + b"b"), "holds no tensor"),
    "attribute of a call": (lambda d: write_zip(d, b"ctorch\nSize\n" + one("x", b"N") + b"b"), "a dict is missing"),
    "storage as function": (lambda d: write_zip(d, b"ctorch\nFloatStorage\n)R"), "calls what is no function"),
    "other instruction": (lambda d: write_zip(d, b"\x82\x01"), "instruction EXT1"),
    "stride 0": (lambda d: write_zip(d, one("w", tensor(1 << 60, 0))), "larger than its file"),
    "offset beyond": (lambda d: write_zip(d, one("w", tensor(4, 1, 1 << 40))), "longer than its storage"),
    "negative size": (lambda d: write_zip(d, one("w", tensor(-4))), "no valid shape"),
    "zip bomb": (lambda d: write_zip(d, b"}", byteorder=b"x" * (8 << 20), deflate=["byteorder"]), "or encrypted"),
    "compressed pickle": (lambda d: write_zip(d, b"N0" * (1 << 22), deflate=["data.pkl"]), "or encrypted"),
    "unknown method": (lambda d: edit_zip(d, DIRECTORY + bytes(4), DIRECTORY + b"\0\0\x63\0"), "or encrypted"),
    "encrypted": (lambda d: edit_zip(d, DIRECTORY + bytes(2), DIRECTORY + b"\x01\0"), "or encrypted"),
    "header elsewhere": (lambda d: edit_zip(d, b"PK\x03\x04", b"PK\x03\x05"), "truncated or damaged"),
    "keys no texts": (lambda d: write_legacy(d, *LEGACY, b"]]a"), "is truncated"),
    "keys no list": (lambda d: write_legacy(d, *LEGACY, b"K\x05"), "lacks the entry"),
    "a pipe": (pipe, "no plain file"),
    "safetensors nested": (lambda d: write_safetensors(d, b'{"a":' + NESTED + b"}"), "nested too deeply"),
    "safetensors shapes": (lambda d: write_safetensors(d, entry(shape=f"[{'9' * 4000}{',9' * 50}]")), "fit the file"),
    "safetensors texts": (lambda d: write_safetensors(d, entry(shape='["2"]')), "does not fit the file"),
    "safetensors type": (lambda d: write_safetensors(d, entry(dtype="[1]")), "damaged header"),
    "safetensors offsets": (lambda d: write_safetensors(d, entry(offsets="[0,8,9]")), "damaged header"),
    "safetensors name": (lambda d: write_safetensors(d, entry(name="n" * 600)), "which no weight has"),
    "index nested": (lambda d: write_index(d, NESTED), "not readable JSON"),
    "index above": (lambda d: write_index(d, b'{"weight_map": {"a": ".."}}'), "which does not exist"),
    "index of nothing": (lambda d: write_index(d, b'{"weight_map": {"a": "x\\u0000y"}}'), "a file name"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_checkpoints(tmp_path, case, monkeypatch):
    """Each is refused; the memory used is bounded by a multiple of the file's size."""
    monkeypatch.setattr(pickles, "MAX_INSTRUCTIONS", 1 << 14)
    make, message = HOSTILE[case]
    make(tmp_path)
    size = sum(file.stat().st_size for file in tmp_path.iterdir())
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError) as caught:
            read_checkpoint(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 150 * size + (2 << 20)
    finally:
        tracemalloc.stop()
    assert message in str(caught.value) and str(tmp_path) in str(caught.value)
    assert str(caught.value).isprintable()


def test_the_pickles_made_here_are_read(tmp_path):
    """The valid pickle that the hostile ones vary can be read."""
    write_zip(tmp_path, one("w", tensor()), data=np.arange(4, dtype=np.float32).tobytes())
    np.testing.assert_array_equal(read_checkpoint(tmp_path)["w"].read(), [0, 1, 2, 3])


def test_no_flipped_bit_of_the_numbers_is_silent(tmp_path):
    """The tensor is the whole storage, or only a part of it."""
    for size in (400, 7):
        write_zip(tmp_path, one("w", tensor(size)), data=bytes(range(100)) * 16)
        file = tmp_path / "pytorch_model.bin"
        content = file.read_bytes()
        begin = content.index(bytes(range(100)))
        for place in np.random.default_rng(0).integers(1600, size=50):
            damaged = bytearray(content)
            damaged[begin + place] ^= 1 << (place % 8)
            file.write_bytes(damaged)
            with pytest.raises(CheckpointError, match=r"do not have the CRC-32 .*download it again"):
                read_checkpoint(tmp_path)["w"].read()


def test_a_flipped_bit_of_a_bin_file(tmp_path):
    """Anywhere in the file: the numbers, the pickle, the names and the directory of the zip."""
    draw = torch.Generator().manual_seed(0)
    values = {f"{dtype}": torch.randn(10, 8, generator=draw).to(dtype) for dtype in (torch.float32, torch.bfloat16)}
    torch.save(values | {"view": torch.arange(100.0)[20:60].reshape(5, 8).t()}, tmp_path / "pytorch_model.bin")

    def read() -> dict[str, np.ndarray]:
        check_sum.cache_clear()
        return {name: tensor.read() for name, tensor in read_checkpoint(tmp_path).items()}

    assert_told_or_harmless(tmp_path, read, least=45)


def test_a_damaged_directory_of_a_zip(tmp_path):
    """Flipped bits in the directory's length make entries begin before the file does."""
    write_zip(tmp_path, one("w", tensor()), data=bytes(16))
    file = tmp_path / "pytorch_model.bin"
    content = bytearray(file.read_bytes())
    for bit in range(32):
        damaged = bytearray(content)
        damaged[len(content) - 10 + bit // 8] ^= 1 << (bit % 8)
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is truncated or damaged|without data\.pkl"):
            read_checkpoint(tmp_path)


def test_a_file_without_sums_is_read(tmp_path):
    """torch writes 0 as the CRC-32 if it is told not to compute it."""
    write_zip(tmp_path, one("w", tensor()), data=b"\x01" * 16)
    file = tmp_path / "pytorch_model.bin"
    content = file.read_bytes()
    with zipfile.ZipFile(file) as archive:
        crc = struct.pack("<I", archive.getinfo("archive/data/0").CRC)
    file.write_bytes(content.replace(crc, bytes(4)))
    assert read_checkpoint(tmp_path)["w"].read().shape == (4,)


def test_safetensors_before_an_index_of_bin(tmp_path):
    """As in transformers, model.safetensors takes precedence, even if the index's shards are missing."""
    write_safetensors(tmp_path, entry())
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"b": "gone.bin"}}))
    assert list(read_checkpoint(tmp_path)) == ["a"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["module.a", "module.b"], ["a", "b"]),
        (["module._orig_mod.a"], ["a"]),
        (["_orig_mod.module.a"], ["a"]),
        (["module.a", "b"], ["module.a", "b"]),
    ],
)
def test_names_of_wrapped_modules(names, expected):
    assert list(unwrapped(dict.fromkeys(names))) == expected


# ---- GGUF


def gguf(fields: bytes = b"", tensors: bytes = b"", counts=(0, 0), data: bytes = b"") -> bytes:
    architecture = gguf_text("general.architecture") + struct.pack("<I", 8) + gguf_text("llama")
    header = b"GGUF" + struct.pack("<IQQ", 3, counts[0], counts[1] + 1) + architecture + fields + tensors
    return header + bytes(-len(header) % 32) + data


def gguf_text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def gguf_tensor(name: str, shape: list[int], kind: int = 0, offset: int = 0) -> bytes:
    numbers = struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
    return gguf_text(name) + numbers


GGUF = {
    "other file": (b"PK\x03\x04" + bytes(60), "not a readable GGUF"),
    "empty": (b"", "not a readable GGUF"),
    "fields": (gguf(counts=(0, 1 << 60)), "goes beyond its header"),
    "tensors": (gguf(counts=(1 << 60, 0)), "goes beyond its header"),
    "texts": (gguf(gguf_text("a") + struct.pack("<IIQ", 9, 8, 1 << 60), counts=(0, 1)), "goes beyond its header"),
    "numbers": (gguf(gguf_text("a") + struct.pack("<IIQ", 9, 4, 1 << 62), counts=(0, 1)), "goes beyond its header"),
    "nested lists": (gguf(gguf_text("a") + struct.pack("<IIQ", 9, 9, 1), counts=(0, 1)), "not a readable GGUF"),
    "kind": (gguf(gguf_text("a") + struct.pack("<I", 99), counts=(0, 1)), "not a readable GGUF"),
    "axes": (gguf(tensors=gguf_text("a") + struct.pack("<I", 1 << 31), counts=(1, 0)), "goes beyond its header"),
    "shape": (gguf(tensors=gguf_tensor("token_embd.weight", [1 << 60, 1 << 60]), counts=(1, 0)), "goes beyond its end"),
    "quantised as": (gguf(tensors=gguf_tensor("token_embd.weight", [32], 999), counts=(1, 0)), "not a readable GGUF"),
    "no sizes": (gguf(tensors=gguf_tensor("token_embd.weight", [4, 2]), counts=(1, 0), data=bytes(64)), "not state"),
}  # fmt: skip


@pytest.mark.parametrize("case", GGUF)
def test_hostile_gguf(tmp_path, case):
    pytest.importorskip("gguf")
    content, message = GGUF[case]
    (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_gguf(tmp_path / "a.gguf")


# ---- checksums


def test_sums_of_the_sources(tmp_path):
    file, other = tmp_path / "model.safetensors", tmp_path / "config.json"
    file.write_bytes(b"weights")
    other.write_text("{}")
    sums, listing = sha256_sums([file, other]), tmp_path / "SHA256SUMS"
    listing.write_text(f"{sums[file]}  somewhere/{file.name}\n")
    verify(sums, listing)  # the listing has no line for config.json
    file.write_bytes(b"weightz")
    with pytest.raises(CheckpointError, match=r"model\.safetensors has the SHA-256 .* download it again"):
        verify(sha256_sums([file, other]), listing)
    for content, message in (("", "has no line for model.safetensors"), ("abc  model", "lines of SUM  NAME")):
        listing.write_text(content)
        with pytest.raises(CheckpointError, match=message):
            verify(sums, listing)
    with pytest.raises(CheckpointError, match="cannot be read"):
        verify(sums, tmp_path / "gone")
