"""The packets of a video stream in the order of the file, and at which of them decoding may begin.

An entry is a packet from which on every frame that is shown no earlier comes out as if the file had been decoded from
its start.  The container's mark of a key frame alone does not promise that: H.264 marks also pictures that later ones
reach back across, and a file may bring new parameter sets on its way.
Letters: P packets, E entries.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

SEEKABLE = ("mp4", "matroska")  # parts of FFmpeg's names of the formats whose index finds each key frame
PLAIN_KEYS = ("vp8", "vp9", "av1", "mpeg4", "mpeg2video", "mjpeg", "prores")  # whose key frames are entries
# Types of the units that begin anew, and of parameter sets: instantaneous refresh alone in H.264, in HEVC each random
# access point, as no picture that is shown after one may refer to what was before it.
UNITS = {"h264": ({5}, {7, 8}), "hevc": (set(range(16, 24)), {32, 33, 34})}
WITH_NONREF = ("h264", "hevc", "mpeg4", "mpeg2video")  # whose decoders know frames that no other refers to
PROGRESSIVE = (0, 1)  # FFmpeg's field orders "unknown" and "progressive"; else a packet may hold half a frame


class Mark(NamedTuple):
    """One packet; times in ticks."""

    pts: int | None
    dts: int | None
    is_entry: bool


@dataclasses.dataclass(frozen=True)
class Index:
    """All packets of the stream, hidden ones too.  Their `pts` differ."""

    pts: Int64[np.ndarray, " P"]
    dts: Int64[np.ndarray, " P"]
    entries: Int64[np.ndarray, " E"]  # numbers of packets, ascending
    can_seek: bool  # else the one entry is where the file begins
    has_nonref: bool  # whether frames that no other refers to can be told, and left out
    area: int  # pixels of a frame

    @functools.cached_property
    def _by_time(self) -> Int64[np.ndarray, " P"]:
        return np.argsort(self.pts)

    def numbers(self, pts: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """The packets of these times; -1 for a time that none has."""
        places = np.searchsorted(self.pts, pts, sorter=self._by_time).clip(max=len(self.pts) - 1)
        found = self._by_time[places]
        return np.where(self.pts[found] == pts, found, -1)


def index_of(marks: Sequence[Mark], kind: str, codec_context) -> Index | None:
    """None where only decoding in order is sound.  `kind` is FFmpeg's name of the format."""
    codec = codec_context.codec.canonical_name
    pts = [mark.pts for mark in marks]
    is_known = codec in PLAIN_KEYS or codec in UNITS
    if not is_known or None in pts or len(set(pts)) < len(pts) or codec_context.field_order not in PROGRESSIVE:
        return None
    entries = [number for number, mark in enumerate(marks) if mark.is_entry]
    can_seek = any(name in kind for name in SEEKABLE) and bool(entries)
    dts = [mark.pts if mark.dts is None else mark.dts for mark in marks]
    has_nonref = codec in WITH_NONREF and (codec != "hevc" or _sublayers(codec_context.extradata) == 1)
    if not can_seek and not has_nonref:
        return None
    area = codec_context.width * codec_context.height
    return Index(np.array(pts), np.array(dts), np.array(entries if can_seek else [0]), can_seek, has_nonref, area)


class Entries:
    """`is_entry(packet)` of one stream's key frames, in the order of the file."""

    def __init__(self, codec_context):
        self.codec, self._seen = codec_context.codec.canonical_name, set()
        extradata = codec_context.extradata or b""
        place = {"h264": 4, "hevc": 21}.get(self.codec, 0)  # of the length of lengths; 0 in a stream with start codes
        self._width = (extradata[place] & 3) + 1 if len(extradata) > place and extradata[0] == 1 else 0

    def is_entry(self, packet) -> bool:
        if self.codec not in UNITS:
            return True
        begins, sets = UNITS[self.codec]
        types = set(_unit_types(memoryview(packet), self._width, self.codec)) if self._width else set()
        given = types & sets
        self._seen |= given  # sets that came on the way must come again with the entry
        return bool(types & begins) and given == self._seen


def _unit_types(data: memoryview, width: int, codec: str) -> Iterator[int]:
    """Types of the units of one packet, each behind its length."""
    at = 0
    while at + width < len(data):
        head = data[at + width]
        yield head & 31 if codec == "h264" else head >> 1 & 63
        at += width + int.from_bytes(data[at : at + width])


def _sublayers(extradata: bytes | None) -> int:
    """Temporal layers of HEVC; 0 where the file does not say.  With one alone a frame that its own layer does not refer
    to is referred to by none."""
    return extradata[21] >> 3 & 7 if extradata and len(extradata) > 21 and extradata[0] == 1 else 0
