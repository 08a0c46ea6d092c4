"""Quantised weights and caches in inference: accuracy, saving and loading, device memory."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from converted import ORIGINAL, convert
from paths import ROOT
from torch_models import relative_error

import infer
from benchmarks.quantization import decoded_logits
from conversion import jax_to_torch
from llamavid_jax import LLaMAVIDLlavaConfig, LLaMAVIDLlavaForConditionalGeneration, LLaMAVIDLlavaImageProcessor
from llamavid_jax.errors import CheckpointError, ConfigError
from llamavid_jax.inference.generate import DecodeState, decode_block, prefill
from llamavid_jax.inference.sampling import Sampling
from llamavid_jax.models import quantize as quantization
from llamavid_jax.models.kv_cache import KVCache, Rounded
from llamavid_jax.parallel.mesh import make_mesh
from llamavid_jax.shapes import TEXT
from llamavid_jax.training.config import read_config
from llamavid_jax.weights import inventory
from llamavid_jax.weights.llama import QUANTISED

load = LLaMAVIDLlavaForConditionalGeneration.from_pretrained


@pytest.fixture(scope="module")
def whole(tiny_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    tiny_model.save_pretrained(folder)
    LLaMAVIDLlavaImageProcessor(56).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def int8(whole, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("int8")
    load(whole, dtype="float32", quantize="int8").save_pretrained(folder)
    return folder


def logits(model, **changed: jax.Array) -> np.ndarray:
    """Logits of 64 tokens, all but the first 8 decoded; `changed` replaces parameters."""
    ids = np.random.default_rng(0).integers(3, 1000, (1, 64)).astype(np.int32)
    params = model.params | changed
    visual = jnp.zeros((1, 1, model.config.text_config.hidden_size))
    return np.asarray(decoded_logits(model.structure, params, ids, visual, np.full_like(ids, TEXT)))


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_the_model_is_that_of_rounded_kernels(kind, tiny_model, whole):
    """It equals the model with rounded kernels; tests/models/test_quantize.py tests the rounding."""
    model = load(whole, dtype="float32", quantize=kind)
    kernels = {path: tiny_model.params[path] for path in QUANTISED}
    parts = {path: np.asarray(value, np.float32) for path, value in model.params.items()}
    kernels = {
        path: (parts[f"{path}.qvalue"] * parts[f"{path}.scale"]).reshape(kernel.shape)
        for path, kernel in kernels.items()
    }
    assert relative_error(logits(model), logits(tiny_model, **kernels)) < 1e-5


@pytest.mark.parametrize(
    ("kind", "cache", "bar"), [("int8", "float", 0.025), (None, "int8", 0.01), ("int8", "int8", 0.025)]
)
def test_logits_stay_near(kind, cache, bar, tiny_model, whole):
    """Three layers at scale 0.1; measured with half of the row prefilled: 0.017 for int8 weights."""
    error = relative_error(logits(load(whole, dtype="float32", quantize=kind, kv_cache=cache)), logits(tiny_model))
    assert 0.1 * bar < error < bar


def test_rounded_heads():
    """The error is at most half a step, which is 1/127 of the head's largest value; a head of zeros stays zero."""
    x = np.random.default_rng(0).normal(size=(2, 5, 3, 16)).astype(np.float32) * 10.0 ** np.arange(-2, 1)[:, None]
    x[0, 0, 0] = 0
    got = Rounded.of(jnp.asarray(x))
    step = np.abs(x).max(-1, keepdims=True) / 127
    assert np.all(np.abs(got.values * got.scale[..., None] - x) <= step * 0.5001)
    assert np.abs(got.values).max() == 127 and got.values.dtype == jnp.int8


def test_a_quantized_checkpoint(whole, int8):
    """Its configuration names the quantisation; it is smaller, and is read back bit for bit."""
    assert json.loads((int8 / "config.json").read_text())["quantization"] == "int8"
    sizes = [sum(f.stat().st_size for f in (folder / "weights").rglob("*") if f.is_file()) for folder in (whole, int8)]
    weights = 3 * (4 * 64 * 64 + 3 * 64 * 160)
    assert sizes[0] - sizes[1] > 2 * weights  # of 4 bytes each; both folders are compressed
    wanted, *found = (
        load(folder, dtype="float32", quantize=kind).params
        for folder, kind in ((whole, "int8"), (int8, None), (int8, "int8"))
    )
    for params in found:
        assert params.keys() == wanted.keys()
        assert all(np.array_equal(params[path], wanted[path]) for path in wanted)
    assert wanted[f"{next(iter(QUANTISED))}.qvalue"].dtype == jnp.int8


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_the_converter_writes_what_loading_makes(kind, tmp_path):
    convert(ORIGINAL, tmp_path / "whole")
    convert(ORIGINAL, tmp_path / "few", quantize=kind)
    assert LLaMAVIDLlavaConfig.from_pretrained(tmp_path / "few").quantization == kind
    wanted = load(tmp_path / "whole", dtype="float32", quantize=kind).params
    got = load(tmp_path / "few", dtype="float32").params
    assert got.keys() == wanted.keys()
    assert all(np.array_equal(got[path], wanted[path]) for path in wanted)


