"""Programs compiled ahead of time: they equal the run's step; their shortest possible time; the reports.

Collectives: test_collectives.py.  test_tpu_compile.py compiles for TPUs, which needs libtpu.
"""

import dataclasses
import json
import os
import pickle
import signal
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from training_cases import CONFIG, ROOT, batch, example
from training_data import write_tokenizers

from llamavid_jax.config.schema import LLaMAVIDLlavaConfig
from llamavid_jax.parallel.chips import CHIPS, Chip, peak_flops
from llamavid_jax.parallel.mesh import ShardingError, make_mesh
from llamavid_jax.precompile import infer, train
from llamavid_jax.precompile import plan as plans
from llamavid_jax.precompile import report as reports
from llamavid_jax.precompile.buffers import assign_buffers, read
from llamavid_jax.precompile.plan import rank
from llamavid_jax.precompile.roofline import estimate
from llamavid_jax.precompile.topology import (
    CompileError,
    OutOfMemoryError,
    chip_of,
    compile_lowered,
    in_own_process,
    slice_devices,
)
from llamavid_jax.precompile.train import abstract_batch, check_replicated, largest, remedy
from llamavid_jax.shapes import Batch, RowShape
from llamavid_jax.training.config import read_config
from llamavid_jax.training.layout import batch_sharding, initial_state, lay_out, state_layout
from llamavid_jax.training.optimizer import lr_factors
from llamavid_jax.training.start import load_start
from llamavid_jax.training.step import make_train_step

TINY = ROOT.parent / "configs" / "tiny" / "stage2_instruct.yaml"
SHAPE = RowShape(frames=2, pairs=2, questions=1, tokens=64)
BUCKET = "data.buckets=[{frames: 2, pairs: 2, questions: 1, tokens: 64}]"


def tiny(*overrides: str):
    return read_config(TINY, [BUCKET, "data.question_tokens=16", "training.batch_size=8", *overrides])


@pytest.mark.sharding
def test_the_checked_step_is_the_step_of_the_run(tmp_path):
    """Lowered from shapes alone and from a run's arrays, the programs have the same text, shardings included."""
    config, mesh = tiny(f"data.tokenizer={write_tokenizers(tmp_path)}"), make_mesh(fsdp=4, tensor=2)
    with jax.set_mesh(mesh):
        start = load_start(config, mesh)
        factors = lr_factors(start.trained, config.optimizer)
        data = batch([[example(n, frames=2, length=20)] for n in range(8)], SHAPE)
        real = make_train_step(start.structure, config.optimizer, config.training, factors, 20).lower(
            initial_state(config.optimizer, start.trained, mesh),
            start.frozen,
            Batch(*(jax.device_put(x, batch_sharding(mesh, field)) for field, x in data._asdict().items())),
        )
        layout = lay_out(config, mesh)
        checked = make_train_step(layout.structure, config.optimizer, config.training, factors, 20).lower(
            state_layout(config.optimizer, layout.trained, mesh),
            layout.frozen,
            abstract_batch(config, layout.config, SHAPE, mesh, features=False),
        )
    assert real.as_text() == checked.as_text()


def test_ready_features_and_rows_of_one_sample():
    config, mesh = tiny("data.packing=false", "training.dtype=bfloat16"), make_mesh(fsdp=8)
    data = abstract_batch(config, CONFIG, SHAPE, mesh, features=True)
    vision = CONFIG.vision_tower_config
    assert data.frames.shape == (8, 2, vision.num_patches, vision.hidden_size) and data.frames.dtype == jnp.bfloat16
    assert data.segment_ids is None and data.positions is None


def test_the_largest_bucket():
    shapes = [RowShape(320, 320, 8, 2048), RowShape(1, 32, 32, 2048), RowShape(400, 400, 1, 512)]
    assert largest(shapes) == shapes[0]


