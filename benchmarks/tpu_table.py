"""Writes the table of docs/tpu.md: every recipe compiled for the slices that it is meant for.

    python -m benchmarks.tpu_table docs/tpu.md

It takes an hour or two.  A row whose program is refused holds the reason.  What stands around the table, between its
two marks, stays as it is.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from llamavid_jax.aot.infer import check_inference
from llamavid_jax.aot.report import COLUMNS, Report, versions
from llamavid_jax.aot.topology import in_own_process
from llamavid_jax.aot.train import check_training
from llamavid_jax.config import LLaMAVIDLlavaConfig
from llamavid_jax.data.tokenizer_files import write_files
from llamavid_jax.errors import InputError
from llamavid_jax.training.config import read_config

BEGIN, END = "<!-- compiled: begin -->", "<!-- compiled: end -->"
STAGE_1 = {"v5e:4x4": "", "v4:2x2x4": "", "v6e:2x4": ""}  # slice → mesh, empty: all on fsdp
STAGE_2 = {"v5e:8x8": "", "v5p:2x2x4": "", "v6e:4x4": ""}
LONG = {"v5e:8x8": "fsdp=8,sequence=8", "v5p:2x4x4": "fsdp=8,sequence=4", "v6e:4x8": "fsdp=8,sequence=4"}
TRAINING = [  # config, slices, overrides, slices of a job, ready features
    *((f"stage1_align{size}", STAGE_1, (), 1, False) for size in ("", "_13b")),
    *((f"stage2_instruct{size}", STAGE_2, ("training.micro_batches=2",), 1, False) for size in ("", "_13b")),
    *((f"stage2_instruct_image_336{size}", STAGE_2, (), 1, False) for size in ("", "_13b")),
    ("stage2_instruct", {"v5e:4x8": ""}, ("training.micro_batches=2",), 2, False),
    ("stage3_long_video", LONG, (), 1, True),
    (
        "stage3_long_video",
        {"v5p:4x4x4": "fsdp=8,sequence=8"},
        ("data.buckets=[{frames: 131000, pairs: 131000, questions: 1, tokens: 262144}]",),
        1,
        True,
    ),
]
INFERENCE = [  # model, slice, mesh, tokens
    *(("7b_224_video", slice_, "", 7400) for slice_ in ("v5e:1x1", "v6e:1x1", "v2:2x2")),
    *((f"{size}_224_long_video", slice_, "", 21800) for size in ("7b", "13b") for slice_ in ("v5e:2x2", "v5e:2x4")),
    ("7b_224_video", "v5e:2x4", "data=8", 7400),
]


def rows() -> Iterator[list[str]]:
    """The cells of each program, or the reason that there are none."""
    for name, slices, overrides, number, features in TRAINING:
        for topology, mesh in slices.items():
            config = read_config(f"configs/{name}.yaml", overrides)
            mesh = mesh or ("" if number > 1 else f"fsdp={_devices(topology)}")
            yield from _try(f"{name} on {topology}", check_training, config, topology, mesh, number, features, name)
    for name, topology, mesh, tokens in INFERENCE:
        config = LLaMAVIDLlavaConfig.from_yaml(f"configs/models/llamavid_{name}.yaml")
        yield from _try(f"{name} on {topology}", check_inference, config, topology, mesh, tokens, 512, "bfloat16", name)


def _devices(topology: str) -> int:
    count = 1
    for side in topology.split(":")[1].split("x"):
        count *= int(side)
    return count


def _try(name: str, check, *arguments) -> Iterator[list[str]]:
    print(name, file=sys.stderr, flush=True)
    try:
        found = in_own_process(check, *arguments)
        yield from (one.row() for one in ([found] if isinstance(found, Report) else found))
    except InputError as error:
        yield [name, *[""] * 3, f"no: {error}", *[""] * (len(COLUMNS) - 5)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compiles every recipe and writes the table.", allow_abbrev=False)
    parser.add_argument("file", type=Path, help="docs/tpu.md")
    path = parser.parse_args(arguments).file
    before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise InputError(f"{path} has no place for the table; write {BEGIN} and {END} into it")
    lines = [COLUMNS, ["---"] * len(COLUMNS), *rows()]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    made = ", ".join(f"{name} {number}" for name, number in versions().items())
    write_files(path.parent, {path.name: f"{before}{BEGIN}\nWith {made}.\n\n{table}\n{END}{after}".encode()})
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(f"tpu_table: {error}")
