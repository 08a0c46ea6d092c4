"""The ablation: its variants are models, and what it prints of runs that are there."""

import json

import pytest
import yaml
from paths import ROOT

from demo import ablation
from llamavid_jax.config.schema import LLaMAVIDLlavaConfig


@pytest.mark.parametrize("name", ablation.VARIANTS)
def test_variants(name, tmp_path):
    variant = ablation.VARIANTS[name]
    recipe = yaml.safe_load((ROOT / ablation.MODEL).read_text()) | variant.fields
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(recipe))
    config = LLaMAVIDLlavaConfig.from_yaml(tmp_path / "model.yaml")
    assert config.tokens_per_frame == variant.tokens
    kinds = config.frame_tokens != "content", config.frame_tokens != "context"
    assert kinds == tuple(part != "0" for part in variant.paper_tokens.split(" + "))


def test_every_variant_has_its_table():
    assert {name for names in ablation.TABLES.values() for name in names} == set(ablation.VARIANTS)


def test_seeds_are_one_line(tmp_path, monkeypatch, capsys):
    """Runs that are there are not trained again; three seeds give a mean and its standard error."""
    monkeypatch.chdir(tmp_path)
    for name, values in {"both": (0.8, 0.85, 0.9), "grid2": (0.7, 0.7, 0.7)}.items():
        for seed, value in enumerate(values):
            (tmp_path / f"runs/ablation/{name}_{seed}").mkdir(parents=True)
            found = {"accuracy": {"all": {"exact": value, "questions": 9}, "way": {"exact": 1.0, "questions": 3}}}
            (tmp_path / f"runs/ablation/{name}_{seed}/accuracy.json").write_text(json.dumps(found))
    assert ablation.main(["out.png", "--only", "both", "grid:2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "| both | 2 | 100.0 ± 0.0 | 85.0 ± 2.9 | 1 + 1 | 55.5 | 83.1 | 68.8 | 49.0 |" in lines
    assert "| grid:2 | 5 | 100.0 ± 0.0 | 70.0 ± 0.0 | 1 + 4 | 56.2 | 83.5 | 68.7 | 49.1 |" in lines
    assert (tmp_path / "out.png").stat().st_size > 5000
