"""The layout of a run's rows on its mesh."""

import dataclasses

import pytest

from llamavid_jax.errors import ConfigError
from llamavid_jax.parallel.mesh import make_mesh
from llamavid_jax.training.config import LoopConfig
from llamavid_jax.training.layout import check_rows, on_mesh


@pytest.mark.parametrize(
    "batch, rows, mesh, micro_batches",
    [
        (32, 1, {"fsdp": 8}, 4),
        (32, 4, {"fsdp": 8}, 1),
        (32, 8, {"fsdp": 8}, 1),
        (32, 4, {"fsdp": 2, "tensor": 4}, 4),  # devices that share rows count once
        (24, 5, {"data": 2}, 3),  # four rows at a time: a device's twelve are not divisible by five
        (32, 4, {}, 8),
    ],
)
def test_accumulation_follows_the_mesh(batch, rows, mesh, micro_batches):
    loop = on_mesh(LoopConfig(batch_size=batch, micro_batches=2, device_rows=rows), make_mesh(**mesh))
    assert (loop.micro_batches, loop.batch_size) == (micro_batches, batch)
    check_rows([], batch, micro_batches, make_mesh(**mesh))


def test_accumulation_stays_as_it_is_given():
    loop = LoopConfig(batch_size=32, micro_batches=4)
    assert on_mesh(loop, make_mesh(fsdp=8)) == loop


def test_a_mesh_that_does_not_divide_the_batch_is_refused():
    mesh = make_mesh(data=2, fsdp=4)
    loop = on_mesh(dataclasses.replace(LoopConfig(batch_size=12), device_rows=1), mesh)
    with pytest.raises(ConfigError, match=r"training\.batch_size is 12 .* = 8 does not divide"):
        check_rows([], 12, loop.micro_batches, mesh)
