"""What the compiler reports for one program on one slice: numbers, a row of a table, a line of JSON."""

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax

from llamavid_jax.parallel.chips import Chip
from llamavid_jax.precompile.buffers import Assigned, assign_buffers
from llamavid_jax.precompile.collectives import collectives
from llamavid_jax.precompile.roofline import estimate
from llamavid_jax.precompile.topology import OutOfMemoryError, compile_lowered

COLUMNS = (
    "program", "slice", "mesh", "peak a device", "fits", "arguments + temporaries + output", "compile",
    "received a device and step", "FLOP a step", "at best, and as published steps run (estimates)",
)  # fmt: skip
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Report:
    """Memory in GiB per device; `collectives` by kind, per device and step; `flops` of all devices together.

    `seconds`, `bound` and `utilisation` are the roofline's estimate; `published` is the fraction of that speed that
    published steps reach on such chips (`models/published.py`; 0 if unknown).  For a program that does not fit, only
    `peak_gib` is known, and `remedy` says what to change.
    """

    program: str
    topology: str
    devices: int
    mesh: str
    hbm_gib: float
    flops: int
    peak_gib: float
    compile_seconds: float
    remedy: str = ""
    arguments_gib: float = 0.0
    temporaries_gib: float = 0.0
    output_gib: float = 0.0
    collectives: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    bound: str = ""
    utilisation: float = 0.0
    published: float = 0.0
    replicated_mib: dict[str, float] = dataclasses.field(default_factory=dict)
    machine_code: bool = True  # whether it was generated (`buffers.py`)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def fits(self) -> bool:
        return not self.remedy

    def row(self) -> list[str]:
        """The cells under COLUMNS."""
        head = [self.program, f"{self.topology} ({self.devices})", self.mesh]
        peak = f"{self.peak_gib:.1f} of {self.hbm_gib:g} GiB"
        if not self.fits:
            return [*head, peak, f"no: {self.remedy}", "", f"{self.compile_seconds:.0f} s", "", f"{self.flops:.2g}", ""]
        moved = ", ".join(
            f"{kind} {one['bytes'] / 1e9:.2f} GB ({one['asynchronous']} of {one['count']} asynchronous)"
            for kind, one in self.collectives.items()
        )
        return [
            *head,
            peak,
            "yes",
            f"{self.arguments_gib:.1f} + {self.temporaries_gib:.1f} + {self.output_gib:.1f} GiB",
            f"{self.compile_seconds:.0f} s" + ("" if self.machine_code else ", no machine code"),
            moved or "nothing",
            f"{self.flops:.2g}",
            f"{self.seconds:.3g} s, {self.utilisation:.0%} of the peak, bound by {self.bound}"
            + (f"; {self.seconds / self.published:.3g} s as published" if self.published else ""),
        ]

    def json(self) -> str:
        return json.dumps(dataclasses.asdict(self) | {"fits": self.fits})


def compile_report(
    lowered: jax.stages.Lowered,
    chip: Chip,
    slices: int,
    flops: int,
    remedy: str,
    recomputed: int = 0,
    machine_code: bool = True,
    **known: Any,
) -> Report:
    """Compiles the program and collects its numbers; `remedy` is what to change if it does not fit."""
    began = time.perf_counter()
    common = {"hbm_gib": chip.hbm_gib, "flops": flops, "versions": versions(), "machine_code": machine_code, **known}
    try:
        needs = _compiled(lowered) if machine_code else assign_buffers(lowered)
    except OutOfMemoryError as error:
        seconds = time.perf_counter() - began
        return Report(**common, peak_gib=error.needed, compile_seconds=seconds, remedy=remedy)
    seconds, devices = time.perf_counter() - began, known["devices"]
    moved = collectives(needs.text, devices // slices if slices > 1 else None)
    between = sum(one.bytes_between_slices for one in moved.values())
    best = estimate(
        chip,
        flops=flops / devices,
        recomputed=recomputed / devices,
        hbm_bytes=needs.arguments
        + 2 * needs.temporaries
        + needs.output,  # each at least once; temporaries are written and read
        ici_bytes=sum(one.bytes for one in moved.values()) - between,
        dcn_bytes=between,
    )
    return Report(
        **common,
        peak_gib=needs.peak / GIB,
        compile_seconds=seconds,
        arguments_gib=needs.arguments / GIB,
        temporaries_gib=needs.temporaries / GIB,
        output_gib=needs.output / GIB,
        collectives={kind: dataclasses.asdict(one) for kind, one in moved.items()},
        **best._asdict(),
    )


def _compiled(lowered: jax.stages.Lowered) -> Assigned:
    compiled = compile_lowered(lowered)
    memory = compiled.memory_analysis()
    return Assigned(
        memory.peak_memory_in_bytes,
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.output_size_in_bytes,
        compiled.as_text(),
    )


def show(reports: Sequence[Report]) -> int:
    """Prints each report, as text and as a line of JSON; returns the exit code, 1 if a program does not fit."""
    for report in reports:
        print("\n".join(f"{name:34} {cell}" for name, cell in zip(COLUMNS, report.row(), strict=True)))
        for path, size in report.replicated_mib.items():
            print(f"{'replicated':34} {path}: {size:.1f} MiB")
        print(report.json(), flush=True)
    too_large = [report for report in reports if not report.fits]
    for report in too_large:
        needed = f"{report.peak_gib:.1f} GiB needed, {report.hbm_gib:g} GiB available"
        print(f"{report.program}: {needed}: {report.remedy}", file=sys.stderr)
    return 1 if too_large else 0


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("jax", "jaxlib", "libtpu", "flax")}
