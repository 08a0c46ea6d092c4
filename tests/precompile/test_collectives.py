"""Data moved between devices, read from a program's text: one written by hand as for a TPU, one compiled for CPUs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from llamavid_jax.parallel.mesh import make_mesh
from llamavid_jax.precompile.collectives import Moved, _groups, collectives

TPU_TEXT = """HloModule jit_step, is_scheduled=true

%all-reduce-scatter.1 (input: f32[8,16]) -> f32[2,16] {
  %input = f32[8,16]{1,0:T(8,128)} parameter(0)
  %all-reduce.9 = f32[8,16]{1,0:T(8,128)} all-reduce(%input), channel_id=4, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %dynamic-slice.1 = f32[2,16]{1,0:T(8,128)} dynamic-slice(%all-reduce.9, %start), dynamic_slice_sizes={2,16}
}

%async_collective_fusion.1 (p0: bf16[16,64]) -> bf16[64,64] {
  %p0 = bf16[16,64]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.2 = bf16[64,64]{1,0:T(8,128)(2,1)S(1)} all-gather(%p0), channel_id=3, replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, dimensions={0}, frontend_attributes={chain_id="1"}
}

%async_collective_fusion.2 (p0: bf16[16,64]) -> bf16[64,64] {
  %p0 = bf16[16,64]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.3 = bf16[64,64]{1,0:T(8,128)(2,1)S(1)} all-gather(%p0), channel_id=3, replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, dimensions={0}, frontend_attributes={chain_id="1"}
}

%body (carry: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %carry = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}) parameter(0)
  %fusion.1 = bf16[64,64]{1,0:T(8,128)(2,1)} fusion(%x), kind=kOutput, calls=%async_collective_fusion.1, metadata={op_name="a"}
  %fusion.2 = bf16[64,64]{1,0:T(8,128)(2,1)} fusion(%x), kind=kOutput, calls=%async_collective_fusion.2
  %fusion.3 = f32[2,16]{1,0:T(8,128)} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %tuple = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}) tuple(%i, %z)
}

%condition (carry: (s32[], f32[8,16])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(32)
  ROOT %lt.1 = pred[]{:T(512)} compare(%get-tuple-element.1, %constant.1), direction=LT
}

ENTRY %main (p: f32[8,16]) -> f32[8,16] {
  %while.1 = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}) while(%tuple.0), condition=%condition, body=%body
  %all-reduce.1 = (f32[10]{0:T(128)}, /*index=1*/bf16[20]{0:T(128)}) all-reduce(%a, %b), channel_id=7, replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add
  %all-to-all.1 = f32[4,4]{1,0:T(8,128)} all-to-all(%c), channel_id=8, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %collective-permute-start.1 = (f32[100]{0:T(128)}, f32[100]{0:T(128)}) collective-permute-start(%d), channel_id=9, source_target_pairs={{0,4},{4,0}}
  ROOT %copy = f32[8,16]{1,0} copy(%get-tuple-element.2)
}
"""  # noqa: E501


def test_collectives_of_a_tpu_program():
    """The gather runs 32 times in two pieces each; a reduction of which only a slice is kept is a reduce-scatter."""
    found = collectives(TPU_TEXT)
    assert found["all-gather"] == Moved(32, 32, 32 * 64 * 64 * 2 * 3 / 4)
    assert found["reduce-scatter"] == Moved(32, 0, 32 * 8 * 16 * 4 * 3 / 4)
    assert found["all-reduce"] == Moved(1, 0, 2 * (10 * 4 + 20 * 2) * 3 / 4)
    assert found["all-to-all"] == Moved(1, 0, 4 * 4 * 4 * 3 / 4)
    assert found["collective-permute"] == Moved(1, 1, 400.0)


def test_a_collective_that_reaches_into_a_loop_counts_once():
    """Its second piece runs 32 times, its first once."""
    piece = "  %fusion.1 = bf16[64,64]{1,0:T(8,128)(2,1)} fusion(%x), kind=kOutput, calls=%async_collective_fusion.1\n"
    body, entry = TPU_TEXT.replace("calls=%async_collective_fusion.1,", "calls=%other,").split("ENTRY")
    body += "%other (p0: bf16[16,64]) -> bf16[16,64] {\n  ROOT %p0 = bf16[16,64]{1,0} parameter(0)\n}\n\n"
    found = collectives(f"{body}ENTRY{entry.replace('  ROOT', piece + '  ROOT')}")
    assert found["all-gather"] == Moved(1, 1, 64 * 64 * 2 * 3 / 4)


def test_what_crosses_from_slice_to_slice():
    """Devices 0-3 and 4-7: the reduction over 0, 2, 4, 6 crosses, the exchange within each half does not."""
    found = collectives(TPU_TEXT, slice_devices=4)
    assert found["all-reduce"].bytes_between_slices == found["all-reduce"].bytes
    assert found["collective-permute"].bytes_between_slices == 400
    assert found["all-to-all"].bytes_between_slices == 0
    assert found["all-gather"].bytes_between_slices == found["all-gather"].bytes  # 0, 2, 4, 6


def test_what_the_network_between_slices_brings():
    """An all-reduce of 8 × 128 float32; the type of `recv` also holds a token and a counter."""
    text = """ENTRY %main (p: f32[8,128]) -> f32[8,128] {
  %recv.1 = (f32[8,128]{1,0:T(8,128)}, u32[]{:S(2)}, token[]) recv(%after-all.1), channel_id=3, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %recv-done.1 = (f32[8,128]{1,0:T(8,128)}, token[]) recv-done(%recv.1), channel_id=3
}
"""  # noqa: E501
    assert collectives(text, slice_devices=4) == {"all-reduce": Moved(1, 1, 4096.0, 4096.0)}


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("{{0,2},{1,3}}, to_apply=%add", [[0, 2], [1, 3]]),
        ("[2,2]<=[4], dimensions={0}", [[0, 1], [2, 3]]),
        ("[2,2]<=[2,2]T(1,0), dimensions={0}", [[0, 2], [1, 3]]),
        ("mesh['axis_0'=2,'axis_1'=2] {'axis_0'}, dimensions={0}", [[0, 2], [1, 3]]),
        ("mesh['axis_0'=2,'axis_1'=2], device_ids=([2,2]T(1,0)) {'axis_0'}, dimensions={0}", [[0, 1], [2, 3]]),
    ],
)
def test_groups_of_devices(text, groups):
    """In the compiler's four notations."""
    np.testing.assert_array_equal(_groups(f"%x), replica_groups={text}"), groups)


@pytest.mark.sharding
def test_collectives_of_a_compiled_loop():
    """Five layers, whose kernels are gathered from eight devices, and a sum over all devices."""
    mesh = make_mesh(fsdp=8)

    def run(x, kernels):
        x, _ = jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, kernels)
        return x.sum()

    def on(shape, *axes):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

    text = jax.jit(run).lower(on((64, 32), "fsdp"), on((5, 32, 32), None, "fsdp")).compile().as_text()
    found = collectives(text)
    assert found["all-gather"].bytes == 5 * 32 * 32 * 4 * 7 / 8
    assert found["all-reduce"].bytes == 2 * 4 * 7 / 8
