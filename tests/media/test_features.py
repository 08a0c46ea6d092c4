"""Precomputed features: one flipped bit in an archive is reported or harmless."""

import concurrent.futures
import gc
import time

import numpy as np
import pytest
from damage import assert_told_or_harmless

from llamavid_jax.evaluation.replies import read_leniently, read_original
from llamavid_jax.media.features import iter_features, read_header


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_flipped_bit_of_an_archive(save, tmp_path):
    """Anywhere: in the values, the text, or the directory, where it could hide an entry."""
    feats = np.random.default_rng(0).standard_normal((3, 5, 4)).astype(np.float16)
    save(tmp_path / "f.npz", feats=feats, inputs="<image>a" * 3)

    def read() -> dict[str, np.ndarray]:
        frames = list(iter_features(tmp_path / "f.npz"))
        return {"frames": np.stack(frames), "inputs": np.array(read_header(tmp_path / "f.npz").inputs or "")}

    assert_told_or_harmless(tmp_path, read, least=50)


def test_a_directory_that_hides_the_text(tmp_path):
    """The first entry's comment is made long enough to swallow the second entry."""
    np.savez(tmp_path / "f.npz", feats=np.ones((3, 5, 4), np.float16), inputs="<image>a" * 3)
    data = bytearray((tmp_path / "f.npz").read_bytes())
    data[data.index(b"PK\1\2") + 33] ^= 1  # makes the comment 256 bytes long
    (tmp_path / "f.npz").write_bytes(data)
    with pytest.raises(ValueError, match=r"f\.npz .*its directory has 1 of 2 entries"):
        read_header(tmp_path / "f.npz")


@pytest.mark.parametrize("kind", ["npy", "npz", "reply"])
def test_threads_that_read_literals(kind, tmp_path):
    """A callback switches threads at every garbage collection, which may happen wherever objects are created."""
    np.save(tmp_path / "f.npy", feats := np.zeros((3, 4, 2), np.float16))
    np.savez(tmp_path / "f.npz", feats=feats, inputs="<image>a" * 3)
    reply = "{'pred': 'yes', 'score': 4}"

    def read(depth: int) -> None:
        if depth:  # the bug compares the depths of two threads
            return read(depth - 1)
        for _ in range(20):
            if kind == "reply":
                assert read_original(reply, ("pred",)).score == read_leniently(reply, ("pred",)).score == 4
            else:
                assert read_header(tmp_path / f"f.{kind}").frames == 3

    def change_hands(*_) -> None:
        time.sleep(0.0002)

    before = gc.get_threshold()
    gc.callbacks.append(change_hands)
    gc.set_threshold(20)
    try:
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            for _ in pool.map(read, (0, 5, 10, 15)):
                pass
    finally:
        gc.set_threshold(*before)
        gc.callbacks.remove(change_hands)
