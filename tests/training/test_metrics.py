"""FLOPs against numbers by hand, XLA's count and 6·N·tokens; the log's lines, its resume, the table of peaks."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from paths import CONFIGS

from llamavid_jax.checkpoints.weights import abstract_params
from llamavid_jax.config.schema import LLaMAVIDLlavaConfig
from llamavid_jax.models.flops import PARTS, _visual_tokens, flops_per_step
from llamavid_jax.models.visual_tokens import VisualTokens
from llamavid_jax.parallel.chips import PEAK_TFLOPS, peak_flops
from llamavid_jax.training import metrics
from llamavid_jax.training.metrics import Metrics, Throughput, console_line

STEP = {"frames": 3, "pairs": 5, "question_tokens": 7, "rows": 2, "row_tokens": 40}
NOTHING = dict.fromkeys(PARTS, False)


def by_hand() -> dict[str, tuple[int, int]]:
    """Multiply-adds of STEP with configs/models/tiny.yaml: with weights, and between activations."""
    vision = 16 * 588 * 64 + 3 * 17 * (64 * 192 + 64 * 64 + 2 * 64 * 256)
    qformer = 4 * (15 * 4 * 48 * 48 + 15 * 2 * 48 * 96) + 2 * (2 * 8 * 48 * 48 + 2 * 17 * 64 * 48)
    visual = 8 * 48 * 64 + 16 * 64 * 64 + 64 * 64 + (64 * 64 + 64 * 64)
    llama = 40 * (3 * (4 * 64 * 64 + 3 * 64 * 160) + 64 * 1024)
    return {
        "vision": (3 * vision, 3 * 3 * 2 * 17 * 17 * 64),
        "qformer": (5 * qformer, 5 * (4 * 2 * 15 * 15 * 48 + 2 * 2 * 8 * 17 * 48)),
        "visual_tokens": (5 * visual, 5 * (8 * 16 * 64 + 16 * 64)),
        "llama": (2 * llama, 2 * 3 * 40 * 40 * 64),  # causal: half of 2·T·T·C
    }


@pytest.mark.parametrize(
    "trained,factors",  # factors of the matmuls with weights and between activations, part by part
    [
        ((), {"vision": (1, 1), "qformer": (1, 1), "visual_tokens": (1, 1), "llama": (1, 1)}),
        (("visual_tokens",), {"vision": (1, 1), "qformer": (1, 1), "visual_tokens": (3, 3), "llama": (2, 3)}),
        (("qformer", "visual_tokens", "llama"), dict.fromkeys(PARTS, (3, 3)) | {"vision": (1, 1)}),
        (PARTS, dict.fromkeys(PARTS, (3, 3))),
    ],
)
def test_flops_by_hand(trained, factors):
    config = LLaMAVIDLlavaConfig.from_yaml(CONFIGS / "models" / "tiny.yaml")
    trains = NOTHING | dict.fromkeys(trained, True)
    expected = sum(
        2 * (weighted * factors[part][0] + attention * factors[part][1])
        for part, (weighted, attention) in by_hand().items()
    )
    assert flops_per_step(config, trains, **STEP) == expected


def test_seven_billion_parameters():
    """A trained LLaMA: 6·N·tokens without the embedding, and attention, 4 % of it at 2048 tokens."""
    config = LLaMAVIDLlavaConfig.from_yaml(CONFIGS / "models" / "llamavid_7b_224_video.yaml")
    sizes = {path: leaf.size for path, leaf in abstract_params(config).items() if path.startswith("llama.")}
    number = sum(sizes.values()) - sizes["llama.embed.embedding"]
    step = {"frames": 0, "pairs": 0, "question_tokens": 0, "rows": 3, "row_tokens": 2048}
    ratio = flops_per_step(config, NOTHING | {"llama": True}, **step) / (6 * number * 3 * 2048)
    assert ratio == pytest.approx(1 + 32 * 2048 * 4096 / number, rel=1e-4) and 1.03 < ratio < 1.05


@pytest.mark.parametrize("kind", ["both", "context", "content"])
def test_forward_is_what_xla_counts(kind):
    """One pair through the part that has no scan, which XLA counts once; XLA also counts element-wise operations."""
    config = dataclasses.replace(LLaMAVIDLlavaConfig.from_yaml(CONFIGS / "models" / "tiny.yaml"), frame_tokens=kind)
    dtypes = {"dtype": jnp.float32, "param_dtype": jnp.float32}
    model = nnx.eval_shape(lambda: VisualTokens(config, **dtypes, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    patches, queries = jnp.zeros((16, 64)), jnp.zeros((8, 48))
    compiled = jax.jit(lambda s, p, q: nnx.merge(graphdef, s)(p, q)).lower(state, patches, queries).compile()
    step = {"frames": 0, "question_tokens": 0, "rows": 0, "row_tokens": 0}
    one, none = (flops_per_step(config, NOTHING, pairs=pairs, **step) for pairs in (1, 0))
    products = sum(_visual_tokens(config))
    assert none == 0 and (one > 2 * products) == (kind != "content")  # and the Q-Former's, whose queries look
    assert compiled.cost_analysis()["flops"] == pytest.approx(2 * products, rel=0.35 if kind == "content" else 0.05)


def test_flops_of_low_rank_updates():
    """Kernels below updates let the gradient through and have none; an update's parameter is a product a token."""
    config = LLaMAVIDLlavaConfig.from_yaml(CONFIGS / "models" / "tiny.yaml")
    weighted, attention = by_hand()["llama"]
    more = flops_per_step(config, NOTHING, **STEP, updates=1000) - flops_per_step(config, NOTHING, **STEP)
    assert more == 2 * (weighted + 2 * attention) + 2 * 3 * 1000 * 2 * 40


