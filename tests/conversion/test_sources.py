"""Checkpoints put together from parts: Vicuna, EVA ViT, InstructBLIP's Q-Former and stage 1's projectors."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from converted import CONFIG, ORIGINAL, assert_equal, convert, restore, save_folder, state_dict

from conversion.torch_config import original_config
from llamavid_jax.config.schema import LLaMAVIDLlavaConfig
from llamavid_jax.errors import CheckpointError


def split_parts(folder: Path) -> dict[str, Path]:
    """Splits the weights into files like Vicuna, eva_vit_g.pth, instruct_blip_*_trimmed.pth and mm_projector.bin."""
    tower, bert = "model.vision_tower.vision_tower.", "model.vlm_att_encoder.bert."
    renamed = {"model.vlm_att_query": "query_tokens"}
    llama, vision, qformer, projectors = {}, {}, {}, {}
    for name, value in state_dict().items():
        if name.startswith(tower):
            vision[name.removeprefix(tower)] = value
        elif name.startswith(bert):
            qformer["Qformer.bert." + name.removeprefix(bert)] = value
        elif name.startswith(("model.vlm_att_query", "model.vlm_att_ln")):
            qformer[renamed.get(name, name.replace("model.vlm_att_ln", "ln_vision"))] = value
        elif name.startswith(("model.mm_projector", "model.vlm_att")):
            projectors[name] = value
        else:
            llama[name] = value
    vision |= {"blocks.39.norm1.weight": torch.ones(64), "norm.weight": torch.ones(64)}
    values = {k: v for k, v in original_config(CONFIG).items() if not k.startswith(("mm_", "vision", "qformer"))}
    save_folder(folder / "vicuna", llama, values | {"model_type": "llama"})
    torch.save(vision, folder / "eva_vit_g.pth")
    torch.save({"model": qformer}, folder / "instruct_blip.pth")
    torch.save(projectors, folder / "mm_projector.bin")
    (folder / "sizes.json").write_text(json.dumps(original_config(CONFIG)))
    return {
        "vision": folder / "eva_vit_g.pth",
        "qformer": folder / "instruct_blip.pth",
        "projectors": folder / "mm_projector.bin",
        "config_file": folder / "sizes.json",
    }


def test_parts(tmp_path):
    parts = split_parts(tmp_path)
    report = convert(tmp_path / "vicuna", tmp_path / "out", **parts, bert_tokenizer=ORIGINAL / "qformer_tokenizer")
    assert_equal(restore(tmp_path / "out"), state_dict())
    assert re.search(r"not used: \S*blocks\.39\.norm1\.weight, \S*norm\.weight", report)
    assert (tmp_path / "out" / "qformer_tokenizer" / "vocab.txt").is_file()
    assert LLaMAVIDLlavaConfig.from_pretrained(tmp_path / "out") == CONFIG


def test_later_files_override(tmp_path):
    """Stage 1's projectors replace the checkpoint's, even with a trainer's prefix, and the report lists them."""
    name = "model.mm_projector.0.weight"
    torch.save({f"base_model.model.{name}": torch.full((48, 64), 2.0)}, tmp_path / "mm_projector.bin")
    report = convert(ORIGINAL, tmp_path / "out", projectors=tmp_path / "mm_projector.bin")
    assert f"overridden by a later file: {name}" in report
    expected = state_dict() | {name: torch.full((48, 64), 2.0)}
    assert_equal(restore(tmp_path / "out"), expected)


def test_training_from_parts(tmp_path):
    """Without projectors: an error that lists them, or random values that depend on the seed alone."""
    parts = split_parts(tmp_path) | {"projectors": None}
    with pytest.raises(CheckpointError, match=r"lacks 10 weights: model\.vlm_att_projector\.weight.*--init-missing"):
        convert(tmp_path / "vicuna", tmp_path / "out", **parts)
    report = convert(tmp_path / "vicuna", tmp_path / "a", **parts, init_missing=1)
    assert "started at random: visual_tokens.query_projector.kernel" in report
    convert(tmp_path / "vicuna", tmp_path / "b", **parts, init_missing=1)
    convert(tmp_path / "vicuna", tmp_path / "c", **parts, init_missing=2)
    a, b, c = (restore(tmp_path / name) for name in "abc")
    jax.tree.map(np.testing.assert_array_equal, a, b)
    changed = {path for path in a if not np.array_equal(a[path], c[path])}
    assert changed == {path for path in a if path.startswith("visual_tokens") and path.endswith("kernel")}
    assert abs(a["visual_tokens.key_projector.kernel"].std() - 0.02) < 0.002


def test_positions_are_resized_when_asked(tmp_path):
    parts = split_parts(tmp_path)
    report = convert(ORIGINAL, tmp_path / "a", image_size=84)
    convert(tmp_path / "vicuna", tmp_path / "b", **parts, image_size=84)
    name = "model.vision_tower.vision_tower.pos_embed"
    assert f"resized: {name}" in report
    grid = state_dict()[name][0, 1:].reshape(1, 4, 4, 64).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, size=(6, 6), mode="bicubic", align_corners=False)
    expected = torch.cat([state_dict()[name][0, :1], grid.permute(0, 2, 3, 1).reshape(36, 64)]).numpy()
    for out in ("a", "b"):
        np.testing.assert_allclose(restore(tmp_path / out)["vision.position"], expected, atol=1e-6)
        assert LLaMAVIDLlavaConfig.from_pretrained(tmp_path / out).vision_tower_config.image_size == 84
