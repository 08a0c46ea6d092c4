"""The feature file: it returns what was written, safetensors reads it too, and all damage is detected."""

import errno
import hashlib
import json
import os

import ml_dtypes
import numpy as np
import pytest
import safetensors
from damage import assert_told_or_harmless
from safetensors import safe_open
from safetensors.numpy import save_file

from llamavid_jax.media import feature_file
from llamavid_jax.media.feature_file import Description, FeatureWriter, quantized
from llamavid_jax.media.features import describe, iter_features, read_header
from llamavid_jax.media.source import MediaError

FEATS = np.random.default_rng(0).standard_normal((70, 5, 4)).astype(np.float32)  # CLS and four patches


def described(frames: int, **fields) -> Description:
    values = {
        "cls": True,
        "timestamps": [number / 3 for number in range(frames)],
        "source": {"name": "walk.mp4", "bytes": 7, "sha256": "ab"},
        "sampling": {"fps": 3.0, "rule": "stride", "seconds": frames / 3},
        "processing": {"size": 56, "mean": [0.5] * 3, "std": [0.5] * 3, "aspect": "crop"},
        "tower": {"sha256": "cd", "dtype": "bfloat16"},
    }
    return Description(**values | fields)


def write(path, feats=FEATS, dtype="BF16", **fields):
    writer = FeatureWriter(path, len(feats), dtype, fields.get("inputs") or "")
    for frame in feats:
        writer.add(frame)
    writer.commit(described(len(feats), **fields))
    return path


@pytest.mark.parametrize(("dtype", "kind"), [("BF16", ml_dtypes.bfloat16), ("F16", np.float16), ("F32", np.float32)])
def test_round_trip(dtype, kind, tmp_path):
    text = '<image>"où?"\\\n' * len(FEATS)
    path = write(tmp_path / "folder" / "walk.safetensors", FEATS.astype(kind), dtype, inputs=text)
    found = list(iter_features(path))
    assert found[0].dtype == kind
    np.testing.assert_array_equal(np.stack(found), FEATS.astype(kind)[:, 1:])
    np.testing.assert_array_equal(np.stack(list(iter_features(path, keep_cls=True))), FEATS.astype(kind))
    assert read_header(path) == (70, 4, 4, text)
    said = describe(path)
    assert said["timestamps"][1] == 1 / 3 and said["source"]["name"] == "walk.mp4" and said["error"] is None
    assert sorted(os.listdir(path.parent)) == [path.name]


def test_others_read_it_with_safetensors_alone(tmp_path):
    path = write(tmp_path / "a.safetensors", dtype="F16")
    with safe_open(path, framework="np") as opened:
        assert list(opened.keys()) == ["feats"]
        np.testing.assert_array_equal(opened.get_tensor("feats"), FEATS.astype(np.float16))
        text = opened.metadata()["llamavid_features"]
        assert hashlib.sha256(text.encode()).hexdigest() == opened.metadata()["sha256"]
        first = hashlib.sha256(FEATS.astype(np.float16)[:32].tobytes()).hexdigest()
    said = json.loads(text)
    assert said["sums"][0] == first and len(said["sums"]) == 3 and said["shape"] == [70, 5, 4]


def test_int8_and_its_error(tmp_path):
    wide = FEATS * np.array([1, 100, 0.01, 0], np.float32)  # channels of very different scales, one of zeros
    path = write(tmp_path / "a.safetensors", wide, "I8")
    found, said = np.stack(list(iter_features(path, keep_cls=True))), describe(path)
    assert found.dtype == np.float32
    error = found - wide
    assert said["error"]["relative"] == pytest.approx(np.sqrt((error**2).sum() / (wide**2).sum()), rel=1e-4)
    assert said["error"]["largest"] == pytest.approx(np.abs(error).max(), rel=1e-6)
    assert (np.abs(error) <= np.abs(wide).max(1, keepdims=True) / 254 * 1.001).all()  # half a quantization step
    assert path.stat().st_size < write(tmp_path / "b.safetensors", wide, "F32").stat().st_size
    with safe_open(path, framework="np") as opened:
        alone = opened.get_tensor("feats") * opened.get_tensor("scales")[:, None]
    np.testing.assert_array_equal(alone, found)


def test_int8_of_one_frame():
    stored, scale = quantized(np.array([[1.0, -2.0], [-0.5, 4.0]]))
    np.testing.assert_array_equal(stored, [[127, -64], [-64, 127]])
    np.testing.assert_allclose(scale, [1 / 127, 4 / 127])


@pytest.mark.parametrize("dtype", ["BF16", "I8"])
def test_one_flipped_bit_is_told(dtype, tmp_path):
    """A flipped bit in an array, a checksum or the description."""
    path = write(tmp_path / "a.safetensors", FEATS[:40], dtype, inputs="<image>a" * 40)

    def read() -> dict[str, np.ndarray]:
        frames, said = np.stack(list(iter_features(path, keep_cls=True))), describe(path)
        texts = json.dumps(said) + str(read_header(path))
        return {"frames": frames.astype(np.float32), "said": np.array(texts)}

    assert_told_or_harmless(tmp_path, read, least=25)  # half of the file is padding after the header


