"""`train.py` as users run it: consecutive stages, runs interrupted, killed and damaged, several processes.

Each run that computes has its own process; all use the tiny model and share compiled programs on disk.
"""

import json
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from training_data import (
    ROOT,
    command,
    commands_together,
    environment,
    losses,
    run,
    start,
    write_data,
    write_tokenizers,
)

import train
from llamavid_jax.checkpoints.weights import load_weights
from llamavid_jax.config.schema import LLaMAVIDLlavaConfig
from llamavid_jax.training import loop
from llamavid_jax.training.goodput import tally
from llamavid_jax.training.log import JsonLines
from llamavid_jax.training.pace import HUNG

STAGE1, STAGE2, STAGE3 = (f"tiny/{name}.yaml" for name in ("stage1_align", "stage2_instruct", "stage3_long_video"))
SIX = ("training.steps=6", "training.save_every=3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    write_data(root / "data")
    write_tokenizers(root / "tokenizers")
    return root


@pytest.fixture(scope="module")
def env(folder) -> dict[str, str]:
    return environment(1)


def six_steps(folder: Path, output: Path, *extra: str) -> list[str]:
    return command(STAGE2, folder / "data" / "data.json", folder / "tokenizers", output, *SIX, *extra)


@pytest.fixture(scope="module")
def whole(folder, env) -> Path:
    """Six training steps without interruption."""
    run(six_steps(folder, folder / "whole"), env)
    return folder / "whole"


def weights(output: Path) -> dict[str, np.ndarray]:
    model = output / "model"
    params = load_weights(model, LLaMAVIDLlavaConfig.from_pretrained(model), "float32")
    return {path: np.asarray(value) for path, value in params.items()}


def assert_same(output: Path, expected: Path) -> None:
    """Asserts that all weights and losses are equal bit for bit."""
    found, wanted = weights(output), weights(expected)
    for path, value in wanted.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)
    assert losses(output) == losses(expected)


def test_a_run_leaves_a_model_that_answers(whole, env):
    assert len(losses(whole)) == 6 and losses(whole)[-1] < losses(whole)[0]
    assert {"config.yaml", "checkpoints", "metrics.jsonl", "tensorboard", "model", "adapter"} <= {
        p.name for p in whole.iterdir()
    }
    from llamavid_jax import LLaMAVIDLlavaForConditionalGeneration, LLaMAVIDLlavaProcessor

    model = LLaMAVIDLlavaForConditionalGeneration.from_pretrained(whole / "model", dtype="float32")
    processor = LLaMAVIDLlavaProcessor.from_pretrained(whole / "model")
    question = [{"role": "user", "content": [{"type": "text", "text": "what is the man doing?"}]}]
    assert model.generate(**processor.chat(question), max_new_tokens=4).texts


def test_faults_change_nothing(folder, env, whole):
    """A full disk, a hang and kill -9 at or after the save of step 3, each in its own process, then a run to the end.

    The last run resumes from a newer copy on the local disk.
    """
    output, copies = folder / "faults", (f"training.local_copies={folder / 'local'}", "training.local_every=1")

    def struck(fault: str, code: int, *extra: str) -> str:
        return run([*six_steps(folder, output, "training.hang_after=2", *extra), "--simulate-fault", fault], env, code)

    full = struck("disk@4", code=2)
    assert "cannot be written" in full and "free space there" in full  # the save of step 3, or that of step 6
    hung = struck("hang@5", code=HUNG)
    assert "no step in" in hung and f"ends with code {HUNG}" in hung and "faults.py" in hung and "in strike" in hung
    assert "step 3 of 6" in struck("kill@6", -signal.SIGKILL, *copies)
    assert re.search("step [45] of 6", run(six_steps(folder, output, *copies), env))  # step 5's copy may be incomplete
    assert_same(output, whole)
    totals = tally(JsonLines(output / "goodput.jsonl", pytest.fail).rows())
    assert all(totals[part] > 0 for part in ("steps", "compile", "save", "restore", "start", "lost", "idle"))


def test_a_step_that_is_not_finite_is_skipped(folder, env, whole):
    output = folder / "nan"
    run([*six_steps(folder, output), "--simulate-fault", "nan@2"], env)
    (bad,) = [json.loads(line) for line in (output / "not_finite.jsonl").read_text().splitlines()]
    assert bad["step"] == 2 and losses(output)[0] == losses(whole)[0] and np.isfinite(losses(output)[2:]).all()