def test_roofline_by_hand():
    """100 TFLOP/s, 1 TB/s of memory, 100 GB/s to neighbours, 10 GB/s to other slices."""
    chip = Chip("?", 100, 16, 1000, 100, 10)
    best = estimate(chip, flops=50e12, hbm_bytes=200e9, ici_bytes=20e9)  # 0.5 s, 0.2 s, 0.2 s
    assert (best.seconds, best.bound, best.utilisation) == (0.5, "compute", 1.0)
    best = estimate(chip, flops=50e12, hbm_bytes=200e9, ici_bytes=200e9)  # 2 s
    assert (best.seconds, best.bound, best.utilisation) == (2.0, "interconnect", 0.25)
    best = estimate(chip, flops=50e12, hbm_bytes=200e9, ici_bytes=20e9, dcn_bytes=10e9)  # 1 s
    assert (best.seconds, best.bound, best.utilisation) == (1.0, "network between slices", 0.5)
    best = estimate(chip, flops=50e12, hbm_bytes=4000e9, ici_bytes=0)
    assert (best.seconds, best.bound, best.utilisation) == (4.0, "memory", 0.125)
    best = estimate(chip, flops=50e12, recomputed=50e12, hbm_bytes=0, ici_bytes=0)  # 1 s, of which half counts
    assert (best.seconds, best.bound, best.utilisation) == (1.0, "compute", 0.5)


def test_a_7b_step_by_hand():
    """6 · 6.7e9 parameters · 2048 · 16 tokens on 16 v5e chips at 197 TFLOP/s: 0.418 s."""
    best = estimate(CHIPS["v5e"], flops=6 * 6.7e9 * 2048, hbm_bytes=12e9, ici_bytes=3 * 13.4e9)
    assert best.seconds == pytest.approx(0.41793, rel=1e-4) and best.bound == "compute"


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_the_peak_of_a_run_on_a_chip_is_that_of_the_table(chip):
    assert peak_flops(chip.kind) == chip.tflops * 1e12


def test_what_is_whole_everywhere():
    config = tiny()
    with pytest.raises(ShardingError, match=r"are replicated, .* first; at most 2% may be"):
        check_replicated(lay_out(config, make_mesh(fsdp=7)), make_mesh(fsdp=7))
    found = check_replicated(lay_out(config, make_mesh(fsdp=4)), make_mesh(fsdp=4))
    assert all(size < 0.1 for size in found.values())
    assert len(check_replicated(lay_out(config, make_mesh(data=8)), make_mesh(data=8))) == 5  # as intended


@pytest.mark.parametrize(
    ("name", "such_as"),
    [
        ("v9:2x2", "v5p:2x2x4"),
        ("v5litepod-64", "v5p:2x2x4"),
        ("v5e", "v5e:4x4"),
        ("v5e:", "v5e:4x4"),
        ("v5e:axb", "v5e:4x4"),
        ("v5e:2x2x2", "v5e:4x4"),
        ("v5e:0x2", "v5e:4x4"),
        ("v5p:4x4", "v5p:2x2x4"),
    ],
)
def test_an_unknown_topology(name, such_as):
    with pytest.raises(CompileError, match=f"'{name}' is no topology; write GENERATION:CHIPS .* such as {such_as}"):
        chip_of(name)


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (RuntimeError("JAX TPU support not installed"), "libtpu is not installed .* try pip install 'jax\\[tpu\\]=="),
        (jax.errors.JaxRuntimeError("INVALID_ARGUMENT: not divisible"), "'v5e:3x7' is no slice .* not divisible"),
    ],
)
def test_no_libtpu_and_no_such_slice(monkeypatch, raised, said):
    def fail(**_):
        raise raised

    monkeypatch.setattr(topologies, "get_topology_desc", fail)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    with pytest.raises(CompileError, match=said):
        slice_devices("v5e:3x7")


class Lowered(jax.stages.Lowered):
    """A program whose compilation fails with `message`."""

    def __init__(self, message: str):
        self.message = message

    def compile(self):
        raise jax.errors.JaxRuntimeError(self.message)


