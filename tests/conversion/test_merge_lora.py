"""Adapters of PEFT and of the original's training merged into a converted checkpoint."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from converted import CONFIG, ORIGINAL, convert, restore

from conversion import merge_lora
from llamavid_jax.checkpoints.adapter import peft_tensors, save_adapter
from llamavid_jax.inference.model import LLaMAVIDLlavaForConditionalGeneration
from llamavid_jax.models import lora
from llamavid_jax.weights.files import weight_table

LORA = lora.LoraConfig(rank=3, alpha=6)
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    out = tmp_path_factory.mktemp("base") / "converted"
    convert(ORIGINAL, out, dtype="float32")
    return out


@pytest.fixture(scope="module")
def updates() -> dict[str, np.ndarray]:
    tensors = peft_tensors(LORA, CONFIG)
    return {name: RNG.normal(size=tensor.shape, scale=0.1).astype(np.float32) for name, tensor in tensors.items()}


def original_folder(folder, updates, full, **values):
    """The output of the original's LoRA training: pickles of tensors."""
    folder.mkdir()
    torch.save({name: torch.tensor(value) for name, value in updates.items()}, folder / "adapter_model.bin")
    if full:
        torch.save({name: torch.tensor(value) for name, value in full.items()}, folder / "non_lora_trainables.bin")
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    values = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "lora_dropout": 0.05, "target_modules": modules} | values
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return folder


def test_the_originals_output(base, updates, tmp_path):
    """Each weight of the base is updated (computed in torch's layout), replaced or unchanged."""
    weights = {weight.name: weight for weight in weight_table(CONFIG, "original")}
    name = "model.vlm_att_projector.weight"
    full = {f"base_model.model.{name}": RNG.normal(size=weights[name].shape).astype(np.float32)}
    adapter = original_folder(tmp_path / "adapter", updates, full)
    assert merge_lora.main([str(base), str(adapter), str(tmp_path / "out")]) == 0
    before, after = restore(base), restore(tmp_path / "out")
    for weight in weights.values():
        index = ... if weight.index is None else weight.index
        old, new = before[weight.path][index], after[weight.path][index]
        a = updates.get(f"base_model.model.{weight.name.removesuffix('.weight')}.lora_A.weight")
        if weight.name == name:
            np.testing.assert_array_equal(new, full[f"base_model.model.{name}"].T)
        elif a is not None:
            b = updates[f"base_model.model.{weight.name.removesuffix('.weight')}.lora_B.weight"]
            delta = (2 * b.astype(np.float64) @ a).T.reshape(old.shape)  # α/r = 2; ours is [in..., out...]
            np.testing.assert_allclose(new, old + delta, rtol=1e-5, atol=1e-6)
            assert np.abs(delta).max() > 0.1
        else:
            np.testing.assert_array_equal(new, old)
    LLaMAVIDLlavaForConditionalGeneration.from_pretrained(tmp_path / "out", dtype="float32")


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_starts_that_took_a_part_off_the_base(base, updates, tmp_path, start):
    """PEFT's formulas: PiSSA trains a kernel's largest singular components, OLoRA the first columns of its QR."""
    adapter = original_folder(tmp_path / "adapter", updates, {}, init_lora_weights=start)
    merge_lora.merge(base, adapter, tmp_path / "out")
    before, after = restore(base), restore(tmp_path / "out")
    for weight in weight_table(CONFIG, "original"):
        name = f"base_model.model.{weight.name.removesuffix('.weight')}"
        if f"{name}.lora_A.weight" not in updates:
            continue
        a, b = (updates[f"{name}.lora_{part}.weight"].astype(np.float64) for part in "AB")
        old, new = before[weight.path][weight.index], after[weight.path][weight.index]
        kernel = old.reshape(a.shape[1], -1).T.astype(np.float64)
        if start == "pissa":
            u, s, v = np.linalg.svd(kernel, full_matrices=False)
            taken = u[:, :3] @ np.diag(s[:3]) @ v[:3]
        else:
            q, r = np.linalg.qr(kernel)
            taken = 2 * q[:, :3] @ r[:3]
        np.testing.assert_allclose(new, (kernel - taken + 2 * b @ a).T.reshape(old.shape), rtol=1e-4, atol=1e-5)