@pytest.mark.parametrize(
    "kind,tera",
    [
        ("TPU v5 lite", 197),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("TPU v4", 275),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA L40S", 362),
        ("NVIDIA RTX A1000", None),
        ("cpu", None),
    ],
)
def test_peaks(kind, tera):
    assert peak_flops(kind) == (tera and tera * 1e12)


def test_no_row_of_the_peaks_hides_another():
    for name, tera in PEAK_TFLOPS.items():
        assert peak_flops(f"NVIDIA {name} 80GB") == tera * 1e12


def test_log_and_resume(tmp_path):
    lines = []
    with Metrics(tmp_path, report=lines.append) as log:
        for step in range(1, 6):
            log.log(step, {"loss": jnp.float32(1 / step), "grad_norm": float("nan"), "new": float("inf")})
            assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == step  # flushed
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')  # a kill in the middle of a line
    with Metrics(tmp_path, first_step=4, report=lines.append) as log:
        log.log(4, {"loss": 9})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and rows[-1] == {"step": 4, "loss": 9.0}
    assert rows[1] == {"step": 2, "loss": 0.5, "grad_norm": None, "new": None}
    assert len(lines) == 6 and len({line.index("loss") for line in lines}) == 1
    written = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    assert written.count(b"loss") == 6 and b"grad_norm" not in written


def test_only_process_0_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with Metrics(tmp_path, report=lambda line: pytest.fail(line)) as log:
        log.log(1, {"loss": 1.0})
    assert not list(tmp_path.iterdir())


def test_throughput(monkeypatch):
    now = iter([100.0, 103.0, 203.0, 210.0, 210.0, 212.0, 212.0])
    monkeypatch.setattr(metrics, "peak_flops", lambda kind: 1e9)
    meter = Throughput(devices=2, clock=lambda: next(now))
    meter.add(tokens=300.0, slots=400.0, frames=10.0, flops=4 * 10**9, wait=1.0)
    with meter.pause():  # 100 s
        pass
    meter.add(tokens=200.0, slots=400.0, frames=30.0, flops=4 * 10**9, wait=0.5)
    values = meter.read()
    assert values.pop("memory_gib") > 0.05
    expected = {"tokens_per_second": 50, "frames_per_second": 4, "mfu": 0.8 / 2, "data_wait": 0.15, "padding": 0.375}
    assert values == pytest.approx(expected)
    assert meter.read()["tokens_per_second"] == 0  # since the last reading


def test_console_line():
    line = console_line(12, {"loss": 2.34567, "learning_rate": 1e-3, "tokens_per_second": 12345.6, "mfu": 0.412})
    assert line == "step     12  loss  2.3457  lr 1.00e-03  tokens/s    12,346  MFU 41.2%"
