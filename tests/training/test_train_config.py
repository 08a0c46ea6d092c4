"""Every recipe of `configs/` trains what the original trains, with its numbers; errors of wrong files."""

import dataclasses
import json
import os
import socket

import numpy as np
import pytest
import yaml
from flax import nnx
from paths import CONFIGS, GOLDEN

import train
from benchmarks.packing import mixed
from llamavid_jax.checkpoints.weights import abstract_params
from llamavid_jax.config.schema import LLaMAVIDLlavaConfig
from llamavid_jax.data.plan import fit, plan_epoch
from llamavid_jax.errors import ConfigError, InputError
from llamavid_jax.models.llama_vid import LlamaVid
from llamavid_jax.models.lora import add_lora
from llamavid_jax.models.structure import flat_paths
from llamavid_jax.training.config import read_config
from llamavid_jax.training.optimizer import lr_factors
from llamavid_jax.training.trainable import matches, trainable_paths
from llamavid_jax.weights import inventory
from llamavid_jax.weights.files import weight_table

RECIPES = sorted(path for path in CONFIGS.glob("**/*.yaml") if path.parent.name != "models")
STAGE2 = CONFIGS / "stage2_instruct.yaml"

# the original's scripts: rate, samples a step, accumulated gradients, longest row, compress type, tokens a frame
SCRIPTS = {
    "stage1_align": (1e-3, 256, 1, 2048, "mean", 2),
    "stage1_align_13b": (1e-3, 256, 1, 2048, "mean", 2),
    "stage1_align_grid2": (1e-3, 256, 2, 2048, "grid:2", 5),
    "stage1_align_image": (1e-3, 256, 1, 2048, "none", 257),
    "stage1_align_image_336": (1e-3, 256, 1, 2048, "none", 577),
    "stage1_align_image_336_13b": (1e-3, 256, 1, 2048, "none", 577),
    "stage1_align_image_grid4": (1e-3, 256, 1, 2048, "grid:4", 17),
    "stage2_instruct": (2e-5, 128, 4, 2048, "mean", 2),
    "stage2_instruct_13b": (2e-5, 32, 2, 2048, "mean", 2),
    "stage2_instruct_grid2": (2e-5, 128, 8, 2048, "grid:2", 5),
    "stage2_instruct_image": (2e-5, 128, 1, 4096, "none", 257),
    "stage2_instruct_image_336": (2e-5, 128, 2, 4096, "none", 577),
    "stage2_instruct_image_336_13b": (2e-5, 64, 4, 4096, "none", 577),
    "stage2_instruct_image_grid4": (2e-5, 128, 1, 2048, "grid:4", 17),
    "stage3_long_video": (2e-5, 8, 1, 65536, "mean", 2),
    "stage3_long_video_13b": (2e-5, 8, 1, 65536, "mean", 2),  # as the 7B's: the original has no such script
}


# the original has no scripts for these; their numbers are those of its video scripts (tests/golden has what trains)
VARIANTS = {
    f"{stage}_{kind}" for stage in ("stage1_align", "stage2_instruct") for kind in ("bert", "clip", "start_end")
}
VARIANTS |= {"stage1_align_short_qformer", "stage2_instruct_short_qformer"}


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    """Recipes give their models' paths relative to the folder of train.py."""
    monkeypatch.chdir(CONFIGS.parent)


def recipe(name: str, *overrides: str):
    return read_config(CONFIGS / f"{name}.yaml", overrides)


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: str(file.relative_to(CONFIGS)))
def test_every_recipe_builds(file):
    """It parses, its model builds, and its tables cover the parameters; adapters are where `lora` puts them."""
    config = read_config(file)
    if file.parent.name == "demo":  # its later stages start from the model of the previous run
        config = dataclasses.replace(config, model="configs/models/demo.yaml")
    model_config = config.model_config()

    def make():
        rngs = nnx.Rngs(0)
        model = LlamaVid(model_config, rngs=rngs)
        if config.lora:
            add_lora(model.llama, config.lora, rngs)
        return model

    shapes = {path: leaf.shape for path, leaf in flat_paths(nnx.state(nnx.eval_shape(make), nnx.Param)).items()}
    assert set(inventory.axes(model_config, shapes)) == set(shapes)
    adapters = {path for path in shapes if ".lora." in path}
    assert len(adapters) == (14 if "lora" in file.stem else 0)
    trains = trainable_paths(shapes.keys() - adapters, config.trainable)
    assert any(path.startswith("vision.") for path in trains) == file.stem.startswith("stage0_")
    lr_factors(trains | adapters, config.optimizer)
    ways = 8  # the original's GPUs
    assert file.parent != CONFIGS or config.training.batch_size // config.training.micro_batches % ways == 0
    for shape in config.data.shapes:  # a visual token for each pair fits the row, and the attention kernel takes it
        assert shape.pairs * model_config.tokens_per_frame <= shape.tokens * (1 if shape.frames > 1 else 2)
        assert shape.tokens % 128 == 0 or file.parent.name == "demo"  # the demo is for CPUs


