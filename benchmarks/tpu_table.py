"""Writes the table of docs/tpu.md: every recipe, compiled for the TPU slices that it is meant for.

    python -m benchmarks.tpu_table docs/tpu.md

Each row is compiled in its own process, for --limit seconds at most, and written as a line of JSON to --kept: the same
command resumes where it stopped.  A row whose program is refused states the reason.  Only the text between the file's
two marks is replaced.
"""

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from llamavid_jax.config.schema import LLaMAVIDLlavaConfig
from llamavid_jax.errors import InputError, Parser, command
from llamavid_jax.files import write_files
from llamavid_jax.precompile.infer import check_inference
from llamavid_jax.precompile.report import COLUMNS, Report, versions
from llamavid_jax.precompile.topology import in_own_process
from llamavid_jax.precompile.train import check_training
from llamavid_jax.training.config import read_config

BEGIN, END = "<!-- compiled: begin -->", "<!-- compiled: end -->"
DAY = "data.buckets=[{frames: 130560, pairs: 130560, questions: 1, tokens: 262144}]"


class Step(NamedTuple):
    """A train step: the arguments of `precompile.compile_check`."""

    config: str
    topology: str
    mesh: str = ""  # empty: the config's, or all on fsdp
    overrides: tuple[str, ...] = ()
    features: bool = False
    num_slices: int = 1

    def compile(self, machine_code: bool) -> list[Report]:
        config = read_config(f"configs/{self.config}.yaml", self.overrides)
        options = self.mesh, self.num_slices, self.features, self.config, machine_code
        return [check_training(config, self.topology, *options)]


class Inference(NamedTuple):
    """Encoding, compression, prefill and decoding of one row of `tokens`."""

    model: str
    topology: str
    tokens: int
    mesh: str = ""  # empty: all on tensor
    weights: str = "none"  # quantised: int8, int4
    kv_cache: str = "float"

    def compile(self, machine_code: bool) -> list[Report]:
        config = LLaMAVIDLlavaConfig.from_yaml(f"configs/models/llamavid_{self.model}.yaml")
        config = dataclasses.replace(config, quantization=self.weights)
        options = self.mesh, self.tokens, 512, "bfloat16", self.model, self.kv_cache, machine_code
        return check_inference(config, self.topology, *options)


def _micro(number: int) -> tuple[str, ...]:
    return (f"training.micro_batches={number}",)


ROWS: list[Step | Inference] = [
    # stage 2, the original's global batch
    Step("stage2_instruct", "v5e:8x8", "fsdp=32,sequence=2", _micro(1)),
    Step("stage2_instruct", "v5p:2x2x4", "fsdp=16"),
    Step("stage2_instruct", "v6e:4x4", "fsdp=16"),
    Step("stage2_instruct", "v5e:4x8", "data=2,fsdp=16,sequence=2", _micro(1), num_slices=2),
    Step("stage2_instruct_13b", "v5e:8x8", "fsdp=8,sequence=8"),
    Step("stage2_instruct_13b", "v5p:2x2x4", "fsdp=8,sequence=2"),
    Step("stage2_instruct_13b", "v6e:4x4", "fsdp=8,sequence=2"),
    Step("stage2_instruct_image_336", "v5e:8x8", "fsdp=64"),
    Step("stage2_instruct_image_336", "v5p:2x2x4", "fsdp=16"),
    Step("stage2_instruct_image_336", "v6e:4x4", "fsdp=16", _micro(4)),
    Step("stage2_instruct_image_336_13b", "v5e:8x8", "fsdp=64", _micro(1)),
    Step("stage2_instruct_image_336_13b", "v5p:2x2x4", "fsdp=16"),
    Step("stage2_instruct_image_336_13b", "v6e:4x4", "fsdp=16"),
    # stage 3, precomputed features; and a whole day at one frame a second
    Step("stage3_long_video", "v5e:8x8", "fsdp=8,sequence=8", features=True),
    Step("stage3_long_video", "v5p:2x4x4", "fsdp=8,sequence=4", features=True),
    Step("stage3_long_video", "v6e:4x8", "fsdp=8,sequence=4", features=True),
    Step("stage3_long_video", "v5p:4x4x4", "fsdp=8,sequence=8", (DAY,), features=True),
    # stage 1
    *(
        Step(f"stage1_align{size}", slice_, f"fsdp={chips}", _micro(micro_batches))
        for size, micro_batches in (("", 4), ("_13b", 8))
        for slice_, chips in (("v5e:4x4", 16), ("v4:2x2x4", 16), ("v6e:2x4", 8))
    ),
    # inference: an hour of video on one chip, quantised too; three hours on a host
    *(Inference("7b_224_long_video", slice_, 7400, "", "int8", "int8") for slice_ in ("v5e:1x1", "v6e:1x1")),
    *(Inference("7b_224_long_video", slice_, 7400) for slice_ in ("v5e:1x1", "v6e:1x1", "v2:2x2")),
    *(
        Inference(f"{size}_224_long_video", slice_, 21800)
        for size in ("7b", "13b")
        for slice_ in ("v5e:2x2", "v5e:2x4")
    ),
    Inference("7b_224_video", "v5e:2x4", 3584, "data=8"),  # frames over the chips, each with a copy of the model
]


def compiled(row: Step | Inference, kept: Path, limit: float, machine_code: bool) -> dict[str, Any]:
    """The line of `row` in `kept` or from a new process: `{"row", "reports"}`, or `{"row", "reason"}`."""
    name, made = f"{type(row).__name__}{tuple(row)}", versions()
    lines = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    for line in reversed(lines):
        enough = not machine_code or all(report["machine_code"] for report in line.get("reports", ()))
        if line["row"] == name and line["versions"] == made and enough:
            return line
    print(name, file=sys.stderr, flush=True)
    found: dict[str, Any] = {"row": name, "versions": made}
    try:
        found["reports"] = [dataclasses.asdict(one) for one in in_own_process(row.compile, machine_code, limit=limit)]
    except InputError as error:
        found["reason"] = str(error)
    kept.parent.mkdir(parents=True, exist_ok=True)
    with kept.open("a") as file:
        file.write(json.dumps(found) + "\n")
    return found


def cells(row: Step | Inference, found: dict[str, Any]) -> Iterator[list[str]]:
    """The lines of the table for one row."""
    if reason := found.get("reason"):
        yield [row[0], row.topology, row.mesh, "", f"not known: {reason}", *[""] * (len(COLUMNS) - 5)]
    for values in found.get("reports", ()):
        yield Report(**values).row()


@command()
def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="tpu_table", description="Compiles every recipe and writes the table.", allow_abbrev=False)
    parser.add_argument("file", type=Path, help="docs/tpu.md")
    parser.add_argument("--kept", type=Path, default=Path("build/tpu_table.jsonl"), metavar="FILE")
    parser.add_argument("--limit", type=float, default=1800, metavar="SECONDS", help="for one row, at most")
    parser.add_argument("--machine-code", action="store_true", help="compile the whole programs, which takes hours")
    options = parser.parse_args(arguments)
    before, _, rest = options.file.read_text(encoding="utf-8").partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise InputError(f"{options.file} has no place for the table; write {BEGIN} and {END} into it")
    lines = [COLUMNS, ["---"] * len(COLUMNS)]
    for row in ROWS:
        lines += cells(row, compiled(row, options.kept, options.limit, options.machine_code))
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    made = ", ".join(f"{name} {number}" for name, number in versions().items())
    whole = f"{before}{BEGIN}\nWith {made}.\n\n{table}\n{END}{after}"
    write_files(options.file.parent, {options.file.name: whole.encode()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
