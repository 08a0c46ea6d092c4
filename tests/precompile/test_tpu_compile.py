"""The TPU compiler of the libtpu wheel: programs compiled for absent slices, and their memory.

`make test` installs libtpu beside the environment, where only these tests look: inside it, every program on a machine
without a TPU would start with errors printed by JAX.
"""

import dataclasses
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from paths import ROOT

from llamavid_jax import LLaMAVIDLlavaConfig
from llamavid_jax.attention.attention import attention
from llamavid_jax.precompile import infer
from llamavid_jax.precompile.infer import check_inference
from llamavid_jax.precompile.report import Report
from llamavid_jax.precompile.topology import (
    CompileError,
    OutOfMemoryError,
    compile_lowered,
    in_own_process,
    slice_devices,
    slice_mesh,
)
from llamavid_jax.precompile.train import check_training
from llamavid_jax.training.config import read_config

sys.path.append(str(Path(sys.prefix) / "libtpu"))  # inherited by subprocesses


@pytest.fixture(autouse=True)
def compiled_anew(monkeypatch):
    """JAX caches programs for absent chips but cannot load them, and warns about it."""
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "false")


def tiny(name: str, *overrides: str):
    return read_config(ROOT / "configs" / name, ["model=" + str(ROOT / "configs" / "models" / "tiny.yaml"), *overrides])


def test_what_is_traced_for_a_tpu_takes_its_kernels():
    """On a CPU, with only the mesh set."""
    q = jax.ShapeDtypeStruct((4, 256, 4, 128), jnp.bfloat16)
    with jax.set_mesh(slice_mesh("v5e:2x2", "")):
        text = jax.jit(lambda q: attention(q, q, q, causal=True)).lower(q).as_text()
    assert "tpu_custom_call" in text
    assert "tpu_custom_call" not in jax.jit(lambda q: attention(q, q, q, causal=True)).lower(q).as_text()


def test_old_chips_have_no_kernels_to_take():
    q = jax.ShapeDtypeStruct((8, 256, 4, 128), jnp.bfloat16)
    with jax.set_mesh(slice_mesh("v2:2x2", "")):
        compile_lowered(jax.jit(lambda q: attention(q, q, q, causal=True)).lower(q))


@pytest.mark.parametrize(
    ("topology", "slices", "devices"),
    [
        ("v5e:1x1", 1, 1),
        ("v2:2x2", 1, 8),
        ("v4:2x2x1", 1, 4),
        ("v5p:2x2x1", 1, 4),
        ("v6e:2x4", 1, 8),
        ("v5e:2x4", 2, 16),
    ],
)
def test_slices(topology, slices, devices):
    assert len(slice_devices(topology, slices)) == devices


def test_slices_that_there_are_not():
    with pytest.raises(CompileError, match=r"'v5e:3x7' is no slice that libtpu knows; v5e:4x4 is one .INVALID_ARG"):
        slice_devices("v5e:3x7")


def test_more_memory_than_a_chip_has():
    mesh = slice_mesh("v5e:1x1", "")
    with jax.set_mesh(mesh):
        many = jax.ShapeDtypeStruct((20, 2**28), jnp.float32)
        lowered = jax.jit(lambda x: jnp.sort(x, axis=0)).lower(many)
    with pytest.raises(OutOfMemoryError) as caught:
        compile_lowered(lowered)
    assert caught.value.needed >= 20 and 15 < caught.value.there < 16


def test_a_tiny_step_for_four_chips():
    """Compiled completely, and only up to its buffers: the same program."""
    config = tiny("tiny/stage2_instruct.yaml", "training.dtype=bfloat16")
    report = in_own_process(check_training, config, "v5e:2x2")
    quick = in_own_process(check_training, config, "v5e:2x2", "", 1, False, "", False)
    assert (quick.collectives, quick.arguments_gib, quick.output_gib) == (
        report.collectives,
        report.arguments_gib,
        report.output_gib,
    )
    assert 0 < report.peak_gib - quick.peak_gib < 0.1  # the machine code itself
    assert report.fits and 0.005 < report.peak_gib < 0.5
    assert report.arguments_gib > report.output_gib > 0
    assert {"all-gather", "reduce-scatter"} <= report.collectives.keys()
    assert report.collectives["all-gather"]["asynchronous"] > 0
    assert 0 < report.utilisation < 1


