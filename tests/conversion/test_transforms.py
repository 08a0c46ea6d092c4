"""What conversion does beyond moving axes: fused biases and position tables."""

import itertools

import numpy as np
import pytest
import torch

from conversion.stored_tensor import CheckpointError
from conversion.transforms import resize_positions, to_jax
from llamavid_jax.weights.row import TorchWeight


def test_a_key_bias_is_an_error():
    weight = TorchWeight("x.qkv.bias", 2, "vision.blocks.attn.v_bias", 0, "(n h) -> n h", (2, 2), (12,))
    value = np.arange(12.0)
    with pytest.raises(CheckpointError, match=r"x\.qkv\.bias has a key bias that is not zero"):
        to_jax(value, weight)
    value[4:8] = 0
    np.testing.assert_array_equal(to_jax(value, weight), [[8, 9], [10, 11]])


@pytest.mark.parametrize("old,new", [(16, 24), (24, 16), (4, 5), (7, 3), (1, 2), (16, 16)])
def test_positions_are_resized_as_torch_does(old, new):
    table = np.random.default_rng(0).standard_normal((1 + old * old, 5)).astype(np.float32)
    grid = torch.tensor(table[1:]).reshape(1, old, old, 5).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    expected = grid.permute(0, 2, 3, 1).reshape(-1, 5).numpy()
    resized = resize_positions(table, new)
    np.testing.assert_array_equal(resized[0], table[0])
    assert np.linalg.norm(resized[1:] - expected) / np.linalg.norm(expected) < 2e-6  # measured: up to 5e-7


def test_positions_of_the_original(golden):
    found = 0
    for file in golden.rglob("expected.npz"):
        expected = np.load(file)
        tables = {name: expected[name][0] for name in expected.files if name.startswith("pos_embed_")}
        for (_, old), (name, new) in itertools.permutations(tables.items(), 2):
            resized = resize_positions(old, int(name.split("x")[-1]))
            if len(old) < len(new):
                assert np.linalg.norm(resized - new) / np.linalg.norm(new) < 1e-5
                found += 1
    assert found


def test_positions_need_a_square():
    with pytest.raises(CheckpointError, match="12 rows; one CLS row and a square number"):
        resize_positions(np.zeros((12, 4), np.float32), 4)
