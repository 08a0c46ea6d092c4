"""Compiles a run's train step for a TPU slice, without a TPU, weights or data: what it needs, and whether it fits.

    python -m llamavid_jax.precompile.compile_check --config configs/stage2_instruct.yaml --topology v5e:8x8 \\
        --mesh fsdp=32,sequence=2 training.micro_batches=1

It prints a row and a line of JSON: peak memory beside the chip's, bytes that collectives move, FLOPs, and a roofline
estimate of the step's time.  The step is the one that train.py runs, on rows of the config's largest bucket; with
--features, rows hold ready features of frames.  The program is compiled by `libtpu`, as on a TPU.
"""

import argparse
import sys
from typing import TYPE_CHECKING

from llamavid_jax.errors import InputError, Parser, command

if TYPE_CHECKING:  # JAX takes seconds to import, which arguments and --help do not need
    from llamavid_jax.training.config import TrainConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that train.py and this command share."""
    parser.add_argument("--topology", metavar="NAME", help="TPU generation and chips, such as v5e:8x8")
    parser.add_argument("--num-slices", type=int, default=1, metavar="N", help="slices; the data axis spans them")
    parser.add_argument("--quick", action="store_true", help="stop before machine code: same memory figures, sooner")
    parser.add_argument("--features", action="store_true", help="rows hold ready features of frames, as in stage 3")


def check(config: "TrainConfig", options: argparse.Namespace, mesh: str = "") -> int:
    """Compiles in a process of its own, prints the report and returns the exit code.  Raises InputErrors."""
    from llamavid_jax.precompile.plan import plan
    from llamavid_jax.precompile.report import show
    from llamavid_jax.precompile.topology import in_own_process
    from llamavid_jax.precompile.train import check_training

    if not options.topology:
        raise InputError("there is no slice to compile for; give --topology, such as v5e:8x8")
    if options.num_slices < 1:
        raise InputError(f"--num-slices is {options.num_slices}; give how many slices run together, 1 or more")
    if getattr(options, "plan", False):
        if mesh:
            raise InputError(f"--plan tries all meshes, and --mesh says {mesh}; give one of them")
        reports = plan(config, options.topology, options.num_slices, options.features, options.config)
        return show(reports) if any(report.fits for report in reports) else 1
    arguments = config, options.topology, mesh, options.num_slices, options.features, options.config, not options.quick
    return show([in_own_process(check_training, *arguments)])


@command("compile_check")
def main(arguments: list[str] | None = None) -> int:
    parser = Parser(description="Compiles a run's train step for a TPU slice.", allow_abbrev=False)
    parser.add_argument("--config", required=True, metavar="FILE", help="a recipe, such as one of configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override the file's fields")
    parser.add_argument("--mesh", default="", metavar="AXIS=N,...", help="overrides the file's mesh")
    parser.add_argument("--plan", action="store_true", help="try meshes and remat for the slice, the best first")
    add_arguments(parser)
    options = parser.parse_intermixed_args(arguments)
    from llamavid_jax.training.config import read_config

    return check(read_config(options.config, options.overrides), options, options.mesh)


if __name__ == "__main__":
    sys.exit(main())