def test_a_pipe_beside_the_base_is_named(base, updates, tmp_path, capsys):
    adapter = original_folder(tmp_path / "adapter", updates, {})
    shutil.copytree(base, tmp_path / "copy")
    for number, make in enumerate((os.mkfifo, lambda path: path.symlink_to("gone"), lambda path: path.symlink_to("/"))):
        make(tmp_path / "copy" / "odd")
        assert merge_lora.main([str(tmp_path / "copy"), str(adapter), str(tmp_path / f"out{number}")]) == 2
        assert "odd is no file that can be copied; remove it" in capsys.readouterr().err
        (tmp_path / "copy" / "odd").unlink()


def test_our_own_adapter_merges_as_in_memory(base, updates, tmp_path):
    params, layers = restore(base), CONFIG.text_config.num_hidden_layers
    for name, tensor in peft_tensors(LORA, CONFIG).items():
        stack = params.setdefault(tensor.path, np.zeros((layers, *tensor.layer_shape), np.float32))
        stack[tensor.index] = updates[name].T.reshape(tensor.layer_shape)
    save_adapter(tmp_path / "adapter", params, LORA, CONFIG)
    merge_lora.merge(base, tmp_path / "adapter", tmp_path / "out")
    after, wanted = restore(tmp_path / "out"), lora.merge_lora(params, LORA)
    assert after.keys() == wanted.keys()
    for path, value in wanted.items():
        np.testing.assert_allclose(after[path], value, rtol=1e-5, atol=1e-6)


def test_the_model_that_comes_with_the_package_is_a_base_in_every_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert merge_lora.main(["demo/model", "nothing", "out"]) == 2
    assert "nothing holds no adapter_model.safetensors" in capsys.readouterr().err


def test_names_that_zero_leaves(base, updates, tmp_path):
    """DeepSpeed's gathered state keeps the adapter's name: `lora_A.default.weight`."""
    renamed = {name.replace(".weight", ".default.weight"): value for name, value in updates.items()}
    adapter = original_folder(tmp_path / "adapter", renamed, {})
    assert merge_lora.main([str(base), str(adapter), str(tmp_path / "out")]) == 0


def test_what_does_not_fit_is_refused_and_leaves_nothing(base, updates, tmp_path, capsys):
    some = dict(list(updates.items())[1:])
    projector = next(w for w in weight_table(CONFIG, "original") if w.name == "model.vlm_att_projector.weight")
    projector = np.ones(projector.shape, np.float32)
    wrong = {"base_model.model.model.vlm_att_projector.weight": np.zeros((2, 2), np.float32)}
    cases = {
        "1 tensors missing": original_folder(tmp_path / "missing", some, {}),
        "NaN or infinite": original_folder(
            tmp_path / "nan", {name: value * np.nan for name, value in updates.items()}, {}
        ),
        "merged, holds numbers that are NaN or infinite": original_folder(
            tmp_path / "large", {name: value * 1e25 for name, value in updates.items()}, {}
        ),
        "model.vlm_att_projector.weight, merged, holds": original_folder(
            tmp_path / "nan in full", updates, {"base_model.model.model.vlm_att_projector.weight": projector * np.nan}
        ),
        "init_lora_weights is 'corda'": original_folder(tmp_path / "corda", updates, {}, init_lora_weights="corda"),
        "use_rslora is True": original_folder(tmp_path / "rslora", updates, {}, use_rslora=True),
        "model.vlm_att_projector.weight has shape (2, 2)": original_folder(tmp_path / "shape", updates, wrong),
        "the base no such weight": original_folder(tmp_path / "name", updates, {"x": np.zeros(2, np.float32)}),
        "holds no adapter_model.safetensors or adapter_model.bin": base,
    }
    for message, adapter in cases.items():
        assert merge_lora.main([str(base), str(adapter), str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
