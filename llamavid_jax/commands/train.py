"""Trains LLaMA-VID, a stage at a time:

    python train.py --config configs/stage2_instruct.yaml data.path=chat.json output=runs/stage2

Every field of the file can be given as `section.key=value`.  The same command goes on where a run stopped.  On several
hosts the same command runs on each: with --distributed on TPU pods, which know each other, elsewhere with
--coordinator, --processes and --process.
"""

import argparse
import socket

from llamavid_jax.commands.program import keep_programs
from llamavid_jax.errors import InputError, Parser, command, say
from llamavid_jax.precompile import compile_check


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(description="Trains LLaMA-VID, a stage at a time.", allow_abbrev=False)
    parser.add_argument("--config", required=True, metavar="FILE", help="one of configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="put over the file")
    parser.add_argument("--profile", action="store_true", help="write a trace of three steps to OUTPUT/profile")
    parser.add_argument(
        "--simulate-fault", metavar="KIND@STEP", help="kill, hang, slow, nan or disk: see what becomes of the run"
    )
    parser.add_argument("--compile-only", action="store_true", help="compile the step for --topology and stop")
    compile_check.add_arguments(parser)
    parser.add_argument("--distributed", action="store_true", help="a TPU pod: find the other hosts by themselves")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0, where hosts do not find each other")
    parser.add_argument("--processes", type=int, metavar="N", help="how many processes there are")
    parser.add_argument("--process", type=int, metavar="I", help="which one this is, from 0")
    options = parser.parse_intermixed_args(arguments)
    together = (options.coordinator, options.processes, options.process)
    if any(value is not None for value in together) and None in together:
        parser.error("--coordinator, --processes and --process go together; give all three")
    if options.coordinator is not None:
        host, _, port = options.coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            parser.error(f"--coordinator is {options.coordinator!r}; give HOST:PORT, such as localhost:7654")
        if not 0 <= options.process < options.processes:
            parser.error(f"--process is {options.process} of --processes {options.processes}; count them from 0")
    if not options.compile_only and (options.topology or options.quick or options.features or options.num_slices != 1):
        parser.error("--topology, --num-slices, --quick and --features go with --compile-only, or this would train")
    return options


def check_coordinator(address: str, process: int) -> None:
    """Raises InputError for a host that is not known and, on process 0, a port that is taken: JAX would abort."""
    host, _, port = address.rpartition(":")
    try:
        socket.getaddrinfo(host, port)
        if process == 0:
            socket.create_server(("", int(port))).close()
    except OSError as error:
        raise InputError(f"--coordinator {address}: {error}; give the host of process 0 and a free port") from None


@command("train.py")
def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    from llamavid_jax.training.config import read_config  # JAX takes seconds to import

    config = read_config(options.config, options.overrides)
    if options.compile_only:
        return compile_check.check(config, options)
    keep_programs()
    if options.coordinator or options.distributed:
        join(options)
    from llamavid_jax.training.faults import Fault
    from llamavid_jax.training.loop import train

    fault = Fault.parse(options.simulate_fault) if options.simulate_fault else None
    return train(config, say, options.profile, fault)


def join(options: argparse.Namespace) -> None:
    """Makes this process one of several."""
    import jax

    if options.coordinator:
        check_coordinator(options.coordinator, options.process)
        say(f"waiting for {options.processes} processes at {options.coordinator}")
    try:
        jax.distributed.initialize(options.coordinator, options.processes, options.process)
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"this process does not find the others ({error}); --distributed is for TPU pods and clusters that "
            "JAX knows, elsewhere give --coordinator, --processes and --process"
        ) from None