@pytest.mark.parametrize(
    "message",
    [
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 65.20G of 15.75G hbm. Exceeded",
        "RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (65.20G) exceeds available HBM (15.75G).",
    ],
)
def test_a_program_that_does_not_fit(monkeypatch, message):
    monkeypatch.setattr(reports, "versions", dict)  # without libtpu
    with pytest.raises(OutOfMemoryError, match=r"65\.2 GiB needed, 15\.8 GiB available"):
        compile_lowered(Lowered(message))
    report = reports.compile_report(
        Lowered(message),
        CHIPS["v5e"],
        1,
        10**15,
        "try remat=full",
        program="p",
        topology="v5e:8x8",
        devices=64,
        mesh="m",
    )
    assert not report.fits and report.peak_gib == 65.2 and report.row()[4] == "no: try remat=full"
    assert json.loads(report.json())["fits"] is False


VARIANTS = ("bert", "clip", "short_qformer", "start_end")
STAGES = [f"{stage}_{kind}" for kind in VARIANTS for stage in ("stage1_align", "stage2_instruct")]


def lowered_alone(lowered, *arguments, **known):
    """Reports the program as too large instead of compiling it."""
    message = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 65.20G of 15.75G hbm. Exceeded"
    return reports.compile_report(Lowered(message), *arguments, **known)


@pytest.fixture
def uncompiled(monkeypatch):
    monkeypatch.chdir(ROOT.parent)
    monkeypatch.setattr(reports, "versions", dict)
    for module, axis in ((train, "fsdp"), (infer, "tensor")):
        monkeypatch.setattr(module, "slice_mesh", lambda *_, axis=axis, **__: make_mesh(**{axis: 8}))
        monkeypatch.setattr(module, "compile_report", lowered_alone)


@pytest.mark.parametrize("recipe", STAGES)
def test_the_step_of_every_variant_lowers(recipe, uncompiled):
    """At full size, with rows of one sample and with packed rows."""
    assert train.check_training(read_config(f"configs/{recipe}.yaml"), "v5e:2x4").flops > 1e15


@pytest.mark.parametrize("kind", VARIANTS)
def test_the_programs_of_every_variant_lower(kind, uncompiled):
    model = LLaMAVIDLlavaConfig.from_yaml(f"configs/models/llamavid_7b_224_video_{kind}.yaml")
    encode, compress, *_ = infer.check_inference(model, "v5e:2x4", "", 300, 32)
    assert encode.flops > compress.flops > 0


def test_a_program_that_the_compiler_refuses():
    with pytest.raises(CompileError, match="the TPU compiler refuses the program: UNIMPLEMENTED: a thing"):
        compile_lowered(Lowered("UNIMPLEMENTED: a\nthing"))


@pytest.mark.parametrize(
    ("ending", "message"),
    [
        (signal.SIGKILL, "ended by the system, most likely for want of memory: this machine has"),
        (signal.SIGSEGV, "the compiler crashed .exit code -11; its last words are above.; --quick stops before"),
    ],
)
def test_a_compile_that_does_not_answer(ending, message):
    with pytest.raises(CompileError, match=message):
        in_own_process(signal.raise_signal, ending)


def test_errors_cross_the_process_as_they_are():
    with pytest.raises(CompileError, match="'v9:2x2' is no topology"):
        in_own_process(chip_of, "v9:2x2")
    error = pickle.loads(pickle.dumps(OutOfMemoryError(65.2, 16.0)))
    assert (error.needed, error.there) == (65.2, 16.0)


def test_remedies():
    config, mesh = tiny("training.remat=none"), make_mesh(fsdp=2, tensor=2, data=2)
    assert (
        remedy(config, mesh, SHAPE) == "try training.remat=full or training.micro_batches=2 or more of the mesh on fsdp"
    )
    long = dataclasses.replace(SHAPE, tokens=65536)
    assert remedy(tiny("training.remat=full"), make_mesh(fsdp=8), long) == "try sequence=2"
    assert remedy(tiny("training.remat=full"), make_mesh(fsdp=8), SHAPE).startswith("try a larger slice")


