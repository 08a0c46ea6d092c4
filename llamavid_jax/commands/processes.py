"""Several processes: those of one training run, or independent ones that share videos and questions."""

import argparse
import contextlib
import socket
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

from llamavid_jax.errors import InputError, say


def add_processes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--distributed", action="store_true", help="on a TPU pod: the hosts find each other")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0, unless --distributed")
    parser.add_argument("--processes", type=int, metavar="N", help="number of processes")
    parser.add_argument("--process", type=int, metavar="I", help="index of this process, from 0")


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
    """Connects this process to the others, if the options ask for it."""
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
    """Disconnects from the other processes before the interpreter exits, which would first wait for every thread.

    The threads of a failed save wait for other processes for 20 minutes.
    """
    import jax

    if jax.process_count() > 1:
        with contextlib.suppress(RuntimeError):  # another process is gone, which was reported where it was missed
            jax.distributed.shutdown()


def check_coordinator(address: str, process: int) -> None:
    """Raises InputError for an unknown host and, on process 0, a port in use: JAX would abort."""
    host, _, port = address.rpartition(":")
    try:
        socket.getaddrinfo(host, port)
        if process == 0:
            socket.create_server(("", int(port))).close()
    except OSError as error:
        raise InputError(f"--coordinator {address}: {error}; give the host of process 0 and a free port") from None


def add_shard(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shard", metavar="I/N", help="process part I (from 0) of N parts (0/1: all)")
    add_processes(parser)


def read_shard(options: argparse.Namespace) -> tuple[int, int]:
    """ "2/8" as (2, 8); (0, 1) without --shard."""
    check_processes(options)
    if options.shard is not None and (options.coordinator or options.distributed):
        raise InputError("--shard names the part that --distributed finds out; give one of them")
    index, _, count = (options.shard or "0/1").partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise InputError(f"--shard is {options.shard!r}; give I/N with I from 0 to N - 1, such as 0/4")
    return int(index), int(count)


def own_shard(options: argparse.Namespace) -> tuple[int, int]:
    """The part of this process, and the number of parts: from `read_shard`, or by the process's index among all.

    A separate process finds the index and ends.  After that the processes are independent: none waits for another.
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
