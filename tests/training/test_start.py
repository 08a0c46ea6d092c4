"""The start and results of LoRA runs: adapters of earlier runs, quantised kernels, the model merged at the end."""

import json
import weakref
from pathlib import Path

import jax
import numpy as np
import pytest
from paths import ROOT
from training_cases import CONFIG, random_params
from training_data import write_tokenizers

from conversion import merge_lora
from llamavid_jax import LLaMAVIDLlavaImageProcessor
from llamavid_jax.checkpoints.weights import load_weights, save_part, save_weights
from llamavid_jax.errors import CheckpointError, ConfigError, InputError
from llamavid_jax.models import quantize
from llamavid_jax.models.lora import TARGETS
from llamavid_jax.parallel.mesh import make_mesh
from llamavid_jax.training import result, start
from llamavid_jax.training.config import TrainConfig, read_config
from llamavid_jax.training.result import save_result
from llamavid_jax.training.start import load_start

RECIPE = ROOT / "configs" / "tiny" / "lora.yaml"
BASES = pytest.mark.parametrize("base", ["float", "nf4"])
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A checkpoint of random weights."""
    folder = tmp_path_factory.mktemp("model")
    write_tokenizers(folder)
    CONFIG.save_pretrained(folder)
    save_weights(folder, random_params())
    return folder


@pytest.fixture(autouse=True)
def mesh():
    """A mesh without the first device, on which merging happens."""
    mesh = make_mesh(jax.devices()[4:6], fsdp=2)
    with jax.set_mesh(mesh):
        yield mesh


def recipe(model: Path, *overrides: str) -> TrainConfig:
    return read_config(RECIPE, ("model=", "data.tokenizer=", f"start.model={model}", *overrides))


def begin(model: Path, mesh, *overrides: str) -> start.Start:
    return load_start(recipe(model, *overrides), mesh)


def leave(output: Path, run: start.Start, trained: dict[str, jax.Array], model: Path, *overrides: str) -> None:
    config = recipe(model, *overrides)
    save_result(output, run, trained, config.training.dtype, config.lora, config.start, config.data.fps)


def moved(run: start.Start) -> dict[str, jax.Array]:
    """The trained parameters as after training: B is no longer zero."""
    noise = {path: RNG.normal(scale=0.1, size=value.shape) for path, value in run.trained.items()}
    return {path: value + noise[path].astype(np.float32) for path, value in run.trained.items()}


def weights(folder: Path) -> dict[str, np.ndarray]:
    return {path: np.asarray(value) for path, value in load_weights(folder, CONFIG).items()}


def trained_by(run: start.Start) -> dict[str, np.ndarray]:
    return {path: np.asarray(value) for path, value in run.trained.items()}


@BASES
def test_the_adapter_merged_is_the_runs_model(base, model, mesh, tmp_path):
    """`conversion.merge_lora` merges the updates and takes the fully trained parameters beside them."""
    run = begin(model, mesh, f"lora.base={base}")
    leave(tmp_path, run, moved(run), model, f"lora.base={base}")
    assert merge_lora.main([str(model), str(tmp_path / "adapter"), str(tmp_path / "merged")]) == 0
    before, wanted, found = (weights(folder) for folder in (model, tmp_path / "model", tmp_path / "merged"))
    for path, value in wanted.items():
        np.testing.assert_allclose(found[path], value, rtol=1e-5, atol=1e-6, err_msg=path)
    changed = {path for path, value in wanted.items() if not np.array_equal(value, before[path])}
    adapted = {f"llama.layers.{place}.kernel" for place in TARGETS.values()}
    assert changed == adapted | {path for path in before if path.startswith(("qformer.", "visual_tokens."))}
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        model
    )


def test_the_model_asks_at_the_rate_that_it_was_trained_with(model, mesh, tmp_path):
    run = begin(model, mesh, "data.fps=0.5")
    leave(tmp_path, run, run.trained, model, "data.fps=0.5")
    assert LLaMAVIDLlavaImageProcessor.from_pretrained(tmp_path / "model").fps == 0.5


def test_full_parameters_of_another_model_are_not_merged(model, mesh, tmp_path, capsys):
    run = begin(model, mesh)
    leave(tmp_path, run, run.trained, model)
    save_part(tmp_path / "adapter", {"qformer.query": jax.numpy.zeros((2, 3))})
    assert merge_lora.main([str(model), str(tmp_path / "adapter"), str(tmp_path / "merged")]) == 2
    assert "adapter/weights: qformer.query is (2, 3), but" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


def test_a_quantized_run_keeps_the_adapter_it_started_from(model, mesh, tmp_path):
    """Unquantised kernels and frozen parts end as they started."""
    paths = ("visual_tokens.query_projector.kernel", "llama.layers.attn.q.kernel", "llama.norm.scale")
    stage = {path: random_params(1)[path] for path in paths}
    save_part(tmp_path / "stage", stage)
    frozen = ("trainable={'llama.*': false, 'vision.*': false, 'qformer.*': true, 'visual_tokens.*': false}",)
    overrides = ("lora.base=nf4", f"start.adapter={tmp_path / 'stage'}", *frozen)
    run = begin(model, mesh, *overrides)
    leave(tmp_path, run, run.trained, model, *overrides)
    wanted = weights(model) | {path: np.asarray(value) for path, value in stage.items()}
    for path, value in weights(tmp_path / "model").items():
        np.testing.assert_array_equal(value, wanted[path], err_msg=path)


def test_a_quantized_run_writes_the_adapter_before_it_merges_on_the_cpu(model, mesh, tmp_path, monkeypatch):
    run = begin(model, mesh, "lora.base=nf4")

    def no_room(directory, config, dtype, mesh):
        assert mesh.devices.ravel().tolist() == jax.local_devices(backend="cpu")[:1]
        raise MemoryError

    monkeypatch.setattr(result, "load_weights", no_room)
    with pytest.raises(MemoryError):
        leave(tmp_path, run, run.trained, model, "lora.base=nf4")
    assert {file.name for file in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "SHA256SUMS", "weights"
    }  # fmt: skip


def test_quantizing_lets_go_of_each_whole_kernel(model, mesh, monkeypatch):
    alive, kernels, quantized, linears = [], [], start.quantized, quantize.linears

    def watched(structure, params, kind):
        kernels.extend(weakref.ref(params[f"llama.layers.{place}.kernel"]) for place in TARGETS.values())
        return quantized(structure, params, kind)

    def counted(layers):
        for one in linears(layers):
            alive.append(sum(kernel() is not None for kernel in kernels))
            yield one

    monkeypatch.setattr(start, "quantized", watched)
    monkeypatch.setattr(quantize, "linears", counted)
    begin(model, mesh, "lora.base=nf4")
    assert alive == [7, 6, 5, 4, 3, 2, 1]


@BASES
def test_a_run_goes_on_from_the_updates_of_another(base, model, mesh, tmp_path):
    first = begin(model, mesh)
    trained = moved(first)
    leave(tmp_path, first, trained, model)
    second = begin(model, mesh, f"lora.base={base}", f"start.adapter={tmp_path / 'adapter'}", "lora.dropout=0.5")
    found = trained_by(second)
    assert found.keys() == trained.keys()
    for path, value in trained.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)
        assert second.trained[path].sharding == value.sharding
    (tmp_path / "peft").mkdir()  # PEFT leaves the updates alone
    for file in (tmp_path / "adapter").glob("adapter_*"):
        file.rename(tmp_path / "peft" / file.name)
    alone = trained_by(begin(model, mesh, f"start.adapter={tmp_path / 'peft'}"))
    before = weights(model)
    for path, value in alone.items():
        np.testing.assert_array_equal(value, trained[path] if ".lora." in path else before[path], err_msg=path)


def test_updates_that_the_run_cannot_take_are_named(model, mesh, tmp_path):
    run = begin(model, mesh)
    leave(tmp_path, run, run.trained, model)
    given = f"start.adapter={tmp_path / 'adapter'}"
    for override, says in (
        ("lora=null", r"which holds LoRA updates, but lora is null; .*conversion\.merge_lora"),
        ("lora.rank=2", r"lora\.rank is 2, but 4 in start\.adapter"),
        ("lora.alpha=4", r"lora\.alpha is 4, but 8 in start\.adapter"),
        ("lora.targets=[q]", r"lora\.targets is \['q'\], but \['q', 'k', "),
    ):
        with pytest.raises(ConfigError, match=says):
            begin(model, mesh, given, override)


@BASES
def test_a_kernel_does_not_train_under_its_update(base, model, mesh):
    overrides = (f"lora.base={base}", "trainable.llama.*=true", "lora.targets=[k]")
    named = "k" if base == "float" else "q"  # quantised kernels do not train
    with pytest.raises(InputError, match=rf"trainable: llama\.layers\.attn\.{named}\.kernel trains, but lora"):
        begin(model, mesh, *overrides)


def test_a_part_of_another_model_is_named(model, mesh, tmp_path):
    for path, shape in (("qformer.query", (2, 3)), ("qformer.nothing", (2,))):
        save_part(tmp_path, {path: jax.numpy.zeros(shape)})
        with pytest.raises(CheckpointError, match=f"{path}.*; give the adapter of a run of this model"):
            begin(model, mesh, f"start.adapter={tmp_path}")


def test_more_question_tokens_than_positions_are_named(model, mesh):
    with pytest.raises(ConfigError, match=r"data.question_tokens is 600, but the Q-Former has 512 positions; use 512"):
        begin(model, mesh, "data.question_tokens=600")