def test_plan_ranks_what_can_fit():
    """7B, 16,384 tokens, 64 chips of 16 GiB: no plan that fits keeps all activations."""
    long = ["training.batch_size=128", "data.buckets=[{frames: 0, pairs: 0, questions: 0, tokens: 16384}]"]
    config = read_config(ROOT.parent / "configs" / "stage2_instruct.yaml", long)
    layout = lay_out(config, make_mesh())
    tries = rank(config, layout, "v5e:8x8", devices=64)
    fitting = [one for one in tries if one.gib <= 16]
    assert tries[: len(fitting)] == fitting and [one.seconds for one in fitting] == sorted(
        one.seconds for one in fitting
    )
    assert all(one.mesh["fsdp"] * one.mesh["tensor"] * one.mesh["sequence"] == 64 for one in tries)
    whole = next(one for one in tries if one.text == "fsdp=64" and one.remat == "full")
    assert whole.micro_batches == 1  # two rows a chip: 32 layers · 2 · 16,384 · 4096 16-bit values are 8 GiB
    assert whole.gib == pytest.approx(16 * 6.9e9 / 64 / 2**30 + 8, rel=0.05)
    assert not any(one.remat == "none" and one.text == "fsdp=64" for one in fitting)


def test_plan_says_what_is_missing(monkeypatch):
    """13B on one chip."""
    config = read_config(ROOT.parent / "configs" / "stage2_instruct_13b.yaml")
    monkeypatch.setattr(plans, "in_own_process", lambda *_: (lay_out(config, make_mesh()), 1))
    with pytest.raises(
        CompileError, match=r"^\d+\.\d GiB needed at least, 16 GiB available, with .* on v5e:1x1: try a larger"
    ):
        plans.plan(config, "v5e:1x1")


ASSIGNMENT = """BufferAssignment:
allocation 0: size 512, thread-local:
 value: <2 add @0> (size=512,offset=0): s32[]{:T(128)}
allocation 1: size 1000, parameter 7, shape |f32[10,25]| at ShapeIndex {}, maybe-live-out:
allocation 2: size 300, parameter 1, shape |f32[75]| at ShapeIndex {}:
allocation 3: size 40, maybe-live-out:
allocation 4: size 6000, preallocated-temp:
allocation 5: size 70000, color 1, preallocated-temp:
"""


def test_sums_over_buffers():
    """An output that reuses an argument's memory counts once; vector memory does not count."""
    found = read(ASSIGNMENT, "HloModule")
    assert (found.arguments, found.temporaries, found.output) == (1300, 6000, 1040)
    assert found.peak == 1300 + 6000 + 40


PROGRAM = """HloModule jit_step, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %add = f32[] add(%a, %b)
}

ENTRY %main (x: f32[75]) -> f32[] {
  ROOT %all-reduce = f32[] all-reduce(%x), to_apply=%sum, backend_config={"lists":[]}
}

"""


class Writes(jax.stages.Lowered):
    """Writes as a compiler on a busy machine: a few letters at a time, long apart by their modification times."""

    def __init__(self, program: str, ends: bool):
        self.program, self.ends = program, ends

    def compile(self, compiler_options: dict) -> None:
        folder = Path(compiler_options["xla_dump_to"])
        (folder / "module_0000.jit_f.after_optimizations-buffer-assignment.txt").write_text(ASSIGNMENT)
        (folder / "module_0000.jit_f.after_optimizations_before_buffer_assignment.txt").write_text(PROGRAM)
        file = folder / "module_0000.jit_f.after_optimizations_after_buffer_assignment.txt"
        for end in range(0, len(self.program) + 1, 20):
            with file.open("a") as stream:
                stream.write(self.program[end : end + 20])
            os.utime(file, (0, 0))
            time.sleep(0.05)
        while not self.ends:  # the compiler is writing machine code
            time.sleep(1)


def test_a_program_that_is_written_slowly():
    """It is read once its last computation is complete, without waiting for the machine code."""
    found = assign_buffers(Writes(PROGRAM, ends=False))
    assert (found.text, found.arguments) == (PROGRAM, 1300)
    assert assign_buffers(Writes(PROGRAM, ends=True)).text == PROGRAM
    with pytest.raises(CompileError, match=r"could not write what it found to .*; free space there"):
        assign_buffers(Writes(PROGRAM[:-5], ends=True))


def test_a_compile_that_takes_too_long():
    with pytest.raises(CompileError, match="the compiler was not done after 1 s; give it more"):
        in_own_process(time.sleep, 60, limit=1.0)
