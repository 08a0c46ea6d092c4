"""Trains LLaMA-VID, one stage at a time:

    python train.py --config configs/stage2_instruct.yaml data.path=chat.json output=runs/stage2

Every field of the file can be given as `section.key=value`.  The same command resumes a run where it stopped.  On
several hosts run it on each: with --distributed on TPU pods, where hosts find each other, elsewhere with --coordinator,
--processes and --process.
"""

import argparse

from llamavid_jax.commands.processes import add_processes, check_processes, join, leave
from llamavid_jax.commands.program import keep_programs
from llamavid_jax.errors import Parser, command, say
from llamavid_jax.precompile import compile_check


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(description="Trains LLaMA-VID, one stage at a time.", allow_abbrev=False)
    parser.add_argument("--config", required=True, metavar="FILE", help="one of configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="overrides a field of the file")
    parser.add_argument("--profile", action="store_true", help="write a trace of three steps to OUTPUT/profile")
    parser.add_argument(
        "--simulate-fault",
        action="append",
        metavar="KIND@STEP",
        help="test how the run copes with kill, hang, slow, nan, disk or bucket; may be repeated",
    )
    parser.add_argument("--compile-only", action="store_true", help="compile the step for --topology and stop")
    compile_check.add_arguments(parser)
    add_processes(parser)
    options = parser.parse_intermixed_args(arguments)
    check_processes(options)
    if not options.compile_only and (options.topology or options.quick or options.features or options.num_slices != 1):
        parser.error("--topology, --num-slices, --quick and --features go with --compile-only, or this would train")
    return options


@command("train.py")
def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    from llamavid_jax.training.config import read_config  # JAX takes seconds to import

    config = read_config(options.config, options.overrides)
    if options.compile_only:
        return compile_check.check(config, options)
    keep_programs()
    join(options)
    from llamavid_jax.training.faults import Fault
    from llamavid_jax.training.loop import train

    faults = [Fault.parse(text) for text in options.simulate_fault or ()]
    try:
        return train(config, say, options.profile, faults)
    finally:
        leave()
