"""Every recording below `--golden DIR` (`tests/golden`): checkpoints, training, text, films, pixels, evaluations.

A recording is recognised by its content, so that any folder of recordings can be checked against the model:

    pytest -m golden --golden DIR
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from evaluation_sets import check_recording
from paths import CONFIGS, GOLDEN, ROOT
from PIL import Image
from recorded_training import replay
from recordings import find_recordings, tokenizer_folder

from conversion.check import TOLERANCES, check_case, read_expected
from conversion.read_torch import read_checkpoint
from conversion.resize import grow_rows, resize_positions
from conversion.torch_to_jax import main as torch_to_jax
from llamavid_jax import LLaMAVIDLlavaForConditionalGeneration
from llamavid_jax.config.parts import CLIP_MEAN, CLIP_STD
from llamavid_jax.config.schema import LLaMAVIDLlavaConfig
from llamavid_jax.data.labels import training_example
from llamavid_jax.media.images import normalize, pad_to_square, resize_and_crop
from llamavid_jax.media.timeline import frame_stride
from llamavid_jax.shapes import END, START
from llamavid_jax.text.conversation import long_video_text, movie_inputs, prompt, template_named
from llamavid_jax.text.qformer_tokenizer import QFormerTokenizer
from llamavid_jax.text.subtitles import Cue, interleave, parse_subtitles
from llamavid_jax.text.tokenizer import encode_with_images, load_tokenizer
from llamavid_jax.training.config import read_config
from llamavid_jax.training.trainable import trainable_paths
from llamavid_jax.weights.files import weight_table

pytestmark = pytest.mark.golden


def pytest_generate_tests(metafunc):
    """One test for each recording; kinds that DIR does not hold have no test."""
    root = Path(metafunc.config.getoption("--golden") or GOLDEN)
    for kind, cases in find_recordings(root).items():
        if kind in metafunc.fixturenames:
            metafunc.parametrize(kind, cases, ids=[str(case.relative_to(root)) for case in cases])


def test_every_recording_is_read(golden):
    """A folder without recordings, or with a file of recordings that no test reads, fails."""
    found = find_recordings(golden)
    unread = found.pop("unread")
    assert any(found.values()), f"{golden} holds no recorded case"
    assert not unread, f"no test reads {', '.join(map(str, unread))}"


def test_checkpoint(checkpoint, tmp_path):
    """Features, tokens, logits, losses and greedy ids of the converted checkpoint."""
    expected = expected_of(checkpoint)
    assert torch_to_jax([str(checkpoint), str(tmp_path / "converted")]) == 0
    model = LLaMAVIDLlavaForConditionalGeneration.from_pretrained(tmp_path / "converted", dtype="float32")
    rows = check_case(model, expected)
    assert rows, f"{checkpoint} has no recorded outputs"
    assert {row.name for row in rows} == {name for name in expected if any(f".{kind}" in name for kind in TOLERANCES)}
    assert not [row for row in rows if not row.passed]
    qformer_ids(checkpoint, expected)


def expected_of(checkpoint: Path) -> dict[str, np.ndarray]:
    """A checkpoint's recording; a copy in the documented layout may use that of a sibling with the same weights."""
    if (checkpoint / "expected.npz").exists():
        return read_expected(checkpoint / "expected.npz")
    key = read_checkpoint(checkpoint)["vlm_att_projector.weight"].read()
    for sibling in sorted(checkpoint.parent.iterdir()):
        if sibling != checkpoint and (sibling / "expected.npz").exists() and (sibling / "config.json").exists():
            weight = read_checkpoint(sibling).get("model.vlm_att_projector.weight")
            if weight is not None and np.array_equal(weight.read(), key):
                return read_expected(sibling / "expected.npz")
    raise AssertionError(f"{checkpoint} has no expected.npz, nor has a folder beside it the same weights and one")


def qformer_ids(checkpoint: Path, expected: dict[str, np.ndarray]) -> None:
    tokenizer = QFormerTokenizer(checkpoint / "qformer_tokenizer")
    for key in expected:
        kind, name, *number = key.split(".")
        if name == "qformer_input_ids":
            prompts = json.loads(str(expected[f"{kind}.prompts"]))[int(number[0])]
            assert tokenizer(prompts)[0].tolist() == expected[key].tolist(), key