def test_preempted_and_resumed(folder, env, whole):
    """SIGTERM saves and ends with code 143; the same command resumes."""
    output = folder / "preempted"
    process = start(six_steps(folder, output, "training.save_every=100"), env)
    until(lambda: len(metrics_lines(output)) >= 1, process)
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=1200)
    assert process.returncode == 143, text
    assert "the same command goes on" in text and not (output / "model").exists()
    assert "resuming" in run(six_steps(folder, output, "training.save_every=100"), env)
    assert_same(output, whole)


def test_a_damaged_newest_checkpoint_falls_back(folder, env, whole):
    output = folder / "damaged"
    shutil.copytree(whole, output)
    shutil.rmtree(output / "model")
    for file in (output / "checkpoints" / "6" / "arrays").rglob("*"):
        if file.is_file() and file.stat().st_size > 100:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    text = run(six_steps(folder, output), env)
    assert "is damaged" in text and "resuming" in text and "step 3" in text
    assert_same(output, whole)


def test_other_settings_in_the_same_output_are_refused(folder, env, whole):
    text = run(six_steps(folder, whole, "optimizer.learning_rate=0.5"), env, code=2)
    assert "optimizer.learning_rate is 0.5" in text and "another output folder" in text


def test_stages_follow_one_another(folder, env, whole):
    """Stage 2 loads stage 1's adapter over the same base; stage 3 starts from stage 2's model."""
    data, tokenizers = folder / "data" / "data.json", folder / "tokenizers"
    captions = folder / "data" / "captions.json"
    records = [r for r in json.loads(data.read_text()) if "image" in r or "video" in r]
    captions.write_text(json.dumps(records))
    base = f"start.model={whole / 'model'}"
    short = ("training.steps=2", base, "model=", "data.tokenizer=")
    run(command(STAGE1, captions, tokenizers, folder / "one", *short), env)
    before, one = weights(whole), weights(folder / "one")
    changed = {path for path in before if not np.array_equal(before[path], one[path])}
    assert changed and all(path.startswith("visual_tokens.") for path in changed)
    two = folder / "two"
    run(
        command(
            STAGE2,
            data,
            tokenizers,
            two,
            *short,
            f"start.adapter={folder / 'one' / 'adapter'}",
            "optimizer.learning_rate=1e-30",
        ),
        env,
    )
    for path, value in weights(two).items():
        np.testing.assert_allclose(value, one[path], rtol=1e-6, atol=1e-9, err_msg=path)
    run(
        command(
            STAGE3,
            data,
            tokenizers,
            folder / "three",
            "training.steps=2",
            f"start.model={two / 'model'}",
            "model=",
            "data.tokenizer=",
        ),
        env,
    )
    before, three = weights(two), weights(folder / "three")
    changed = {path for path in before if not np.array_equal(before[path], three[path])}
    assert changed and all(path.startswith(("llama.", "visual_tokens.projector.")) for path in changed)


@pytest.mark.parametrize("base", ["float", "nf4"])
def test_lora_trains_and_saves(base, folder, env, whole):
    """Low-rank updates over float or 4-bit kernels, merged into the float kernels at the end."""
    data, tokenizers = folder / "data" / "data.json", folder / "tokenizers"
    output = folder / f"lora-{base}"
    run(
        command(
            "tiny/lora.yaml",
            data,
            tokenizers,
            output,
            "training.steps=3",
            f"lora.base={base}",
            f"start.model={whole / 'model'}",
            "model=",
            "data.tokenizer=",
        ),
        env,
    )
    adapter = json.loads((output / "adapter" / "adapter_config.json").read_text())
    assert adapter["r"] == 4
    before, after = weights(whole), weights(output)
    assert before.keys() == after.keys()  # merged
    changed = {path for path in before if not np.array_equal(before[path], after[path])}
    assert "llama.layers.attn.q.kernel" in changed and "llama.embed.embedding" not in changed


