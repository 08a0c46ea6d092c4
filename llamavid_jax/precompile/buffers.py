"""A program's memory and collectives, as soon as the compiler has assigned buffers: before it generates machine code.

    lowered ─ optimised, partitioned, scheduled ─▶ buffers assigned ─▶ Assigned, after half a minute for a 7B step
                                                          └─ machine code, which takes minutes, and is not waited for

By then memory and collectives are those of a complete compilation.  Errors in code generation stay undetected, such as
a Pallas kernel that the chip cannot run.
"""

import re
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

import jax

from llamavid_jax.precompile.topology import CompileError, refusal

ASSIGNMENT, LAST = "after_optimizations-buffer-assignment.txt", "after_buffer_assignment.txt"  # files, in this order
WHOLE = re.compile(r"^ENTRY .*^}", re.MULTILINE | re.DOTALL)  # the entry computation is a program's last


class Assigned(NamedTuple):
    """Bytes on one device: the peak, and those of arguments, temporaries and output; the program's text (HLO)."""

    peak: int
    arguments: int
    temporaries: int
    output: int
    text: str


def assign_buffers(lowered: jax.stages.Lowered) -> Assigned:
    """Call it in a process that ends afterwards (`in_own_process`): the compiler runs on until then.

    Raises as `compile_lowered` does.
    """
    failed: list[Exception] = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}

        def run() -> None:
            try:
                lowered.compile(compiler_options=options)
            except jax.errors.JaxRuntimeError as error:
                failed.append(error)

        def written(ending: str) -> str:
            return "".join(path.read_text(errors="replace") for path in Path(folder).glob(f"*{ending}"))

        compiler = threading.Thread(target=run, daemon=True)
        compiler.start()
        while compiler.is_alive() and not WHOLE.search(written(LAST)):
            time.sleep(0.2)
        if failed:
            raise refusal(failed[0])
        text = written(LAST)
        if not WHOLE.search(text):
            raise CompileError(f"the compiler could not write what it found to {folder}; free space there")
        return read(written(ASSIGNMENT), text)


def read(assignment: str, text: str) -> Assigned:
    """Sums over the allocations in the chip's main memory; those elsewhere have a color."""
    arguments = temporaries = output = new_output = 0
    for size, kind in re.findall(r"^allocation \d+: size (\d+), (.*)", assignment, re.MULTILINE):
        if not kind.startswith("color"):
            taken, out = "parameter" in kind, "live-out" in kind
            arguments += int(size) * taken
            output += int(size) * out
            new_output += int(size) * (out and not taken)  # other outputs reuse an argument's memory
            temporaries += int(size) * kind.startswith("preallocated-temp")
    return Assigned(arguments + temporaries + new_output, arguments, temporaries, output, text)