def test_frames_before_the_damage_are_right_and_those_after_it_never_come(tmp_path):
    path = write(tmp_path / "a.safetensors", dtype="F32")
    data = bytearray(path.read_bytes())
    data[-5] ^= 4  # in the last block of frames, 64 to 69
    path.write_bytes(data)
    seen = []
    with pytest.raises(MediaError, match=r"a\.safetensors .*frames 64 to 69 do not have the SHA-256"):
        for frame in iter_features(path, keep_cls=True):
            seen.append(frame)
    np.testing.assert_array_equal(np.stack(seen), FEATS[:64])


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_file_that_is_cut_is_told(share, tmp_path):
    path = write(tmp_path / "a.safetensors")
    path.write_bytes(path.read_bytes()[: max(1, int(share * path.stat().st_size))])
    with pytest.raises(MediaError, match="no file of features, or damaged"):
        read_header(path)


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    writer = FeatureWriter(tmp_path / "a.safetensors", 4, "BF16")
    writer.add(FEATS[0])
    real = writer._file

    class Full:
        def __getattr__(self, name):
            return getattr(real, name)

        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    writer._file = Full()
    with pytest.raises(OSError, match="No space left"):
        writer.add(FEATS[1])
    assert not os.listdir(tmp_path)


def test_what_a_killed_process_left_goes_and_what_another_writes_stays(tmp_path):
    left, other = tmp_path / ".a.safetensors.1.f.part", tmp_path / ".ab.safetensors.1.f.part"
    left.write_bytes(b"half")
    other.write_bytes(b"half")  # of another file
    first = FeatureWriter(tmp_path / "a.safetensors", 1, "BF16")
    second = FeatureWriter(tmp_path / "a.safetensors", 1, "BF16")
    assert {path.name for path in tmp_path.iterdir()} == {first.aside.name, second.aside.name, other.name}
    for writer in (first, second):
        writer.add(np.ones((5, 4), np.float32))
        writer.commit(described(1))
    assert {path.name for path in tmp_path.iterdir()} == {"a.safetensors", other.name}


def test_what_a_type_cannot_hold_is_said(tmp_path):
    for dtype, value, message in (
        ("F16", 1e6, "F16 cannot hold"),
        ("I8", np.inf, "not finite"),
        ("F32", np.nan, "not"),
    ):
        writer = FeatureWriter(tmp_path / "a.safetensors", 1, dtype)
        with pytest.raises(MediaError, match=f"frame 0 has features that .*{message}"):
            writer.add(np.full((4, 3), value, np.float32))
    assert not os.listdir(tmp_path)


def resealed(path, **changes):
    """The file with other fields in its JSON and a checksum that matches them."""
    with safe_open(path, framework="np") as opened:
        metadata, feats = opened.metadata(), opened.get_tensor("feats")
    said = json.loads(metadata["llamavid_features"])
    text = json.dumps({key: value for key, value in (said | changes).items() if value != "absent"})
    metadata = {"llamavid_features": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    save_file({"feats": feats}, path, metadata=metadata)
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"version": 2}, "has version 2 of the format, not 1"),
        ({"sums": []}, "its arrays are not those of its description"),
        ({"shape": [70, 4, 5]}, "its arrays are not those of its description"),
        ({"dtype": "BF16"}, "its arrays are not those of its description"),
        ({"dtype": "I8"}, "its arrays are not those of its description"),
        ({"timestamps": [1.0]}, "one time for each frame"),
        ({"timestamps": [float("nan")] * 70}, "one time for each frame"),
        ({"cls": False}, "of CLS tokens"),
        ({"tower": "absent"}, "tower is missing"),
        ({"inputs": 7}, "inputs is missing"),
    ],
)
def test_what_the_description_says_must_be_so(changes, message, tmp_path):
    """Even if the checksums are right: another program may have written the file."""
    path = resealed(write(tmp_path / "a.safetensors", dtype="F16"), **changes)
    if message is None:
        assert len(list(iter_features(path))) == 70
        return
    with pytest.raises(MediaError, match=rf"a\.safetensors .*{message}"):
        read_header(path)


def test_reading_ahead_keeps_the_order():
    assert list(feature_file._ahead(lambda number: number * number, 20)) == [n * n for n in range(20)]


def test_a_file_that_is_replaced_while_it_is_opened(tmp_path, monkeypatch):
    """The description and the arrays come from one file, the new one."""
    path, other = write(tmp_path / "a.safetensors"), write(tmp_path / "b.safetensors", FEATS[:40] + 1)
    new = np.stack(list(iter_features(other)))
    opened = safetensors.safe_open

    def replaced(*arguments, **more):
        found = opened(*arguments, **more)
        if other.exists():
            other.replace(path)
        return found

    monkeypatch.setattr(safetensors, "safe_open", replaced)
    np.testing.assert_array_equal(np.stack(list(iter_features(path))), new)