def test_broken_samples_are_named_and_too_many_stop_the_run(folder, env):
    records = json.loads((folder / "data" / "data.json").read_text())
    records[0]["image"] = "absent.png"
    broken = folder / "data" / "broken.json"
    broken.write_text(json.dumps(records))
    arguments = command(STAGE2, broken, folder / "tokenizers", folder / "broken", "training.steps=2")
    text = run([*arguments, "data.max_broken=0.01"], env, code=2)
    assert "sample 0" in text and "absent.png" in text and "data.max_broken" in text
    run([*arguments, "data.max_broken=0.2", "training.steps=4"], env)
    skipped = [json.loads(line) for line in (folder / "broken" / "skipped.jsonl").read_text().splitlines()]
    assert [row["id"] for row in skipped] == ["sample 0"]  # recorded once, however often it is read


def test_wrong_paths_are_told_before_the_weights_are_read(folder, capsys, monkeypatch):
    """Runs in this process, as nothing is computed."""

    def refused(arguments: list[str]) -> str:
        assert train.main([*arguments[2:], "mesh=fsdp=1"]) == 2
        return capsys.readouterr().err

    monkeypatch.chdir(ROOT)
    data, tokenizers = folder / "data" / "data.json", folder / "tokenizers"
    absent = command(STAGE2, folder / "absent.json", tokenizers, folder / "paths")
    assert "data.path: " in refused(absent)
    held_out = command(STAGE2, data, tokenizers, folder / "paths", f"data.evaluation_path={folder / 'absent.json'}")
    assert "data.evaluation_path: " in refused(held_out)
    adapter = command(STAGE2, data, tokenizers, folder / "paths", f"start.adapter={folder / 'absent'}")
    assert "start.adapter is " in refused(adapter)
    assert not (folder / "paths").exists()
    monkeypatch.setattr(loop, "load_start", lambda *_: pytest.fail("the model is loaded"))
    for output in (data / "run", "/proc/run", data, folder / "latin\udce9"):
        line = refused(command(STAGE2, data, tokenizers, output))
        assert f"train.py: {output}".replace("\udce9", r"\udce9") in line.replace("output is ", "")
    assert "configs is a folder; give a file" in refused(["", "", "--config", "configs"])


def test_held_out_set_and_profile(folder, env):
    output, data = folder / "evaluated", folder / "data" / "data.json"
    arguments = command(STAGE2, data, folder / "tokenizers", output, "training.steps=6", "training.evaluate_every=3")
    run([*arguments, f"data.evaluation_path={data}", "--profile"], env)
    lines = [line for line in metrics_lines(output) if "evaluation_loss" in line]
    assert [line["step"] for line in lines] == [3, 6] and lines[1]["evaluation_loss"] < lines[0]["evaluation_loss"]
    assert list((output / "profile").rglob("*.xplane.pb"))


@pytest.mark.sharding
def test_two_processes_then_one_then_two(folder):
    """For some steps one process with two devices and more micro-batches replaces two with eight devices.

    The losses stay those of a run that always had two processes, which are connected over loopback.
    """
    together, elastic = folder / "together", folder / "elastic"
    settings = ("training.batch_size=8", "training.device_rows=1", "training.save_every=2", "training.keep=3")

    def both(output: Path) -> str:
        said = commands_together(six_steps(folder, output, *settings, "mesh=data=2,fsdp=2,tensor=2"), devices=4)
        return "".join(said)

    both(together)
    shutil.copytree(together, elastic)
    shutil.rmtree(elastic / "model")
    for step in (4, 6):
        shutil.rmtree(elastic / "checkpoints" / str(step))
    fewer = six_steps(folder, elastic, *settings, "training.save_every=1", "--simulate-fault", "kill@6")
    assert "at step 2 of 6" in run(fewer, environment(2), -signal.SIGKILL)
    assert re.search("at step [45] of 6", both(elastic))  # a save waits for the previous one
    # Summation in another order, whose difference Adam's first steps enlarge.
    np.testing.assert_allclose(losses(elastic), losses(together), rtol=1e-5)
    # If a batch were left out or seen twice, they would be those of another step.
    assert (np.abs(np.diff(losses(together))) > 1e-3).all()


def metrics_lines(output: Path) -> list[dict]:
    path = output / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def until(condition, process) -> None:
    """Waits until `condition` holds, while the process runs."""
    for _ in range(6000):
        if condition():
            return
        assert process.poll() is None, process.communicate()[0][-4000:]
        time.sleep(0.05)
    raise AssertionError("it took too long")