def padding(plan, sizes, shapes, tokens_per_frame) -> float:
    """The fraction of an epoch's tokens that is padding."""
    _, need, _ = fit(sizes, shapes, tokens_per_frame, packing=True)
    return 1 - need[0].sum() / sum(len(batch.rows) * shapes[batch.shape_index].tokens for batch in plan)


def test_every_script_has_a_recipe_and_its_numbers():
    staged = {path.stem for path in RECIPES if path.parent == CONFIGS and path.stem != "lora"}
    assert staged == SCRIPTS.keys() | VARIANTS
    for name, (rate, samples, accumulated, tokens, compress, per_frame) in SCRIPTS.items():
        config = recipe(name)
        model, loop = config.model_config(), config.training
        assert (config.optimizer.learning_rate, config.max_tokens) == (rate, tokens), name
        if config.data.packing:  # its rows hold about as many samples as a step of the original
            sizes = mixed(4000, per_frame)
            plan = plan_epoch(sizes, config.data.shapes, loop.batch_size, per_frame, 0, 0, packing=True)
            assert 0.9 < len(sizes.kind) / len(plan) / samples < 1.3, name
            assert padding(plan, sizes, config.data.shapes, per_frame) < 0.1, name
        else:
            assert (loop.batch_size, loop.micro_batches) == (samples, accumulated), name
        assert (model.compress_type, model.tokens_per_frame) == (compress, per_frame), name
        assert config.data.template == ("plain_guided" if name.startswith("stage1") else "imgsp_v1"), name
        assert config.data.packing == (name.startswith("stage2") and "image" not in name), name
        assert (loop.epochs, loop.steps, loop.dtype, loop.remat) == (1, 0, "bfloat16", "full"), name
        other = config.optimizer
        assert (other.warmup, other.weight_decay, other.max_grad_norm) == (0.03, 0, 1), name
        assert (other.betas, other.eps, other.lr_factors) == ([0.9, 0.999], 1e-8, {}), name
        assert model.text_config.hidden_size == (5120 if "13b" in name else 4096), name
        assert model.vision_tower_config.image_size == (336 if "336" in name else 224), name
        assert model.image_aspect_ratio == ("crop" if name.startswith("stage1") else "pad"), name


@pytest.fixture(scope="module")
def original_names() -> dict[str, set[str]]:
    """Path → the original's names of its weights."""
    config = LLaMAVIDLlavaConfig.from_pretrained(GOLDEN / "short_video_mean")
    names = {path: set() for path in abstract_params(config)}
    for weight in weight_table(config, "original"):
        names[weight.path].add(weight.name)
    return names


def trained(names: dict[str, set[str]], stage: str) -> dict[str, set[str]]:
    """For each recipe of a stage, the original's names of what it trains."""
    files = [file for file in RECIPES if file.stem.startswith(stage) and file.parent.name != "demo"]
    files = [file for file in files if file.stem not in VARIANTS]
    tables = {file.stem: trainable_paths(names, read_config(file).trainable) for file in files}
    return {name: set().union(*(names[path] for path in paths)) for name, paths in tables.items()}


@pytest.mark.parametrize("stage, recipes", [("stage1", 7), ("stage2", 7)])
def test_the_recorded_names_train(original_names, stage, recipes):
    """The tables of all sizes select exactly the parameters that had a gradient in the original."""
    recorded = set(json.loads(str(np.load(GOLDEN / "short_video_mean" / f"train_{stage}.npz")["trainable"])))
    found = trained(original_names, stage)
    assert len(found) == recipes
    for name, names in found.items():
        assert names == recorded, name


