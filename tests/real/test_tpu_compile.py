"""The TPU compiler of the libtpu wheel: programs compiled for slices that are not there, and their memory."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from llamavid_jax import LLaMAVIDLlavaConfig
from llamavid_jax.aot.infer import check_inference
from llamavid_jax.aot.topology import (
    CompileError,
    OutOfMemoryError,
    compile_lowered,
    in_own_process,
    slice_devices,
    slice_mesh,
)
from llamavid_jax.aot.train import check_training
from llamavid_jax.attention.attention import attention
from llamavid_jax.training.config import read_config

pytestmark = pytest.mark.real
ROOT = Path(__file__).parent.parent.parent


def tiny(name: str, *overrides: str):
    return read_config(ROOT / "configs" / name, ["model=" + str(ROOT / "configs" / "models" / "tiny.yaml"), *overrides])


def test_what_is_traced_for_a_tpu_takes_its_kernels():
    """On a CPU, without anything set but the mesh."""
    q = jax.ShapeDtypeStruct((4, 256, 4, 128), jnp.bfloat16)
    with jax.set_mesh(slice_mesh("v5e:2x2", "")):
        text = jax.jit(lambda q: attention(q, q, q, causal=True)).lower(q).as_text()
    assert "tpu_custom_call" in text
    assert "tpu_custom_call" not in jax.jit(lambda q: attention(q, q, q, causal=True)).lower(q).as_text()


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
    with pytest.raises(CompileError, match="'v5e:3x7' is no slice that libtpu knows: INVALID_ARGUMENT"):
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
    overrides = ["training.dtype=bfloat16", "training.remat=full"]
    report = in_own_process(check_training, tiny("tiny/stage2_instruct.yaml", *overrides), "v5e:2x2")
    assert report.fits and 0.005 < report.peak_gib < 0.5
    assert report.arguments_gib > report.output_gib > 0
    assert {"all-gather", "reduce-scatter"} <= report.collectives.keys()
    assert report.collectives["all-gather"]["asynchronous"] > 0
    assert 0 < report.utilisation < 1


def test_what_train_py_says():
    run = [
        sys.executable,
        str(ROOT / "train.py"),
        "--config",
        str(ROOT / "configs/stage2_instruct.yaml"),
        "--compile-only",
    ]
    done = subprocess.run([*run, "--topology", "v5e:2x2"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr


def test_7b_stage_2_for_64_chips():
    """The original's 128 samples a step, five minutes of video each."""
    stage = read_config(ROOT / "configs" / "stage2_instruct.yaml", ["training.micro_batches=2"])
    report = in_own_process(check_training, stage, "v5e:8x8")
    assert report.fits and report.peak_gib < 9
    gathered = report.collectives["all-gather"]
    assert gathered["asynchronous"] > 0.8 * gathered["count"]


def test_tiny_inference_for_one_chip():
    model = LLaMAVIDLlavaConfig.from_yaml(ROOT / "configs" / "models" / "tiny.yaml")
    reports = in_own_process(check_inference, model, "v5e:1x1", "", 300, 32, "bfloat16", "tiny")
    assert [report.fits for report in reports] == [True] * 4


def test_decoding_makes_no_whole_kernel():
    """Two layers of 7B, int8, an hour of video: there is no room for a kernel in bfloat16, nor for a layer's cache."""
    model = LLaMAVIDLlavaConfig.from_yaml(ROOT / "configs" / "models" / "llamavid_7b_224_video.yaml").quantized("int8")
    model = dataclasses.replace(
        model,
        text_config=dataclasses.replace(model.text_config, num_hidden_layers=2),
        vision_tower_config=dataclasses.replace(model.vision_tower_config, num_hidden_layers=1),
    )
    *_, decode = in_own_process(check_inference, model, "v5e:1x1", "", 7400, 512, "bfloat16", "7b", "int8")
    assert decode.temporaries_gib * 2**30 < 4096 * 8192 * 2
    assert decode.program == "7b, int8 weights, int8 cache: decode one token"
