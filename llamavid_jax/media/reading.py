"""Plans which packets to decode for a sampling: Sampling with its file's Index -> parts of spans.  No decoding.

    wanted frames ─ each to the last entry before it ─▶ spans ─ a few hundred packets together ─▶ parts

A span runs from an entry to the last packet that its wanted frames need.  Packets between spans are not decoded, nor,
within a span, unwanted frames that no other refers to.  A part is the work of one decoder at a time.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from llamavid_jax.media.timeline import Timeline

SHORT = 1500  # frames; a video of up to a minute is decoded whole, so that any damage is found
PART = 250  # packets; a decoder gets at least this many at once


class Span(NamedTuple):
    """Packet numbers from `start` to `stop`, exclusive."""

    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Part:
    """Consecutive spans, and the packet numbers of the frames wanted from them, in presentation order."""

    spans: list[Span]
    wanted: Int64[np.ndarray, " n"]


def plan_reading(timeline: Timeline, places: Int64[np.ndarray, " n"]) -> list[Part]:
    """Parts that give the frames at `places` (ascending) in order; none if the file must be decoded in order."""
    index = timeline.index
    if index is None or len(timeline.times) <= SHORT or not len(places):
        return []
    pts = timeline.pts[places]
    numbers = index.numbers(pts)
    entry = np.searchsorted(index.entries, numbers, side="right") - 1
    # A frame shown before its entry, though stored after it, may need packets before the entry.
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