def test_stage_3_trains_llama_and_the_content_projector(original_names):
    """`…_freeze_all` leaves `mm_projector` and LLaMA trainable."""
    every = set().union(*original_names.values())
    expected = {name for name in every if not name.startswith(("model.vision_tower.", "model.vlm_att_"))}
    parts = {name.removeprefix("model.").split(".")[0] for name in expected}
    assert parts == {"embed_tokens", "layers", "norm", "lm_head", "mm_projector"}
    found = trained(original_names, "stage3")
    assert found == dict.fromkeys(["stage3_long_video", "stage3_long_video_13b"], expected)


def test_rows_of_64k_tokens_divide_the_positions_by_16():
    """The factor that the rows need, whether or not the model's file has it; shorter rows change nothing."""
    row = 'data.buckets=[{"frames": 0, "pairs": 0, "questions": 0, "tokens": %d}]'
    factors = {tokens: recipe("stage2_instruct", row % tokens).model_config().text_config.rope_factor
               for tokens in (2048, 4096, 4224, 65536)}  # fmt: skip
    assert factors == {2048: 1, 4096: 1, 4224: 2, 65536: 16}
    assert recipe("stage3_long_video").model_config().text_config.rope_factor == 16
    assert recipe("stage3_long_video", row % 2048).model_config().text_config.rope_factor == 16
    assert recipe("tiny/stage3_long_video").model_config().text_config.rope_factor == 2


def test_overrides_are_yaml():
    config = recipe(
        "stage2_instruct", "training.steps=3", "optimizer.learning_rate=3e-5", "lora.rank=8", "data.path=a=b.json",
        "mesh=fsdp=2,tensor=2", "start.adapter=", "optimizer.betas=[0.8, 0.9]", "data.packing=false",
        "trainable.llama.*=false", "optimizer.lr_factors.qformer.query=2",
    )  # fmt: skip
    assert (config.training.steps, config.optimizer.learning_rate, config.data.packing) == (3, 3e-5, False)
    assert (config.data.path, config.mesh, config.start.adapter) == ("a=b.json", "fsdp=2,tensor=2", "")
    assert (config.lora.rank, config.lora.alpha, config.optimizer.betas) == (8, 16, [0.8, 0.9])
    assert config.start.model == recipe("stage2_instruct").start.model  # other fields of the section stay
    assert config.trainable == recipe("stage2_instruct").trainable | {"llama.*": False}
    assert config.optimizer.lr_factors == {"qformer.query": 2}
    assert recipe("stage2_instruct", "optimizer.betas=[0, 0.99]").optimizer.betas == [0, 0.99]
    assert recipe("lora").lora is not None
    assert recipe("lora", "lora=null").lora is None
    assert recipe("lora", "lora=null", "lora.dropout=5e-2").lora.rank == 64
    assert recipe("stage2_instruct", "output=1e5").output == "1e5"  # a folder's name is not parsed as a number
    assert recipe("stage2_instruct", "data.path=~/chat.json").data.path == os.path.expanduser("~/chat.json")


@pytest.mark.parametrize("name", ["output", "data.path", "start.model"])
def test_urls_are_refused_but_those_of_buckets(name):
    """As a path it would become a local folder `http:`.  A bucket's URL is a valid path."""
    with pytest.raises(ConfigError, match=r"http://bucket/run is a URL.*gs://BUCKET"):
        recipe("stage2_instruct", f"{name}=http://bucket/run")
    recipe("stage2_instruct", f"{name}=gs://bucket/run")