def stated_peak(report: Report) -> float:
    """Peak memory in GiB, from the row of docs/tpu.md."""
    row = " | ".join(report.row()[:3])
    (found,) = re.findall(rf"\| {re.escape(row)} \| ([\d.]+) of", (ROOT / "docs" / "tpu.md").read_text())
    return float(found)


def test_7b_stage_2_for_64_chips():
    """32 rows of five minutes of video, each over two chips, as docs/tpu.md states."""
    stage = read_config(ROOT / "configs" / "stage2_instruct.yaml", ["training.micro_batches=1"])
    mesh = "fsdp=32,sequence=2"
    report = in_own_process(check_training, stage, "v5e:8x8", mesh, 1, False, "stage2_instruct", False)
    assert report.fits and report.peak_gib < 9
    assert report.peak_gib == pytest.approx(stated_peak(report), rel=0.05)
    gathered, reduced = report.collectives["all-gather"], report.collectives["all-reduce"]
    assert gathered["asynchronous"] == gathered["count"]
    once = 2 * 6.9e9  # bytes of the parameters in bfloat16
    assert gathered["bytes"] < 1.05 * 2 * once  # forward and backward gather each kernel once (`COMPILER_OPTIONS`)
    assert reduced["bytes"] < 1.05 * 2 * once  # an all-reduce moves its bytes twice
    assert reduced["asynchronous"] > 0.99 * reduced["count"]
    assert sum(one["bytes"] for one in report.collectives.values()) < 65e9


def test_tiny_inference_for_one_chip():
    model = LLaMAVIDLlavaConfig.from_yaml(ROOT / "configs" / "models" / "tiny.yaml")
    reports = in_own_process(check_inference, model, "v5e:1x1", "", 300, 32, "bfloat16", "tiny")
    assert [report.fits for report in reports] == [True] * 4


def check_alone(program: str, *arguments) -> Report:
    """The report of one inference program; the others, which would compile at the same time, are left out."""
    compile_report, none = infer.compile_report, Report("", "", 1, "", 0.0, 0, 0.0, 0.0)

    def alone(*given, **known) -> Report:
        return compile_report(*given, **known) if f": {program} " in known["program"] else none

    infer.compile_report = alone  # this process runs nothing else
    (found,) = (report for report in check_inference(*arguments) if report.program)
    return found


@pytest.mark.parametrize("program", ["encode", "compress", "prefill", "decode"])
def test_13b_and_three_hours_of_video_on_four_chips(program):
    """Ten heads a chip: a cache in tiles of eight heads would not fit."""
    model = LLaMAVIDLlavaConfig.from_yaml(ROOT / "configs" / "models" / "llamavid_13b_224_long_video.yaml")
    arguments = "v5e:2x2", "", 21800, 512, "bfloat16", "13b_224_long_video", "float", False
    report = in_own_process(check_alone, program, model, *arguments)
    assert report.fits and report.peak_gib == pytest.approx(stated_peak(report), rel=0.05)


def test_decoding_makes_no_whole_kernel():
    """Two layers of 7B, int8, an hour of video: temporaries have no room for a bfloat16 kernel or a layer's cache."""
    model = LLaMAVIDLlavaConfig.from_yaml(ROOT / "configs" / "models" / "llamavid_7b_224_long_video.yaml").quantized(
        "int8"
    )
    model = dataclasses.replace(
        model,
        text_config=dataclasses.replace(model.text_config, num_hidden_layers=2),
        vision_tower_config=dataclasses.replace(model.vision_tower_config, num_hidden_layers=1),
    )
    decode = in_own_process(check_alone, "decode", model, "v5e:1x1", "", 7400, 512, "bfloat16", "7b", "int8", False)
    assert decode.temporaries_gib * 2**30 < 4096 * 8192 * 2
    assert decode.program == "7b, int8 weights, int8 cache: decode one token"
