"""The converter: every layout, what it reports, and what it refuses."""

import dataclasses
import json
import os
import re
import shutil

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch
from converted import CONFIG, GOLDEN, ORIGINAL, assert_equal, convert, restore, save_folder, state_dict

from conversion import torch_to_jax
from conversion.folder import copy_tokenizers, whole_folder
from conversion.torch_config import original_config
from llamavid_jax.checkpoints.weights import save_weights
from llamavid_jax.config.schema import LLaMAVIDLlavaConfig
from llamavid_jax.errors import CheckpointError, ConfigError, InputError


def test_original_layout(tmp_path):
    report = convert(ORIGINAL, tmp_path / "out")
    assert_equal(restore(tmp_path / "out"), state_dict())
    assert LLaMAVIDLlavaConfig.from_pretrained(tmp_path / "out") == CONFIG
    assert "198" in report and "skipped 4 computed buffers" in report and "--tokenizer DIR" in report
    vocabulary = "qformer_tokenizer/vocab.txt"
    assert (tmp_path / "out" / vocabulary).read_bytes() == (ORIGINAL / vocabulary).read_bytes()
    settings = json.loads((tmp_path / "out/preprocessor_config.json").read_text())
    assert (settings["size"], settings["resample"]) == ({"shortest_edge": 56}, 3)
    assert json.loads((tmp_path / "out/video_preprocessor_config.json").read_text())["fps"] == 1
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["architectures"] == ["LLaMAVIDLlavaForConditionalGeneration"]
    card = (tmp_path / "out/README.md").read_text()
    assert card.startswith("---\nlibrary_name: llamavid_jax\n") and f"`{ORIGINAL.name}`" in card


def test_documented_layout_has_the_same_weights(tmp_path):
    convert(ORIGINAL, tmp_path / "a")
    convert(GOLDEN / "documented_format", tmp_path / "b")
    a, b = restore(tmp_path / "a"), restore(tmp_path / "b")
    assert a.keys() == b.keys()
    for path, value in a.items():
        other = b[path][tuple(slice(size) for size in value.shape)]  # without the rows that pad the vocabulary
        np.testing.assert_array_equal(value, other, err_msg=path)


@pytest.mark.parametrize("form", ["single .bin", "safetensors", "file with --config"])
def test_other_containers(tmp_path, form):
    source = tmp_path / "source"
    shutil.copytree(ORIGINAL, source, ignore=shutil.ignore_patterns("*.bin", "*.index.json"))
    if form == "safetensors":
        values = {name: value.contiguous().clone() for name, value in state_dict().items()}
        safetensors.torch.save_file(values, source / "model.safetensors")
    else:
        torch.save(state_dict(), source / "pytorch_model.bin")
    options = {}
    if form == "file with --config":
        shutil.move(source / "config.json", tmp_path / "sizes.json")
        source, options = source / "pytorch_model.bin", {"config_file": tmp_path / "sizes.json"}
    convert(source, tmp_path / "out", **options)
    assert_equal(restore(tmp_path / "out"), state_dict())