@pytest.mark.parametrize(
    "override, says",
    [
        ("data.paht=x", ("data.paht", "the fields here are path, media")),
        ("dta.path=x", ("field dta", "the fields here are output, model, start")),
        ("lora.rnk=8", ("lora.rnk", "rank, alpha, dropout, targets")),
        ("lora.rank=-1", ("lora.rank is -1", "above 0")),
        ("lora.targets=[q, head]", ("lora.targets", "q, k, v, o")),
        ("training.steps=many", ("training.steps is 'many'", "type int")),
        ("training.steps=1.5", ("training.steps is 1.5", "type int")),
        ("training.steps=-1", ("training.steps is -1", "0 or more")),
        ("training.batch_size=0", ("training.batch_size is 0", "above 0")),
        ("training.batch_size=131", ("training.batch_size is 131", "micro_batches = 2")),
        ("training={steps: 20, epochs: 3}", ("training.epochs is 3", "training.steps is 20", "training.steps=0")),
        ("training.tracker=paper", ("training.tracker is 'paper'", "tensorboard or wandb")),
        ("training={device_rows: 1, loss_weighting: micro_batch}", ("device_rows is 1", "'micro_batch'", "use tokens")),
        ("training.dtype=float16", ("training.dtype is 'float16'", "float32 or bfloat16")),
        ("training.remat=half", ("training.remat is 'half'", "none or dots or full")),
        ("training.loss_weighting=rows", ("training.loss_weighting is 'rows'", "tokens or micro_batch")),
        ("optimizer.learning_rate=0", ("optimizer.learning_rate is 0", "above 0")),
        ("optimizer.learning_rate=.nan", ("optimizer.learning_rate is nan", "above 0")),
        ("optimizer.warmup=1", ("optimizer.warmup is 1", "below 1")),
        ("optimizer.betas=[0.9]", ("optimizer.betas is [0.9]", "two numbers")),
        ("optimizer.betas=[0.9, true]", ("optimizer.betas is [0.9, True]", "two numbers")),
        ("optimizer.lr_factors={a: x}", ("optimizer.lr_factors: 'a' has 'x'", "number of 0 or more")),
        ("data.template=v9", ("v9", "imgsp_v1")),
        ("data.fps=0", ("data.fps is 0", "above 0")),
        ("data.question_tokens=0", ("data.question_tokens is 0", "above 0")),
        ("data.threads=0", ("data.threads is 0", "above 0")),
        ("data.processes=-1", ("data.processes is -1", "0 or more")),
        ("data.max_broken=2", ("data.max_broken is 2", "from 0 to 1")),
        ("data.buckets=[]", ("data.buckets is empty", "{frames, pairs, questions, tokens}")),
        ("data.buckets=[5]", ("data.buckets[0]", "a mapping")),
        ("data.buckets=[{frames: 1, pairs: 1, questions: 1}]", ("data.buckets[0]", "tokens")),
        ("data.buckets=[{frames: 1, pairs: 0, questions: 1, tokens: 9}]", ("data.buckets[0].pairs is 0",)),
        ("data.buckets=[{frames: 2, pairs: 1, questions: 1, tokens: 9}]", ("data.buckets[0]", "pair for each frame")),
        ("training.compiler_options.v9.xla_x=true", ("training.compiler_options", "'v9'", "v5e or ")),
        ("training.compiler_options={v5e: 3}", ("training.compiler_options.v5e is 3", "{OPTION: VALUE}")),
        ("mesh=fsdp", ("fsdp",)),
        ("mesh=rows=2", ("rows", "data, fsdp, tensor, sequence")),
        ("trainable=[llama]", ("trainable is ['llama']", "type dict")),
        ("start.model.folder=x", ("start.model.folder", "model has no fields")),
        ("training=5", ("training is 5", "a mapping")),
        ("training.steps", ("'training.steps' is no override", "section.key=value")),
        ("=3", ("'=3' is no override",)),
        ("training..steps=3", ("is no override",)),
    ],
)
def test_a_wrong_override_is_named(override, says):
    with pytest.raises(InputError) as error:
        recipe("stage2_instruct", override)
    assert all(text in str(error.value) for text in says), error.value
    assert "\n" not in str(error.value)


