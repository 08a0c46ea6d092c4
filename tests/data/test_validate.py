"""The validator on a set that holds every kind of damage, and its exit codes."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from clips import cut, index_frame, write_clip
from paths import ROOT
from PIL import Image

from llamavid_jax.checkpoints.tower import TowerHash
from llamavid_jax.checkpoints.weights import save_weights
from llamavid_jax.config.schema import LLaMAVIDLlavaConfig
from llamavid_jax.data import validate
from llamavid_jax.media.feature_file import Description, FeatureWriter
from llamavid_jax.media.features import processing
from llamavid_jax.weights import inventory


def talk(*values):
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


FEATURES = (3, 17, 64)  # frames, CLS and patches, width: those of the golden checkpoint
ASKED = talk("<image>\nWhat?", "This.")


@pytest.fixture
def media(tmp_path):
    """A folder with a usable image, video and feature file, and with unusable ones."""
    folder = tmp_path / "media"
    folder.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 60, 3), np.uint8)).save(folder / "é [b].png")
    cut(folder / "é [b].png", 0.5).rename(folder / "half.png")
    Image.new("RGB", (400, 2)).save(folder / "strip.png")
    whole = write_clip(folder / "v.mp4", [index_frame(i) for i in range(90)], 10, container={"movflags": "faststart"})
    cut(whole, 0.6).rename(folder / "cut.mp4")
    np.savez(folder / "f.npz", feats=np.ones(FEATURES, np.float16), inputs="<image>a" * 3)
    np.savez(folder / "short.npz", feats=np.ones(FEATURES, np.float16), inputs="<image>a" * 2)
    bad = np.ones(FEATURES, np.float16)
    bad[2] = np.inf
    np.savez(folder / "inf.npz", feats=bad)
    return folder


def run(tmp_path, media, rows, *arguments):
    path = tmp_path / "data.json"
    path.write_text(json.dumps(rows))
    report = tmp_path / "report.json"
    code = validate.main([str(path), "--media", str(media), "--json", str(report), *arguments])
    return code, json.loads(report.read_text())


GOOD = [
    {"id": "p", "image": "é [b].png", "conversations": ASKED},
    {"id": "v", "video": "v.mp4", "conversations": ASKED},
    {"id": "f", "video": "f.npz", "conversations": ASKED},
    {"id": "t", "conversations": talk("Hello.", "Hello.")},
]


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(ROOT / "tests/golden/text", folder)
    shutil.copy(ROOT / "tests/golden/short_video_mean/config.json", folder)
    return str(folder)


@pytest.mark.parametrize("decode", [[], ["--decode"]])
def test_a_good_set_is_summed_up(tmp_path, media, model, decode, capsys):
    code, report = run(tmp_path, media, GOOD, *decode)
    assert code == 0 and report["broken"] == [] and report["problems"] == {} and report["repeated_ids"] == 0
    assert report["kinds"]["video"] == {"samples": 1, "broken": 0, "frames": 9, "tokens": 0, "seconds": 9.0}
    assert report["kinds"]["features"]["frames"] == 3 and report["kinds"]["text"]["samples"] == 1
    assert "No sample is broken." in capsys.readouterr().out
    code, report = run(tmp_path, media, GOOD, "--fps", "2", "--model", model, *decode)
    video = report["kinds"]["video"]
    assert (code, video["frames"], video["seconds"]) == (0, 18, 9.0)
    _, slow = run(tmp_path, media, GOOD, "--model", model)
    assert video["tokens"] - slow["kinds"]["video"]["tokens"] == 2 * 9  # two tokens a frame


BAD = [
    ({"image": "no.png", "conversations": ASKED}, "missing", "does not exist"),
    ({"video": "", "conversations": ASKED}, "malformed", "path of one file"),
    ({"image": ".", "conversations": ASKED}, "unreadable", "is a folder"),
    ({"image": "strip.png", "conversations": ASKED}, "unreadable", "400 x 2 pixels"),
    ({"image": "v.mp4", "conversations": ASKED}, "unreadable", "not a picture"),
    ({"video": "é [b].png", "conversations": ASKED}, "unreadable", "still picture"),
    ({"video": "no.npz", "conversations": ASKED}, "missing", "does not exist"),
    ({"video": "f.pth", "conversations": ASKED}, "malformed", "pickle"),
    ({"image": "é [b].png", "conversations": []}, "malformed", "conversations is"),
    ({"image": None, "conversations": ASKED}, "malformed", "names no image"),
    ({"image": "é [b].png", "conversations": talk("What?", "It.")}, "malformed", "no turn holds"),
    ({"image": "é [b].png", "conversations": talk("<image>", 5)}, "malformed", "is 5"),
    ({"video": "short.npz", "conversations": ASKED}, "unreadable", "2 <image> for 3 frames"),
    ({"conversations": [{"role": "user", "content": "Hi"}]}, "malformed", "turn 0 has 'role' and 'content'"),
    (
        {"image": "é [b].png", "conversations": [{"role": "user", "content": "<image>Hi"}]},
        "malformed",
        "turn 0 has 'role' and 'content'",
    ),
    ({"messages": [{"role": "user", "content": "Hi"}]}, "malformed", "has 'messages', as chat templates write them"),
    ({"image": "\ud800.png", "conversations": ASKED}, "missing", r"\ud800.png"),
    ({"image": "é [b].png", "conversations": talk("<image>\ud800", "It.")}, "malformed", "half a surrogate pair"),
    ("[red]x[/nothing]", "malformed", "must be an object"),
]  # fmt: skip


@pytest.mark.parametrize("with_model", [False, True])
def test_every_kind_of_damage_is_named(tmp_path, media, model, with_model, capsys):
    rows = [GOOD[0], *(row if isinstance(row, str) else {"id": "[b]x"} | row for row, _, _ in BAD), GOOD[1]]
    code, report = run(tmp_path, media, rows, *(["--model", model] if with_model else []))
    assert code == 1
    assert [(check["index"], check["problem"]) for check in report["broken"]] == [
        (i, problem) for i, (_, problem, _) in enumerate(BAD, 1)
    ]
    for check, (_, _, reason) in zip(report["broken"], BAD, strict=True):
        assert reason in check["reason"]
    assert report["repeated_ids"] == 1 and report["kinds"]["image"]["samples"] == 1 + 9
    out = capsys.readouterr().out
    assert f"{len(BAD)} samples are broken: 3 missing" in out and "[b]x" in out
    assert "1 ids stand for several samples" in out


def test_decoding_finds_what_headers_hide(tmp_path, media):
    rows = [
        {"image": "half.png", "conversations": ASKED},
        {"video": "cut.mp4", "conversations": ASKED},
        {"video": "inf.npz", "conversations": ASKED},
        *GOOD,
    ]
    code, report = run(tmp_path, media, rows)
    assert code == 1 and [check["index"] for check in report["broken"]] == [1]  # cut.mp4: its packets are counted
    code, report = run(tmp_path, media, rows, "--decode")
    assert code == 1 and [check["index"] for check in report["broken"]] == [0, 1, 2]
    assert report["problems"] == {"unreadable": 3}


def test_features_of_another_tower(tmp_path, media, model):
    """Only found with a model; a training run could read none of these samples."""
    np.savez(media / "other.npz", feats=np.ones((3, 17, 32), np.float16))
    rows = [*GOOD, {"video": "other.npz", "conversations": ASKED}]
    assert run(tmp_path, media, rows)[0] == 0
    code, report = run(tmp_path, media, rows, "--model", model)
    assert code == 1 and [check["problem"] for check in report["broken"]] == ["malformed"]
    assert "16 patches of 32 numbers a frame, the model takes 16 of 64" in report["broken"][0]["reason"]


def test_films_are_checked_as_in_a_run_without_a_model_too(tmp_path, media):
    """Their places, and what says when their frames are, ask no tokenizer."""
    writer = FeatureWriter(media / "slow.safetensors", 1, "F16")
    writer.add(np.ones(FEATURES[1:], np.float16))
    sampling = {"fps": 0.5, "rule": "stride", "seconds": 2.0}
    writer.commit(Description(True, [0.0], {}, sampling, {}, {"sha256": "ab"}))
    rows = [
        {"features": "f.npz", "conversations": talk("<image> or <image>?", "This.")},
        {"features": "f.npz", "conversations": talk("<image>\nWhat?", "This.", "<image>\nAnd then?", "That.")},
        {"video": "v.mp4", "times": "frame", "conversations": talk("<image> or <image>?", "This.")},
        {"features": "f.npz", "times": "frame", "conversations": ASKED},
        {"features": "slow.safetensors", "conversations": ASKED},
    ]
    code, report = run(tmp_path, media, [*rows, *GOOD])
    assert code == 1 and [check["index"] for check in report["broken"]] == [0, 1, 2, 3, 4]
    said = ["must stand in one turn, once"] * 3 + ["does not say when its frames are", "holds 0.5 frames a second"]
    for check, reason in zip(report["broken"], said, strict=True):
        assert reason in check["reason"]
    code, report = run(tmp_path, media, rows[4:], "--fps", "0.5")
    assert code == 0 and report["broken"] == []


def test_features_for_a_model_that_makes_a_token_of_cls(tmp_path, media, model):
    path = Path(model, "config.json")
    config = json.loads(path.read_text()) | {"mm_vision_select_feature": "cls_patch", "compress_type": None}
    path.write_text(json.dumps(config))
    code, report = run(tmp_path, media, GOOD, "--model", model)
    assert code == 1 and [check["id"] for check in report["broken"]] == ["f"]
    assert "this model makes a token of CLS" in report["broken"][0]["reason"]


def test_feature_files_that_name_another_tower(tmp_path, media, model, capsys):
    """The shape fits, but the file names other weights or preprocessing, which a training run would refuse."""
    config = LLaMAVIDLlavaConfig.from_pretrained(model)
    shapes = {path: shape for path, shape in inventory.shapes(config).items() if path.startswith("vision.")}
    params = {path: jnp.full(shape, 0.3 + number) for number, (path, shape) in enumerate(shapes.items())}
    own = TowerHash(SimpleNamespace(params=params, config=config)).rounded()
    vision = config.vision_tower_config
    usual = processing(vision.image_size, vision.image_mean, vision.image_std)
    made = {"own": (own, usual), "another": ("ab", usual), "paler": (own, usual | {"mean": [0.0] * 3})}
    for name, (tower, prepared) in made.items():
        writer = FeatureWriter(media / f"{name}.safetensors", 3, "F16")
        for frame in np.ones(FEATURES, np.float16):
            writer.add(frame)
        sampling = {"fps": 1.0, "rule": "stride", "seconds": 3.0}
        writer.commit(Description(True, [0.0, 1.0, 2.0], {"name": name}, sampling, prepared, {"sha256": tower}))
    rows = [{"id": name, "video": f"{name}.safetensors", "conversations": ASKED} for name in made]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    assert validate.main([str(tmp_path / "data.json"), "--media", str(media), "--model", model]) == 2
    assert "weights is not an Orbax checkpoint" in capsys.readouterr().err
    save_weights(model, params)
    code, report = run(tmp_path, media, rows, "--model", model)
    assert code == 1 and [check["problem"] for check in report["broken"]] == ["malformed"] * 2
    for check, reason in zip(
        report["broken"], ("was made by another vision tower", "that were prepared by"), strict=True
    ):
        assert reason in check["reason"]


def test_too_long_for_the_model(tmp_path, media, model):
    long = {"conversations": talk("Hello.", "word " * 600 + "end")}
    assert run(tmp_path, media, [*GOOD, long])[0] == 0
    code, report = run(tmp_path, media, [*GOOD, long], "--model", model)
    assert code == 1 and report["problems"] == {"oversized": 1} and "limit of 512" in report["broken"][0]["reason"]


def test_oversized_and_untrained_samples(tmp_path, media, model):
    rows = [*GOOD, {"conversations": talk("Hello.", "word " * 300 + "end")}, {"conversations": talk("Hello.")}]
    code, report = run(tmp_path, media, rows, "--model", model, "--max-tokens", "300")
    assert code == 1
    assert [(check["index"], check["problem"]) for check in report["broken"]] == [(4, "oversized"), (5, "malformed")]
    assert "raise the limit of 300" in report["broken"][0]["reason"]
    assert "no token of it would be trained" in report["broken"][1]["reason"]


def test_a_long_report_is_shown_in_part_and_written_whole(tmp_path, media, capsys):
    rows = [{"id": str(i), "image": f"no{i}.png", "conversations": ASKED} for i in range(600)]
    code, report = run(tmp_path, media, rows)
    assert code == 1 and [check["index"] for check in report["broken"]] == list(range(600))
    out = capsys.readouterr().out
    assert "... and 550 more: --json FILE" in out and out.count("missing") < 60


def test_a_report_that_cannot_be_written_is_shown(tmp_path, capsys):
    (tmp_path / "data.json").write_text(json.dumps([GOOD[3]]))
    assert validate.main([str(tmp_path / "data.json"), "--json", "/proc/x/report.json"]) == 2
    assert "No sample is broken." in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["no.json"],
        ["DATA", "--fps", "0"],
        ["DATA", "--max-tokens", "5"],
        ["DATA", "--model", "MODEL", "--max-tokens", "0"],
        ["DATA", "--model", "no"],
        ["DATA", "--template", "v9"],
        ["DATA", "--json", "/proc/x/report.json"],
        ["DATA", "--media", "nowhere"],
        ["DATA", "--unknown"],
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_two(tmp_path, model, arguments, monkeypatch, capsys):
    data = tmp_path / "data.json"
    data.write_text(json.dumps([GOOD[3]]))
    monkeypatch.chdir(tmp_path)
    assert validate.main([{"DATA": str(data), "MODEL": model}.get(a, a) for a in arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert error.splitlines()[-1].startswith("error: ")
