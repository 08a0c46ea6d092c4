"""What a compiled program sends between devices: its text (XLA's HLO) → bytes that one device receives, by kind.

    all-gather      out · (n-1)/n            all-to-all            out · (n-1)/n
    all-reduce  2 · out · (n-1)/n            collective-permute    out
    reduce-scatter   in · (n-1)/n            in groups of n devices: what the best algorithms need

Transfers between slices appear as a `recv` from the network's runtime, with the size of its output.  What is in a loop
counts as often as the loop runs; the trip count is in its condition.  The TPU compiler splits an asynchronous
collective into pieces, which it puts into the fusions that run at the same time, all with one channel.  They count
once, even if some of them are in a loop and others are not.
"""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterator

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "bf16": 2, "c64": 8, "c128": 16}  # other types' names end in their number of bits

_COMPUTATION = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.*?)\s([a-z][a-z0-9\-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|branch_computations|called_computations)=\{?((?:%[\w.\-]+(?:, )?)+)")


@dataclasses.dataclass
class Moved:
    """One kind of collective in one step: how many run, how many of them asynchronously, bytes a device receives."""

    count: int = 0
    asynchronous: int = 0
    bytes: float = 0.0
    bytes_between_slices: float = 0.0  # part of `bytes`


def collectives(text: str, slice_devices: int | None = None) -> dict[str, Moved]:
    """The collectives of `compiled.as_text()`, by kind.

    `slice_devices` is the number of devices of a slice if there are several slices.
    """
    computations, entry = _computations(text)
    found: dict[tuple, list[tuple[str, int, float, bool, bool]]] = defaultdict(list)
    for context, (name, times) in enumerate(_contexts(computations, entry)):
        for inner in _inlined(computations, name):
            for own_name, output, opcode, rest in computations[inner]:
                kind = opcode.removesuffix("-start")
                if opcode == "recv" and (transfer := re.search(r'_xla_megascale_transfer_type="(\w+)"', rest)):
                    size = _bytes(*_ARRAY.search(output).groups())
                    kind = transfer[1].lower().replace("_", "-")
                    found[context, inner, own_name].append((kind, times, size, True, True))
                    continue
                if kind not in KINDS:
                    continue
                if kind == "all-reduce" and inner.startswith("all-reduce-scatter"):
                    kind = "reduce-scatter"
                pieces_of = re.search(r"channel_id=(\d+)", rest) if "chain_id=" in rest else None
                is_async = opcode.endswith("-start") or "chain_id=" in rest or "async_collective_name=" in rest
                size, between = _received(kind, opcode, output, rest, slice_devices)
                place = (kind, pieces_of[1]) if pieces_of else (context, inner, own_name)
                found[place].append((kind, times, size, is_async, between))
    moved = defaultdict(Moved)
    for pieces in found.values():
        kind, times, size, _, between = min(pieces, key=lambda piece: piece[1])
        total = moved[kind]
        total.count += times
        total.asynchronous += times * any(is_async for *_, is_async, _ in pieces)
        total.bytes += times * size
        total.bytes_between_slices += times * size * between
    return dict(sorted(moved.items()))


def _computations(text: str) -> tuple[dict[str, list[tuple[str, str, str, str]]], str]:
    """Instructions `(name, type, opcode, rest of the line)` of every computation, and the name of the entry."""
    computations, entry, current = {}, "", []
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = computations[header[2]] = []
            entry = header[2] if header[1] else entry
        elif instruction := _INSTRUCTION.match(line):
            current.append(instruction.groups())
    return computations, entry


def _contexts(computations: dict, name: str, times: int = 1) -> Iterator[tuple[str, int]]:
    """The entry and the bodies of all loops, nested ones too, with how often each runs in a step."""
    yield name, times
    for inner in _inlined(computations, name):
        for *_, opcode, rest in computations[inner]:
            if opcode == "while":
                condition, body = (re.search(rf"{part}=%([\w.\-]+)", rest)[1] for part in ("condition", "body"))
                yield from _contexts(computations, body, times * _trip_count(computations, condition, body, rest))


def _inlined(computations: dict, name: str) -> Iterator[str]:
    """The computation and those that it calls, except loops: fusions, calls and branches."""
    yield name
    for *_, opcode, rest in computations[name]:
        if opcode == "while" or opcode.startswith(("all-", "reduce")):
            continue
        for called in _CALLED.findall(rest):
            for inner in re.findall(r"%([\w.\-]+)", called):
                yield from _inlined(computations, inner)


def _trip_count(computations: dict, condition: str, body: str, rest: str) -> int:
    """How often a loop runs that counts from 0 to a constant; 1 if that depends on the data."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', rest):
        return int(known[1])
    bounds = [
        int(operands.split(")")[0])
        for inner in _inlined(computations, condition)
        for _, output, opcode, operands in computations[inner]
        if opcode == "constant" and output.startswith(("s32[]", "u32[]"))
    ]
    return -(-bounds[0] // _step(computations[condition], computations[body])) if len(bounds) == 1 else 1


def _step(condition: list[tuple[str, str, str, str]], body: list[tuple[str, str, str, str]]) -> int:
    """The increment of the loop's counter: more than 1 if the compiler does several rounds in one."""
    places = [re.search(r"index=(\d+)", rest)[1] for *_, opcode, rest in condition if opcode == "get-tuple-element"]
    by_name = {name: (opcode, re.findall(r"%([\w.\-]+)", rest.split(")")[0]), rest) for name, _, opcode, rest in body}
    opcode, operands, _ = by_name[body[-1][0]]
    if len(places) != 1 or opcode != "tuple":
        return 1
    opcode, operands, _ = by_name[operands[int(places[0])]]
    steps = [by_name[name][2] for name in operands if by_name.get(name, ("",))[0] == "constant"]
    return int(steps[0].split(")")[0]) if opcode == "add" and len(steps) == 1 else 1


def _received(kind: str, opcode: str, output: str, rest: str, slice_devices: int | None) -> tuple[float, bool]:
    """Bytes that a device receives, and whether they cross between slices."""
    size = sum(_bytes(*array) for array in _ARRAY.findall(output))
    if kind == "collective-permute":
        pairs = np.array(re.findall(r"\{(\d+),(\d+)\}", rest), int)
        return (size / 2 if opcode.endswith("-start") else size), _crosses(pairs, slice_devices)
    groups = _groups(rest)
    n = groups.shape[1]
    if opcode == "all-gather-start":  # its output includes its input
        size *= n / (n + 1)
    if opcode == "reduce-scatter":
        size *= n
    return size * (n - 1) / n * (2 if kind == "all-reduce" else 1), _crosses(groups, slice_devices)


def _bytes(kind: str, shape: str) -> float:
    bits = re.search(r"\d+", kind)
    return float(BYTES.get(kind, int(bits[0]) / 8 if bits else 0)) * math.prod(
        int(size) for size in shape.split(",") if size
    )


def _groups(rest: str) -> np.ndarray:
    """`[groups, devices]` of `{{0,1},{2,3}}`, `[2,4]<=[4,2]T(1,0)`, `mesh['x'=2,'y'=4] {'y'}` or
    `mesh['x'=2,'y'=4], device_ids=([4,2]T(1,0)) {'y'}`."""
    text = rest.split("replica_groups=", 1)[1]
    if text.startswith("{{"):
        return np.array([group.split(",") for group in re.findall(r"\{([\d,]+)\}", text.split("}}")[0] + "}")], int)
    if text.startswith("["):
        shape, dims, order = re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
        return _numbered(dims, order).reshape(_ints(shape))
    mesh, dims, order, cut = re.match(
        r"mesh\[(.*?)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{(.*?)\}", text
    ).groups()
    sizes, names = zip(*((int(size), axis) for axis, size in re.findall(r"'(\w+)'=(\d+)", mesh)), strict=True)
    own = [names.index(axis) for axis in re.findall(r"'(\w+)'", cut)]
    devices = _numbered(dims or str(math.prod(sizes)), order).reshape(sizes)
    return np.moveaxis(devices, own, range(-len(own), 0)).reshape(-1, math.prod(sizes[axis] for axis in own))


def _numbered(dims: str, order: str | None) -> np.ndarray:
    """Devices counted along `dims`, with the axes then transposed: `32,2` and `1,0` give 0, 2, 4, ... 1, 3, 5, ..."""
    return np.arange(math.prod(_ints(dims))).reshape(_ints(dims)).transpose(_ints(order) if order else None)


def _ints(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _crosses(groups: np.ndarray, slice_devices: int | None) -> bool:
    return slice_devices is not None and bool(np.any(groups // slice_devices != groups[:, :1] // slice_devices))
