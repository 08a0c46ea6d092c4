"""Which packets are decoded for a sampling: Sampling with its file's Index -> parts of spans.  No decoding.

    wanted frames ─ each to the last entry before it ─▶ spans ─ a few hundred packets together ─▶ parts

A span runs from an entry to the last packet in it that a wanted frame needs; what is between spans is not decoded, nor
are, within one, frames that no other refers to, but for the wanted ones.  A part is the work of one decoder at a time.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from llamavid_jax.media.timeline import Timeline

SHORT = 1500  # frames; a video of up to a minute is decoded whole, and any damage in it is seen
PART = 250  # packets; a decoder is given at least so many at once


class Span(NamedTuple):
    """Packets by number, `stop` not among them."""

    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Part:
    """Spans one after another, and the packets of the frames that they are decoded for, in order of presentation."""

    spans: list[Span]
    wanted: Int64[np.ndarray, " n"]


def plan_reading(timeline: Timeline, places: Int64[np.ndarray, " n"]) -> list[Part]:
    """Parts that give the frames at `places` (ascending) in order; none where all has to be decoded in order."""
    index = timeline.index
    if index is None or len(timeline.times) <= SHORT or not len(places):
        return []
    pts = timeline.pts[places]
    numbers = index.numbers(pts)
    entry = np.searchsorted(index.entries, numbers, side="right") - 1
    # What is shown before the entry, though stored behind it, may need what stands before it.
    while (late := (entry >= 0) & (index.pts[index.entries[entry]] > pts)).any():
        entry -= late
    if numbers.min() < 0 or entry.min() < 0:
        return []
    first = np.flatnonzero(np.diff(entry, prepend=-1))
    parts, packets = [], PART
    for start, stop in zip(first, [*first[1:], len(places)], strict=True):
        span = Span(int(index.entries[entry[start]]), int(numbers[start:stop].max()) + 1)
        if packets >= PART:
            parts.append(Part([], numbers[:0]))
            packets = 0
        packets += span.stop - span.start
        spans = [*parts[-1].spans, span]
        parts[-1] = Part(spans, np.concatenate([parts[-1].wanted, numbers[start:stop]]))
    return parts