def test_no_whole_kernel_reaches_the_device(whole, monkeypatch):
    """Kernels are read one at a time by the host; the device never holds more than the quantised model."""
    device, quantize, held = jax.devices()[1], quantization.quantize_kernels, []

    def on_device() -> int:
        return sum(x.nbytes for x in jax.live_arrays() if not x.is_deleted() and x.devices() == {device})

    def watched(kernels, path, kind):
        if not isinstance(kernels, jax.core.Tracer):  # a tracer only computes shapes
            assert kernels.devices() == {jax.devices("cpu")[0]}
            held.append(on_device())
        return quantize(kernels, path, kind)

    monkeypatch.setattr(quantization, "quantize_kernels", watched)
    model = load(whole, dtype="float32", quantize="int8", mesh=make_mesh([device]))
    leaves = model.params
    assert len(held) == len(QUANTISED)
    assert held == sorted(held) and held[-1] < on_device() == sum(leaf.nbytes for leaf in leaves.values())
    assert all(leaf.devices() == {device} for leaf in leaves.values())


def test_matmuls_read_quantised_kernels(whole):
    """Decoding gets int8 kernels and an int8 cache, and neither in full precision."""
    model = load(whole, dtype="bfloat16", quantize="int8", kv_cache="int8")
    ids, one = np.zeros((1, 64), np.int32), np.ones(1, np.int32)

    def begin(params) -> DecodeState:
        visual, seed = jnp.zeros((1, 1, 64)), np.uint32(0)
        token, keys, prompt = prefill(model.structure, params, ids, visual, ids, one, seed, Sampling(), greedy=True)
        return DecodeState(token, token, token > 0, KVCache(prompt, prompt.room(96), jnp.int32(0)), keys)

    state = jax.eval_shape(begin, model.params)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.cache[:2])} == {"int8", "bfloat16"}
    text = decode_block.lower(model.structure, model.params, state, one[0], one[0], Sampling(), greedy=True).as_text()
    (signature,) = (line for line in text.splitlines() if "@main(" in line)
    for slots in (64, 96):  # prompt, answer
        assert signature.count(f"tensor<3x1x{slots}x4x16xi8>") >= 2
        assert f"tensor<3x1x{slots}x4x16xbf16>" not in signature
    assert "tensor<3x1x64x160xi8>" in signature and "tensor<3x64x160xbf16>" not in text


@pytest.mark.sharding
def test_a_mesh_gives_the_same_answers(whole):
    ids = [np.arange(5, 40)]
    alone = load(whole, dtype="float32", quantize="int8", kv_cache="int8")
    cut = load(whole, dtype="float32", quantize="int8", kv_cache="int8", mesh=make_mesh(fsdp=2, tensor=2))
    assert cut.params["llama.layers.mlp.up.kernel.qvalue"].addressable_shards[0].data.shape[-1] == 80
    assert cut.generate(ids, max_new_tokens=8).token_ids == alone.generate(ids, max_new_tokens=8).token_ids


def test_requests_compile_once(whole):
    model = load(whole, dtype="float32", quantize="int4", kv_cache="int8")
    compiled = []
    for row in (np.arange(5, 40), np.arange(3, 44)):
        assert len(model.generate([row], max_new_tokens=20, ignore_eos=True).token_ids[0]) == 20
        compiled.append([prefill._cache_size(), decode_block._cache_size()])
    assert compiled[0] == compiled[1]


def test_command_line(whole, capsys):
    arguments = ["--model", str(whole), "--question", "a", "--max-new-tokens", "4", "--dtype", "float32", "--json"]
    assert infer.main([*arguments, "--quantize", "int8", "--kv-cache", "int8"]) == 0
    assert json.loads(capsys.readouterr().out)["new_tokens"] <= 4


def test_errors(whole, int8, tmp_path, capsys):
    with pytest.raises(ConfigError, match="quantize is 'int4', but the weights are int8 already; use 'int8', or conv"):
        load(int8, quantize="int4")
    with pytest.raises(ConfigError, match="quantization is 'int3'; use 'none', 'int8' or 'int4'"):
        load(whole, quantize="int3")
    with pytest.raises(ConfigError, match="kv_cache is 'fp8'; use one of float, int8"):
        load(whole, kv_cache="fp8")
    with pytest.raises(
        ConfigError, match=f"{int8} holds int8 weights, which are for inference alone; convert the orig"
    ):
        tiny = ROOT / "configs" / "tiny" / "stage2_instruct.yaml"
        read_config(tiny, ["model=", f"start.model={int8}"]).model_config()
    assert jax_to_torch.main([str(int8), str(tmp_path / "back"), "--layout", "documented"]) == 2
    assert "holds int8 weights, which are for inference alone" in capsys.readouterr().err


def test_blocks_that_are_none_of_the_kernel(int8):
    config = LLaMAVIDLlavaConfig.from_pretrained(int8)
    shapes = {path: leaf.shape for path, leaf in load(int8).params.items()}
    path = f"{next(iter(QUANTISED))}.qvalue"
    for wrong in ((3, 2, 64, 4, 16), (3, 64, 4, 16), (3, 1, 60, 4, 16)):
        with pytest.raises(CheckpointError, match=f"{path}: all of layers embed heads head_dim = "):
            inventory.axes(config, shapes | {path: wrong})
    assert dataclasses.replace(config, quantization="none").quantized("int8") == config
