"""The ablation: its variants are models, and what it prints of runs that are there."""

import dataclasses
import json
from pathlib import Path

import pytest
from paths import ROOT

from demo import ablation
from llamavid_jax.config.schema import LLaMAVIDLlavaConfig


@pytest.mark.parametrize("name", ablation.VARIANTS)
def test_variants(name):
    config = ablation.config(ablation.Place(ROOT / "demo/model"), name)
    kinds = config.frame_tokens != "content", config.frame_tokens != "context"
    assert kinds == tuple(part != "0" for part in ablation.VARIANTS[name].paper_tokens.split(" + "))


def test_tokens_of_another_tower(tmp_path):
    """The tower sets the image size: its 64 patches give 4 content tokens for grid:2, and 16 for grid:4."""
    tower = dataclasses.replace(ablation.config(ablation.Place(), "both").vision_tower_config, image_size=64)
    dataclasses.replace(ablation.config(ablation.Place(), "both"), vision_tower_config=tower).save_pretrained(tmp_path)
    at = ablation.Place(tmp_path)
    tokens = [ablation.config(at, name).tokens_per_frame for name in ("both", "grid:2", "grid:4", "all")]
    assert tokens == [2, 5, 17, 65]


def test_every_variant_has_its_table():
    assert {name for names in ablation.TABLES.values() for name in names} == set(ablation.VARIANTS)


def keep(folder, name, accuracy, questions=9):
    (folder / "runs/ablation" / name).mkdir(parents=True, exist_ok=True)
    parts = {"all": {"exact": accuracy, "questions": questions}, "way": {"exact": 1.0, "questions": 3}}
    (folder / "runs/ablation" / name / "accuracy.json").write_text(json.dumps({"accuracy": parts}))


def test_seeds_are_one_line(tmp_path, monkeypatch, capsys):
    """The table has a line per variant, even for those not selected: mean and standard error over seeds.

    Existing runs are not trained again, and runs with another number of steps do not count.
    """
    monkeypatch.chdir(tmp_path)
    for seed, value in enumerate((0.8, 0.85, 0.9)):
        keep(tmp_path, f"both_600_{seed}", value)
    keep(tmp_path, "both_300_0", 0.1)
    keep(tmp_path, "grid2_600_0", 0.7)
    assert ablation.main(["out.png", "--only", "both"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "| both | 2 | 3 | 100.0 ± 0.0 | 85.0 ± 2.9 | 1 + 1 | 55.5 | 83.1 | 68.8 | 49.0 |" in lines
    assert "| grid:2 | 5 | 1 | 100.0 | 70.0 | 1 + 4 | 56.2 | 83.5 | 68.7 | 49.1 |" in lines
    assert (tmp_path / "out.png").stat().st_size > 5000
    keep(tmp_path, "both_600_2", 0.9, questions=90)
    assert ablation.main(["out.png", "--only", "both"]) == 2
    assert "runs about [9, 90] questions" in capsys.readouterr().err


def test_what_is_run(tmp_path, monkeypatch):
    """Shared stages run once, stage 2 and its questions once per seed; all but the vision tower trains."""
    monkeypatch.chdir(tmp_path)
    ran = []

    def run(*arguments):
        ran.append(arguments)
        if arguments[0] == "train.py":
            (output,) = (Path(value) for value in overrides(arguments, "output"))
            (output / "model").mkdir(parents=True)
        if "split_chat" in arguments:
            Path(arguments[4]).write_text(json.dumps([{"id": "7", "video": "clips/a.mp4", "conversations": []}]))
        if "--json" in arguments:
            keep(tmp_path, Path(arguments[-1]).parent.name, 0.5)

    monkeypatch.setattr(ablation, "run_python", run)
    assert ablation.main(["out.png", "--only", "both", "bert", "--seeds", "2", "--steps", "9"]) == 0
    model = LLaMAVIDLlavaConfig.from_yaml(tmp_path / "runs/ablation/bert_9_1.yaml")
    assert model == ablation.config(ablation.Place(), "bert")
    trained = [arguments for arguments in ran if arguments[0] == "train.py"]
    stages = [Path(arguments[2]).stem for arguments in trained]
    each = ["stage0_refer", "stage1_align", "stage2_instruct"]
    assert stages == ["stage0_pretrain", *each, *each, "stage2_instruct", "stage2_instruct"]
    assert all(overrides(arguments, "trainable.vision.*") == ["False"] for arguments in trained)
    assert [seed for arguments in trained for seed in overrides(arguments, "data.seed")] == ["0", "0", "1", "1"]
    (record,) = json.loads((tmp_path / "runs/ablation/questions.json").read_text())
    assert record == {"id": "7", "conversations": [], "features": "features/a.mp4.safetensors"}


def overrides(arguments, name):
    return [argument.partition("=")[2] for argument in arguments if argument.startswith(f"{name}=")]
