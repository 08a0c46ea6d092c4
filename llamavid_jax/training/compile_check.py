"""Compiles a run's train step for a TPU slice, without TPU, weights or data: what it needs, and whether it fits.

    python -m llamavid_jax.training.compile_check --config configs/stage2_instruct.yaml --topology v5e:8x8 \\
        --mesh fsdp=64 training.micro_batches=2

A row and a line of JSON: peak memory beside the chip's, bytes that collectives move, FLOPs, and a roofline's estimate
of the step's time.  The step is the one that train.py runs, on rows of the config's largest bucket; --features says
that rows hold ready features of frames.  The program is compiled by `libtpu`, as on a TPU.
"""

import argparse
import sys

from llamavid_jax.aot.report import COLUMNS, Report
from llamavid_jax.aot.topology import in_own_process
from llamavid_jax.aot.train import check_training
from llamavid_jax.errors import InputError
from llamavid_jax.training.config import read_config


def print_report(report: Report) -> None:
    print("\n".join(f"{name:34} {cell}" for name, cell in zip(COLUMNS, report.row(), strict=True)))
    for path, size in report.replicated_mib.items():
        print(f"{'whole on every device':34} {path}: {size:.1f} MiB")
    print(report.json(), flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compiles a run's train step for a TPU slice.", allow_abbrev=False)
    parser.add_argument("--config", required=True, metavar="FILE", help="one of configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="put over the file")
    parser.add_argument("--topology", required=True, metavar="NAME", help="such as v5e:8x8: generation and chips")
    parser.add_argument("--mesh", default="", metavar="AXIS=N,...", help="put over the file's")
    parser.add_argument("--num-slices", type=int, default=1, metavar="N", help="slices; their axis is data")
    parser.add_argument("--features", action="store_true", help="rows hold ready features of frames, as in stage 3")
    options = parser.parse_intermixed_args(arguments)
    try:
        config = read_config(options.config, options.overrides)
        report = in_own_process(
            check_training, config, options.topology, options.mesh, options.num_slices, options.features, options.config
        )
        print_report(report)
        if not report.fits:
            there = f"{report.peak_gib:.1f} GiB needed, {report.hbm_gib:g} GiB there"
            print(f"compile_check: {there}: {report.remedy}", file=sys.stderr)
        return 0 if report.fits else 1
    except InputError as error:
        print(f"compile_check: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
