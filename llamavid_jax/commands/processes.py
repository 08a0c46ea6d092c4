"""One of several processes: of a training run together, or each with its own part of videos and questions."""

import argparse
import contextlib
import socket
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

from llamavid_jax.errors import InputError, say


def add_processes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--distributed", action="store_true", help="a TPU pod: find the other hosts by themselves")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0, where hosts do not find each other")
    parser.add_argument("--processes", type=int, metavar="N", help="how many processes there are")
    parser.add_argument("--process", type=int, metavar="I", help="which one this is, from 0")


def check_processes(options: argparse.Namespace) -> None:
    together = (options.coordinator, options.processes, options.process)
    if any(value is not None for value in together) and None in together:
        raise InputError("--coordinator, --processes and --process go together; give all three")
    if options.coordinator is not None:
        host, _, port = options.coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise InputError(f"--coordinator is {options.coordinator!r}; give HOST:PORT, such as localhost:7654")
        if not 0 <= options.process < options.processes:
            raise InputError(f"--process is {options.process} of --processes {options.processes}; count them from 0")


def join(options: argparse.Namespace) -> None:
    """Makes this process one of several, where that is asked for."""
    if not (options.coordinator or options.distributed):
        return
    import jax  # takes seconds

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


def leave() -> None:
    """Leaves the others of a run, as the interpreter's end does; but that first waits for every thread.

    Those of a save that failed wait for other processes for 20 minutes.
    """
    import jax

    if jax.process_count() > 1:
        with contextlib.suppress(RuntimeError):  # one of them is gone, which is said where it was missed
            jax.distributed.shutdown()


def check_coordinator(address: str, process: int) -> None:
    """Raises InputError for a host that is not known and, on process 0, a port that is taken: JAX would abort."""
    host, _, port = address.rpartition(":")
    try:
        socket.getaddrinfo(host, port)
        if process == 0:
            socket.create_server(("", int(port))).close()
    except OSError as error:
        raise InputError(f"--coordinator {address}: {error}; give the host of process 0 and a free port") from None


def add_shard(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shard", metavar="I/N", help="the part I, from 0, of N that processes share (0/1: all)")
    add_processes(parser)


def read_shard(options: argparse.Namespace) -> tuple[int, int]:
    """ "2/8" as (2, 8); (0, 1) without."""
    check_processes(options)
    if options.shard is not None and (options.coordinator or options.distributed):
        raise InputError("--shard names the part that --distributed finds out; give one of them")
    index, _, count = (options.shard or "0/1").partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise InputError(f"--shard is {options.shard!r}; give I/N with I from 0 to N - 1, such as 0/4")
    return int(index), int(count)


def own_shard(options: argparse.Namespace) -> tuple[int, int]:
    """The part of this process, and of how many: what `read_shard` found, or the process's place among the others.

    A process of its own asks for the place, and ends: each works alone then, waits for no other and outlives it.
    """
    if not (options.coordinator or options.distributed):
        return options.shard
    try:
        with ProcessPoolExecutor(1, get_context("spawn")) as asking:
            return asking.submit(_place, options).result()
    except BrokenProcessPool:
        raise InputError("this process does not find the others in time; start all of them together") from None


def _place(options: argparse.Namespace) -> tuple[int, int]:
    import jax

    jax.config.update("jax_platforms", "cpu")  # the devices are for the work
    join(options)
    found = jax.process_index(), jax.process_count()
    jax.distributed.shutdown()
    return found
