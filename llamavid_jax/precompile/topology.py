"""TPU slices that are not attached: `"v5e:8x8"` → devices that programs can be compiled for, on any machine.

The compiler is the one in the `libtpu` wheel, the same that a TPU runs with (jax.experimental.topologies).  It runs in
a process of its own, so that its memory is freed afterwards, and that an error is raised if the system kills it.
"""

import math
import os
import re
import signal
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import jax
from jax.sharding import Mesh

from llamavid_jax.errors import InputError
from llamavid_jax.parallel.chips import CHIPS, Chip
from llamavid_jax.parallel.mesh import DATA, FSDP, ShardingError, make_mesh, parse_mesh

ENVIRONMENT = {  # read when libtpu loads: it queries no metadata server about a TPU, and locks none
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_MIN_LOG_LEVEL": "3",
    "JAX_PLATFORMS": "cpu",
}
_OUT_OF_HBM = re.compile(
    r"(?:Used|temporaries|arguments) \(?([\d.]+)([KMGT])\)? (?:of|exceeds available HBM) \(?([\d.]+)([KMGT])\)?"
)
_GIB = {"K": 2**-20, "M": 2**-10, "G": 1.0, "T": 2**10}


class CompileError(InputError):
    """A program that cannot be compiled for a slice: says why and what to do."""


class OutOfMemoryError(CompileError):
    """A program that needs more memory than a chip has: `needed` and available (`there`), in GiB."""

    def __init__(self, needed: float, there: float):
        super().__init__(f"{needed:.1f} GiB needed, {there:.1f} GiB available")
        self.needed, self.there = needed, there

    def __reduce__(self):
        return type(self), (self.needed, self.there)


def chip_of(topology: str) -> Chip:
    """The row of `chips.py`.  Raises CompileError for an unknown generation or a malformed shape."""
    name, _, shape = topology.partition(":")
    chip = CHIPS.get(name)
    sides = [side for side in shape.split("x") if re.fullmatch(r"[1-9]\d*", side)]
    if chip is None or len(sides) != chip.sides or "x".join(sides) != shape:
        raise CompileError(
            f"{topology!r} is no topology; write GENERATION:CHIPS with one of {', '.join(CHIPS)}, "
            f"such as {name if chip else 'v5p'}:{'2x2x4' if chip is None or chip.sides == 3 else '4x4'}"
        )
    return chip


def slice_devices(topology: str, num_slices: int = 1) -> list[jax.Device]:
    """The devices of `num_slices` slices; nothing can run on them.

    Raises CompileError without libtpu and for a shape that no slice of the generation has.
    """
    from jax.experimental import topologies

    chip_of(topology)
    os.environ.update(ENVIRONMENT)
    generation, shape = topology.split(":")
    settings = {"num_slices": num_slices} if num_slices > 1 else {}
    if set(shape.split("x")) == {"1"}:
        settings["chips_per_host_bounds"] = (1, 1, 1)
    if generation == "v4":  # as Cloud TPU runs it: both cores of a chip are one device
        settings["chip_config_name"] = "megacore"
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology, **settings).devices
    except jax.errors.JaxRuntimeError as error:
        raise CompileError(f"{topology!r} is no slice that libtpu knows; v5e:4x4 is one ({_line(error)})") from None
    except RuntimeError as error:
        raise CompileError(
            f"libtpu is not installed ({_line(error)}); try pip install 'jax[tpu]=={jax.__version__}'"
        ) from None


def slice_mesh(topology: str, text: str, num_slices: int = 1, default: str = FSDP) -> Mesh:
    """The mesh over all devices of the slices: `text`, or else slices on `data` and the rest on `default`.

    Raises ShardingError if `text` has more or fewer devices.
    """
    devices = slice_devices(topology, num_slices)
    outer = {DATA: num_slices} if num_slices > 1 else {}
    sizes = parse_mesh(text) or outer | {default: len(devices) // num_slices}
    if math.prod(sizes.values()) != len(devices):
        raise ShardingError(
            f"mesh {text!r} has {math.prod(sizes.values())} devices, {topology} {len(devices)}; "
            f"use all of them, such as {default}={len(devices)}"
        )
    return make_mesh(devices, **sizes)


def compile_lowered(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Raises OutOfMemoryError if the program needs more than a chip's memory, CompileError for other reasons."""
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        raise refusal(error) from None


def refusal(error: jax.errors.JaxRuntimeError) -> CompileError:
    """The exception for a compiler's error."""
    if found := _OUT_OF_HBM.search(str(error)):
        needed, unit, there, there_unit = found.groups()
        return OutOfMemoryError(float(needed) * _GIB[unit], float(there) * _GIB[there_unit])
    return CompileError(f"the TPU compiler refuses the program: {_line(error)}")


def in_own_process(function: Callable[..., Any], *arguments: Any, limit: float | None = None) -> Any:
    """The result of `function(*arguments)`, run in a process of its own.

    Raises CompileError after `limit` seconds, if the compiler crashed, and if the system killed the process, as it does
    when memory runs out.
    """
    os.environ.update(ENVIRONMENT)
    context = get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(theirs, function, arguments))
    process.start()
    theirs.close()
    try:
        if not ours.poll(limit):
            raise CompileError(f"the compiler was not done after {limit:.0f} s; give it more, or take a faster machine")
        found, error = ours.recv()
    except EOFError:
        process.join()
        if process.exitcode != -signal.SIGKILL:
            raise CompileError(
                f"the compiler crashed (exit code {process.exitcode}; its last words are above); --quick stops before "
                "the machine code, where it is likeliest, and another remat or mesh is another program"
            ) from None
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        raise CompileError(
            f"the compiler was ended by the system, most likely for want of memory: this machine has {total:.0f} "
            "GiB; compile on a larger one, or for a smaller slice"
        ) from None
    finally:
        process.kill()
        process.join()
    if error is not None:
        raise error
    return found


def _answer(connection: Connection, function: Callable[..., Any], arguments: tuple) -> None:
    try:
        connection.send((function(*arguments), None))
    except Exception as error:
        connection.send((None, error))


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:400]