TOGETHER = ["--coordinator", "localhost:7654", "--processes", "2", "--process"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "arguments are required: --config"),
        (["--config", "FILE", "--steps", "3"], "unrecognized arguments: --steps"),
        (["--config", "FILE", "--process", "1"], "go together; give all three"),
        (["--config", "FILE", "--coordinator", "localhost", *TOGETHER[2:], "0"], "is 'localhost'; give HOST:PORT"),
        (["--config", "FILE", *TOGETHER, "2"], "--process is 2 of --processes 2; count them from 0"),
        (["--config", "FILE", "--distributed"], "this process does not find the others"),
        (["--config", "FILE", "--compile-only"], "give --topology"),
        (["--config", "FILE", "--compile-only", "--topology", "v5e:8x8", "--num-slices", "0"], "--num-slices is 0"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, says, capsys):
    assert train.main([{"FILE": str(STAGE2)}.get(argument, argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert says in error and error.startswith("train.py: ") and error.count("\n") == 1


def test_a_coordinator_that_cannot_be(capsys):
    with socket.create_server(("", 0)) as taken:
        port = str(taken.getsockname()[1])
        together = ["--processes", "2", "--process", "0"]
        assert train.main(["--config", str(STAGE2), "--coordinator", f"localhost:{port}", *together]) == 2
    error = capsys.readouterr().err
    assert f"--coordinator localhost:{port}: [Errno 98] Address already in use" in error and "and a free port" in error
    assert train.main(["--config", str(STAGE2), "--coordinator", f"nowhere.invalid:{port}", *together]) == 2
    assert "--coordinator nowhere.invalid" in capsys.readouterr().err


def test_ctrl_c_before_the_first_step_is_no_traceback(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("llamavid_jax.training.config.read_config", interrupted)
    assert train.main(["--config", str(STAGE2)]) == 130


def test_wrong_files_are_named(tmp_path):
    file = tmp_path / "x.yaml"
    with pytest.raises(ConfigError, match="does not exist; such files are in configs/"):
        read_config(file)
    for text, says in (
        ("model: m\nlora: {base: nf4}", "lora.base is 'nf4', but start.model is empty; give start.model=DIR"),
        ("a: [", "x.yaml"),
        ("- 1", "no mapping"),
        ("", "model and start.model are both"),
        ("model: 5", "model is 5; a value of type str"),
        ("model: m\nlora: 5", "lora is 5"),
    ):
        file.write_text(text)
        with pytest.raises(InputError, match=says) as error:
            read_config(file)
        assert str(error.value).startswith(str(file)), error.value
    values = yaml.safe_load(STAGE2.read_text()) | {"model": "configs/models/absent.yaml"}
    file.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match=r"absent\.yaml does not exist; such files are in configs/models/"):
        read_config(file).model_config()


def test_a_base_is_put_under_a_file(tmp_path):
    """Sections are merged field by field, tables of patterns replaced, one level deep."""
    (tmp_path / "base.yaml").write_text(
        "model: m\ntrainable: {a: true, b: false}\ntraining: {steps: 3, batch_size: 4}\n"
        "optimizer: {learning_rate: 1.0e-3, lr_factors: {a: 2}}"
    )
    file = tmp_path / "x.yaml"
    file.write_text("base: base.yaml\ntrainable: {c: true}\ntraining: {steps: 5}\noptimizer: {lr_factors: {c: 3}}")
    config = read_config(file, ["training.keep=3"])
    assert (config.model, config.trainable) == ("m", {"c": True})
    assert (config.training.steps, config.training.batch_size, config.training.keep) == (5, 4, 3)
    assert (config.optimizer.learning_rate, config.optimizer.lr_factors) == (1e-3, {"c": 3})
    for name, text, says in (
        ("y", "base: x.yaml", r"y\.yaml: its base, x\.yaml, has a base itself \(base\.yaml\)"),
        ("y", "base: absent.yaml", r"absent\.yaml does not exist"),
        ("y", "base: 5", "base is 5; give the name of a file beside it"),
    ):
        (tmp_path / f"{name}.yaml").write_text(text)
        with pytest.raises(ConfigError, match=says):
            read_config(tmp_path / f"{name}.yaml")


def test_tables_of_patterns_cover_exactly():
    paths = ["a.x.bias", "a.y.kernel", "b"]
    assert matches(paths, {"a.*": 1, "b": 2}, "T") == {"a.x.bias": 1, "a.y.kernel": 1, "b": 2}
    assert trainable_paths(paths, {"a.*": True, "b": False}) == {"a.x.bias", "a.y.kernel"}
    for table, says in (
        ({"a.*": True}, "b matches no pattern"),
        ({"a.*": True, "*.kernel": False, "b": True}, r"a\.y\.kernel matches a\.\* and \*\.kernel"),
        ({"a.*": True, "b": False, "c.*": True}, r"'c\.\*' matches no parameter"),
        ({"a.*": False, "b": False}, "no parameter trains"),
        ({"a.*": 1, "b": False}, r"'a\.\*' has 1; use true or false"),
    ):
        with pytest.raises(ConfigError, match=says):
            trainable_paths(paths, table)


@pytest.mark.parametrize("option", [("--topology", "v5e:8x8"), ("--num-slices", "2"), ("--quick",), ("--features",)])
def test_what_a_compile_is_asked_starts_no_run(option, capsys):
    assert train.main(["--config", str(STAGE2), *option]) == 2
    assert "go with --compile-only" in capsys.readouterr().err