def test_training(training, tmp_path):
    """Losses, gradient norms and learning rates step by step, and the exact set of trained parameters."""
    expected = read_expected(training)
    stage = json.loads(str(expected["hyper"]))["stage"]
    found = replay(training.parent, expected, tmp_path / "converted")
    for name in ("losses", "grad_norms", "learning_rates"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, err_msg=f"stage {stage}: {name}")


def text_tokenizer(file: Path, golden: Path, start_end: bool):
    return load_tokenizer(tokenizer_folder(file, golden), (START, END) if start_end else ())


def test_text(text, golden):
    """Ids, labels and Q-Former prompts of every conversation, exactly."""
    for number, case in enumerate(json.loads(text.read_text(encoding="utf-8"))):
        start_end = case.get("im_start_end", False)
        example = training_example(
            case["version"],
            case["conversations"],
            text_tokenizer(text, golden, start_end),
            case["has_image"],
            case["image_side_draws"],
            case["movie"],
            start_end=start_end,
        )
        name = f"case {number} ({case['version']})"
        assert example.input_ids.tolist() == case["input_ids"], f"{name}: input_ids"
        assert example.labels.tolist() == case["labels"], f"{name}: labels"
        assert case["prompts"] is None or example.prompts == case["prompts"], f"{name}: prompts"


def test_movie(movie, golden):
    """The text of films with subtitles, for inference and for training."""
    for case in json.loads(movie.read_text(encoding="utf-8")):
        if case["inputs"] is None:
            continue  # the original crashed
        start_end, width, name = case["im_start_end"], case["video_token"], case["name"]
        tokenizer = text_tokenizer(movie, golden, start_end)
        cues = [Cue(cue["end"], cue["text"]) for cue in case["subtitles"]]
        if case["source"] == "whisper":
            stride = frame_stride(case["video_fps"], case["fps"])
            assert case["frame_times"] == [i / case["video_fps"] for i in range(0, case["video_frames"], stride)], name
        assert case["source"] != "srt" or parse_subtitles(case["srt"], as_original=True) == cues, name
        inputs = interleave(case["frame_times"], cues, as_original=True)
        assert inputs == case["inputs"], name
        if "inference" in case:
            turn = long_video_text(inputs, case["question"], width, start_end)
            text = prompt(template_named("vicuna_v1"), [turn])
            assert text == case["inference"]["text"], name
            assert encode_with_images(tokenizer, text) == case["inference"]["input_ids"], name
        if "training" in case:
            turns = [{"from": "human", "value": case["human"]}, {"from": "gpt", "value": case["answer"]}]
            film = movie_inputs(inputs, width, training=True)
            example = training_example("imgsp_v1", turns, tokenizer, True, (), film, 10**30, start_end)
            for field in ("input_ids", "labels"):
                assert getattr(example, field).tolist() == case["training"][field], f"{name}: {field}"
            assert example.prompts == case["training"]["prompts"], name


def test_new_tokens(new_tokens):
    """The rows of start and end tokens are initialised with the mean of the rows before them."""
    record = read_expected(new_tokens)
    for table in ("input", "output"):
        before, after = record[f"{table}_before"], record[f"{table}_after"]
        np.testing.assert_allclose(grow_rows(before, len(after)), after, rtol=1e-5, atol=1e-7)


def test_trainable(trainable):
    """What trains in each stage, by the original's names: the recipes' tables for every text decoder and tower."""
    for case in json.loads(trainable.read_text(encoding="utf-8")):
        for stage in (1, 2):
            recorded = case.get(f"stage{stage}_trainable")
            if recorded:  # except where the original crashed, or where nothing trains, which we refuse
                name = f"stage {stage} of {case['bert_type']} with {case['tower']}"
                assert trained_names(model_of(case), stage_table(stage, case)) == set(recorded), name


def model_of(case: dict) -> LLaMAVIDLlavaConfig:
    """A small model configuration for a recorded table."""
    is_clip, grid = case["tower"] == "clip", case["compress_type"].startswith("grid")
    layers = {"num_hidden_layers": 2 if is_clip else 1}
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
    return LLaMAVIDLlavaConfig.from_dict(
        {
            **sizes,
            **{key: case[key] for key in ("bert_type", "mm_projector_type", "mm_use_im_start_end")},
            "compress_type": "mean" if grid else case["compress_type"],  # the parameter names do not depend on the grid
            "mm_vision_select_feature": case["mm_vision_select_feature"],
            "mm_vision_tower": "openai/clip" if is_clip else "eva",
            "num_hidden_layers": 1,
            "vision_tower_config": sizes | layers | {"image_size": 4, "patch_size": 2},
            "qformer_config": sizes | {"num_hidden_layers": case["num_hidden_layers_of_bert"]},
        }
    )


