"""What a run prints before its first step."""

from unittest.mock import Mock

import jax
import jax.numpy as jnp
import pytest
from paths import ROOT
from training_cases import CONFIG

from llamavid_jax.data.loader import Loader
from llamavid_jax.data.plan import PlannedBatch, Schedule
from llamavid_jax.models.flops import PARTS, flops_done_again, flops_per_step
from llamavid_jax.parallel.mesh import make_mesh
from llamavid_jax.parallel.sharding import NamedSharding
from llamavid_jax.training import forecast as module
from llamavid_jax.training.config import read_config
from llamavid_jax.training.forecast import forecast, kept_bytes
from llamavid_jax.training.layout import initial_state
from llamavid_jax.training.start import Start

FRAMES, TEXT = 1, 0  # the recipe's buckets


def lines(trained: dict[str, tuple], frozen: dict[str, tuple], done: int = 0, *overrides: str) -> list[str]:
    """The forecast of a run on two devices with all parameters split over them; half of its steps have frames."""
    config = read_config(ROOT / "configs/tiny/stage2_instruct.yaml", ["training.remat=full", *overrides])
    mesh = make_mesh(jax.devices()[:2], fsdp=2)
    cut = NamedSharding(mesh, jax.P("fsdp"))

    def zeros(shapes: dict[str, tuple]) -> dict[str, jax.Array]:
        return {path: jax.device_put(jnp.zeros(shape), cut) for path, shape in shapes.items()}

    start, loader = Mock(spec=Start), Mock(spec=Loader)
    start.config, start.mesh, start.trained, start.frozen = CONFIG, mesh, zeros(trained), zeros(frozen)
    state = initial_state(config.optimizer, start.trained, mesh)
    loader.steps, loader.schedule = 100, Mock(spec=Schedule)
    loader.schedule.shapes = config.data.shapes
    loader.schedule.epoch.return_value = [PlannedBatch(FRAMES, "pixels", []), PlannedBatch(TEXT, "text", [])] * 3
    return forecast(config, start, state._replace(step=jnp.int32(done)), loader).splitlines()


@pytest.mark.parametrize(
    "trained,stage",
    [
        (["visual_tokens"], "stage 1, align"),
        (["qformer", "visual_tokens", "llama"], "stage 2, instruct"),
        (["visual_tokens", "llama"], "stage 3, long video"),
        (["llama"], "a stage of its own"),
    ],
)
def test_stage_and_parameters(trained, stage):
    frozen = [part for part in PARTS if part not in trained]
    line = lines({f"{part}.kernel": (6, 4) for part in trained}, {f"{part}.kernel": (10, 10) for part in frozen})[0]
    assert line == (
        f"{stage}: {24 * len(trained)} parameters train ({', '.join(trained)}), {100 * len(frozen)} are frozen "
        f"({', '.join(frozen) or 'none'})"
    )


def test_steps_memory_and_hours(monkeypatch):
    """A million trained parameters and two million frozen ones, half of each on each device."""
    monkeypatch.setattr(module, "peak_flops", lambda kind: 1e6)
    steps, memory, hours = lines({"llama.kernel": (2**20, 1)}, {"vision.kernel": (2**21, 1)}, done=40)[1:]
    assert steps == "60 of 100 steps to go, each of 4 rows with room for 2,048 tokens on average"
    megabytes = {"parameters": 2 + 4, "optimizer": 4, "gradients": 2}
    kept = kept_bytes(CONFIG.text_config, dict(make_mesh(fsdp=1).shape), 2 * 512, "full") / 2**20
    total = sum(megabytes.values()) + kept
    assert memory.startswith(f"memory of a device: at least {total / 1024:.3g} GiB (parameters {6 / 1024:.3g}, ")
    trains = dict.fromkeys(PARTS, False) | {"llama": True}
    work = dict(question_tokens=64, rows=4, row_tokens=512)
    flops = flops_per_step(CONFIG, trains, frames=64, pairs=64, **work)
    flops += flops_per_step(CONFIG, trains, frames=0, pairs=0, **work)
    flops += 2 * flops_done_again(CONFIG.text_config, "full", 4, 512)
    least = 60 * flops / 2 / (1e6 * 2) / 3600
    assert hours.startswith(f"hours: at least {least:.2f} at the peak of 2 × cpu")
    assert f"about {least / 0.5:.2f} if 50% of it are used, as is assumed" in hours
    monkeypatch.setattr(module, "share_of_peak", lambda kind: 0.25)
    *_, hours = lines({"llama.kernel": (2**20, 1)}, {"vision.kernel": (2**21, 1)}, 40)
    assert f"about {least / 0.25:.2f} if 25% of it are used, as published steps do" in hours


def test_a_device_without_a_peak():
    assert "hours: unknown, as the peak of 2 × cpu is" in lines({"llama.kernel": (2, 1)}, {})[-1]


def test_updates_are_less_work_than_kernels(monkeypatch):
    monkeypatch.setattr(module, "peak_flops", lambda kind: 1.0)
    whole, updates = (
        float(lines({path: (4, 2)}, {"vision.kernel": (2, 1)})[-1].split()[3])
        for path in ("llama.layers.attn.q.kernel", "llama.layers.attn.q.lora.a")
    )
    assert updates < 0.9 * whole