def test_dtypes(tmp_path):
    """`keep` stores each parameter in the type that holds all its layers; other types round as torch does."""
    mixed = {name: value.half() if "vision" in name else value.bfloat16() for name, value in state_dict().items()}
    name = "model.layers.1.self_attn.q_proj.weight"
    mixed[name] = mixed[name].float()
    source = save_folder(tmp_path / "mixed", mixed, original_config(CONFIG))
    for dtype in ("keep", "float32", "bfloat16"):
        convert(source, tmp_path / dtype, dtype=dtype)
    kept = restore(tmp_path / "keep")
    assert {str(value.dtype) for path, value in kept.items() if path.startswith("vision")} == {"float16"}
    assert kept["llama.layers.attn.q.kernel"].dtype == np.float32
    assert kept["llama.layers.attn.k.kernel"].dtype == ml_dtypes.bfloat16
    assert_equal(kept, mixed)
    assert_equal(restore(tmp_path / "float32"), mixed)
    rounded = restore(tmp_path / "bfloat16")
    assert {value.dtype for value in rounded.values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert_equal(rounded, {name: value.bfloat16() for name, value in mixed.items()})


def test_tied_head(tmp_path):
    """A tied checkpoint needs no separate head; one that is stored anyway is reported as not used."""
    tied = dataclasses.replace(CONFIG, text_config=dataclasses.replace(CONFIG.text_config, tie_word_embeddings=True))
    source = save_folder(tmp_path / "source", state_dict(), original_config(tied))
    assert "not used: lm_head.weight" in convert(source, tmp_path / "out")
    assert "llama.lm_head.kernel" not in restore(tmp_path / "out")


def change(**values):
    """Changes a checkpoint's weights: None drops one; `__` stands for a dot."""
    changes = {name.replace("__", "."): value for name, value in values.items()}

    def apply(weights: dict, config_values: dict) -> None:
        for name, value in changes.items():
            weights.pop(name, None)
            if value is not None:
                weights[name] = value

    return apply


def language_model_alone(weights: dict, config_values: dict) -> None:
    for name in [name for name in weights if "vlm_att" in name or "vision" in name or "mm_proj" in name]:
        del weights[name]


def configure(**values):
    return lambda weights, config_values: config_values.update(values)


Q = "model__layers__0__self_attn__q_proj__weight"
BAD_CHECKPOINTS = {
    "missing weight": (change(model__norm__weight=None), "lacks 1 weights: model.norm.weight"),
    "missing layer": (configure(num_hidden_layers=4), "lacks 9 weights: model.layers.3."),
    "wrong shape": (change(**{Q: torch.ones(48, 47)}), "shape (48, 47), but the configuration needs (48, 48)"),
    "integers": (change(**{Q: torch.ones(48, 48, dtype=torch.int32)}), "is int32; weights are float32"),
    "wrong vocabulary": (configure(vocab_size=161), "has shape (160, 48), but the configuration needs (161, 48)"),
    "other image size": (
        configure(vision_tower_config={"hidden_size": 64, "intermediate_size": 279, "num_hidden_layers": 3,
                                       "num_attention_heads": 4, "image_size": 84}),
        "--image-size N resizes it",
    ),
    "language model alone": (language_model_alone, "holds only the language model: no vlm_att weights and no"),
    "another tower": (configure(mm_vision_tower="google/siglip"), "known are EVA ('eva', 'lavis') and CLIP"),
    "CLIP tower": (configure(mm_vision_tower="openai/clip-vit-large"), "lacks "),
    "no text decoder": (configure(bert_type="bert"), "bert_type is 'bert'; known are 'qformer_pretrain'"),
    "heads that do not divide": (configure(num_attention_heads=5), "not a positive multiple of num_attention"),
    "dynamic rope": (configure(rope_scaling={"type": "dynamic", "factor": 2.0}), "only linear scaling"),
    "compress type": (configure(compress_type="max"), "compress_type is 'max'"),
    "projector type": (configure(mm_projector_type="resampler"), "mm_projector_type is 'resampler'"),
    "other model": (configure(model_type="mistral", mm_hidden_size=1), "model_type is 'mistral'"),
    "sizes as text": (configure(hidden_size="48"), "hidden_size is '48'"),
    "Q-Former heads": (configure(qformer_config={"hidden_size": 50}), "qformer_config.hidden_size is 50"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CHECKPOINTS)
def test_bad_checkpoints(tmp_path, capsys, case):
    """One sentence on stderr, exit code 2, and no output folder."""
    apply, message = BAD_CHECKPOINTS[case]
    values, config_values = dict(state_dict()), json.loads((ORIGINAL / "config.json").read_text())
    apply(values, config_values)
    source = save_folder(tmp_path / "source", values, config_values)
    assert torch_to_jax.main([str(source), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error and message in error
    assert os.listdir(tmp_path) == ["source"]


@pytest.mark.parametrize(
    "name", ["language_model.model.norm.weight", "language_model.model.layers.1.mlp.up_proj.weight"]
)
def test_a_renamed_weight_of_the_documented_layout(tmp_path, capsys, name):
    """The error lists missing and unknown weights under that layout's names."""
    source = tmp_path / "source"
    shutil.copytree(GOLDEN / "documented_format", source)
    weights = safetensors.torch.load_file(source / "model.safetensors")
    weights["renamed.weight"] = weights.pop(name)
    safetensors.torch.save_file(weights, source / "model.safetensors")
    assert torch_to_jax.main([str(source), str(tmp_path / "out")]) == 2
    assert f"lacks 1 weights: {name}, and has no place for 1: renamed.weight. Give" in capsys.readouterr().err


def test_ctrl_c_leaves_nothing(tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch_to_jax, "write_weights", interrupted)
    assert torch_to_jax.main([str(ORIGINAL), str(tmp_path / "out")]) == 130
    assert not list(tmp_path.iterdir()) and capsys.readouterr().err == ""


def test_wrong_arguments(tmp_path, capsys):
    """Errors of the command line are one line, too."""
    empty = tmp_path / "empty"
    empty.mkdir()
    for arguments, message in (
        ([str(ORIGINAL)], "arguments are required: OUT"),
        ([str(ORIGINAL), str(tmp_path / "out"), "--dtype", "int3"], "argument --dtype: invalid choice: 'int3'"),
        ([str(empty), str(tmp_path / "out")], "config.json, which belongs to the weights, does not exist"),
        ([str(ORIGINAL), "/proc/out"], "/proc/out cannot be made (No such file or directory)"),
    ):
        assert torch_to_jax.main(arguments) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith("error: ") and "\n" not in error and message in error


def test_tokenizers_are_copied(tmp_path):
    text = dataclasses.replace(CONFIG.text_config, vocab_size=1024)
    config = dataclasses.replace(CONFIG, text_config=text)
    assert copy_tokenizers(ORIGINAL, GOLDEN / "text", None, tmp_path, config) == []
    for name, source in (("tokenizer.model", GOLDEN / "text"), ("qformer_tokenizer/vocab.txt", ORIGINAL)):
        assert (tmp_path / name).read_bytes() == (source / name).read_bytes()


def test_weights_are_not_saved_onto_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"file cannot be made .*; give a folder"):
        save_weights(tmp_path / "file", {})


def test_a_second_converter_is_told_at_once(tmp_path):
    with whole_folder(tmp_path / "out"):
        with pytest.raises(CheckpointError, match=r"out is in use by another process .*; wait for its end"):
            convert(ORIGINAL, tmp_path / "out")
        assert (tmp_path / "out.partial").is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_unknown_weights_are_reported(tmp_path):
    extra = state_dict() | {"model.vlm_att_bert_proj.weight": torch.ones(3)}
    source = save_folder(tmp_path / "source", extra, original_config(CONFIG))
    assert "not used: model.vlm_att_bert_proj.weight" in convert(source, tmp_path / "out")


def test_bad_arguments(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    (tmp_path / "sizes.yaml").write_text("num_query: [")
    (tmp_path / "bert").mkdir()
    words = (ORIGINAL / "qformer_tokenizer/vocab.txt").read_text()
    (tmp_path / "bert/vocab.txt").write_text(words + "longer\nand longer\n")
    shutil.copytree(ORIGINAL, tmp_path / "source", ignore=shutil.ignore_patterns("config.json", "*.txt"))
    out = tmp_path / "out"
    for source, target, options, kind, message in (
        (tmp_path / "gone", out, {}, CheckpointError, "does not exist"),
        (ORIGINAL, tmp_path / "full", {}, CheckpointError, "exists and is not empty"),
        (ORIGINAL, tmp_path / "no/out", {}, CheckpointError, "make it first"),
        (tmp_path / "source", out, {}, CheckpointError, "config.json, which belongs to the weights, does not exist"),
        (ORIGINAL, out, {"config_file": tmp_path / "sizes.yaml"}, ConfigError, "while parsing"),
        (ORIGINAL, out, {"config_file": tmp_path / "gone.yaml"}, ConfigError, "gone.yaml"),
        (ORIGINAL, out, {"image_size": 57}, ConfigError, "image_size is 57"),
        (ORIGINAL, out, {"tokenizer": tmp_path / "full"}, CheckpointError, "holds neither tokenizer.model"),
        (ORIGINAL, out, {"tokenizer": tmp_path / "gone"}, CheckpointError, "is not a folder"),
        (ORIGINAL, out, {"bert_tokenizer": tmp_path / "full"}, CheckpointError, "holds no vocab.txt"),
        (
            ORIGINAL,
            out,
            {"bert_tokenizer": tmp_path / "bert"},
            ConfigError,
            "has 127 pieces, but qformer_config.vocab_size is 126",
        ),
        (ORIGINAL, out, {"tokenizer": GOLDEN / "text"}, ConfigError, "1024 pieces, but text_config.vocab_size is 160"),
        (ORIGINAL, out, {"vision": tmp_path / "gone.pth"}, CheckpointError, "gone.pth does not exist"),
    ):
        with pytest.raises(InputError, match=re.escape(message)) as caught:
            convert(source, target, **options)
        assert isinstance(caught.value, kind)
        assert not out.exists() and not list(tmp_path.glob("*.partial-*"))