def stage_table(stage: int, case: dict) -> dict[str, bool]:
    """The recipe's patterns, changed where a `bert_type` freezes modules (docs/training.md)."""
    recipe = {1: "stage1_align_bert", 2: "stage2_instruct"}[stage]
    table = dict(read_config(CONFIGS / f"{recipe}.yaml").trainable)
    if stage == 1 and case["mm_use_im_start_end"]:
        table = dict(read_config(CONFIGS / "stage1_align_start_end.yaml").trainable) | {"qformer.*": True}
    if "freeze" in case["bert_type"]:
        table["qformer.*"] = False
    if "freeze_all" in case["bert_type"]:
        del table["visual_tokens.*"]
        table |= {"visual_tokens.*_projector.*": False}
        table |= {"visual_tokens.projector.*": True} if case["mm_projector_type"] != "identity" else {}
        table |= {"visual_tokens.to_memory.*": True} if case["tower"] == "clip" else {}
    return table


def trained_names(config: LLaMAVIDLlavaConfig, table: dict[str, bool]) -> set[str]:
    weights = weight_table(config, "original")
    trains = trainable_paths({weight.path for weight in weights}, table)
    return {weight.name for weight in weights if weight.path in trains}


def test_preprocessing(preprocessing):
    """Pixels after crop and pad, within Pillow's rounding, and resized position tables."""
    expected = read_expected(preprocessing)
    checked = 0
    for key, value in expected.items():
        kind, _, number = key.partition(".")
        if kind in ("crop", "pad"):
            image = Image.fromarray(expected[f"image.{number}"])
            image = pad_to_square(image, CLIP_MEAN) if kind == "pad" else image
            difference = np.abs(
                normalize(resize_and_crop(image, value.shape[-1])[None], CLIP_MEAN, CLIP_STD)[0] - value
            )
            assert difference.max() <= 1e-2 and difference.mean() <= 1e-3, key
            checked += 1
    tables = {side(key): value[0] for key, value in expected.items() if key.startswith("pos_embed_")}
    for size in sorted(tables)[1:]:
        resized = resize_positions(tables[min(tables)], size)
        assert np.linalg.norm(resized - tables[size]) <= 1e-5 * np.linalg.norm(tables[size]), f"positions {size}"
        checked += 1
    assert checked, f"{preprocessing} holds nothing that is known"


def test_evaluation(evaluation, tmp_path):
    """Prompts, files, scores and judge messages of the original's evaluation of a set."""
    check_recording(json.loads(evaluation.read_text(encoding="utf-8")), tmp_path)


@pytest.mark.parametrize(
    "kept, passed", [(["text", "preprocess"], 3), (["evaluation"], 14), ([], 0), (["text", "unknown"], 1)]
)
def test_folders_with_some_kinds_of_cases(kept, passed, tmp_path):
    """Any folder can be run: kinds that it does not hold have no test, and files of unknown kinds fail."""
    for name in kept:
        if name == "unknown":
            (tmp_path / "recorded.npz").write_bytes((GOLDEN / "preprocess" / "expected.npz").read_bytes())
            np.savez(tmp_path / "recorded.npz", something=np.ones(3))
        else:
            shutil.copytree(GOLDEN / name, tmp_path / f"case of {name}")
    entry = tmp_path.with_name(f"{tmp_path.name}-installed")  # as `make test` installs tests/golden_option
    shutil.copytree(ROOT / "tests" / "golden_option", entry)
    (entry / "golden_option-0.dist-info").mkdir()
    (entry / "golden_option-0.dist-info" / "entry_points.txt").write_text("[pytest11]\ngolden_option = golden_option\n")
    (entry / "golden_option-0.dist-info" / "METADATA").write_text("Name: golden_option\nVersion: 0\n")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "golden", "--golden", str(tmp_path), "-k", "not folders"]
    environment = os.environ | {"PYTHONPATH": str(entry)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    summary = done.stdout.splitlines()[-1]
    good = "unknown" not in kept and bool(passed)
    assert (f"{passed} passed" in summary) == bool(passed) and ("1 failed" in summary) != good, done.stdout
    assert (done.returncode == 0) == good and "error" not in summary


def side(key: str) -> int:
    """The side: 4 for "pos_embed_4x4"."""
    return int(key.rsplit("_", 1)[1].split("x")[0])
