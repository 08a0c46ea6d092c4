"""The memory plan against figures worked out by hand."""

import jax
import pytest

from llamavid_jax.config.schema import LLaMAVIDLlavaConfig
from llamavid_jax.precompile import memory
from llamavid_jax.precompile.memory import GIB, plan_memory

LONG = LLaMAVIDLlavaConfig.from_yaml("configs/models/llamavid_7b_224_long_video.yaml")
KERNELS = 32 * (4 * 4096**2 + 3 * 4096 * 11008)  # of LLaMA's layers
REST = 2 * 32000 * 4096 + (2 * 32 + 1) * 4096  # embedding, head, norms


def sizes(plan: memory.MemoryPlan) -> dict[str, float]:
    return {item.what: item.gib for item in plan.items}


def test_an_hour_on_one_chip():
    """3,600 frames are 7,200 visual tokens: a bucket of 8,192, and 512 for the answer, of 0.5 MiB each in bfloat16."""
    plan = plan_memory(LONG, 3600, 512, topology="v5e:1x1")
    found = sizes(plan)
    assert found["parameters: llama"] == pytest.approx(2 * (KERNELS + REST) / GIB)
    assert sum(size for what, size in found.items() if "parameters" in what) * GIB == pytest.approx(15.9e9, rel=0.005)
    assert found["key-value cache: 8704"] == 4.25
    assert found["visual tokens: 7200"] == 4096 * 2 * 4096 * 2 / GIB  # room for 4,096 frames
    assert not plan.fits and "does NOT fit: 16.00 GiB on each of 1 × TPU v5 lite" in str(plan)
    assert plan_memory(LONG, 3600, 512, topology="v6e:1x1").fits


def test_quantised():
    """Plus a quarter of a bit per weight for the bfloat16 scales."""
    wanted = {"int8": (8.25 / 8 * KERNELS + 2 * REST) / GIB, "int4": (4.25 / 8 * KERNELS + 2 * REST) / GIB}
    for kind, size in wanted.items():
        plan = plan_memory(LONG, 3600, 512, quantize=kind, topology="v5e:1x1")
        assert sizes(plan)["parameters: llama"] == pytest.approx(size) and plan.fits


def test_eight_cores_share():
    """Colab's v2-8: heads and MLPs are split over the cores, and so is the cache."""
    plan = plan_memory(LONG, 3600, 512, topology="v2:2x2")
    assert plan.devices == 8 and plan.fits
    alone, cut = sizes(plan_memory(LONG, 3600, 512, topology="v5e:1x1")), sizes(plan)
    assert cut["key-value cache: 8704"] == 4.25 / 8
    assert cut["parameters: llama"] == pytest.approx(alone["parameters: llama"] / 8, rel=1e-3)
    assert cut["visual tokens: 7200"] == alone["visual tokens: 7200"]


def test_a_longer_answer_needs_its_own_room_alone():
    short, long = (sizes(plan_memory(LONG, 3600, tokens, topology="v6e:1x1")) for tokens in (512, 2048))
    assert long.pop("key-value cache: 10240") == short.pop("key-value cache: 8704") + 0.75 and long == short


def test_the_attached_devices():
    plan = plan_memory(LLaMAVIDLlavaConfig.from_pretrained("demo/model"), 8, 16, "float32")
    assert plan.devices == jax.device_count() and plan.device == "cpu" and plan.fits
