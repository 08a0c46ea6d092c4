"""The packets of a video stream in file order, and those at which decoding may begin: its entries.

Decoding from an entry gives every frame shown at or after it as decoding from the start would.  A key frame in the
container is not always an entry: in H.264 later frames may refer back past it, and a file may contain new parameter
sets on its way.
Letters: P packets, E entries.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

SEEKABLE = ("mp4", "matroska")  # parts of FFmpeg's names of formats that index every key frame
PLAIN_KEYS = ("vp8", "vp9", "av1", "mpeg4", "mpeg2video", "mjpeg", "prores")  # codecs whose key frames are entries
# NAL unit types of entries and of parameter sets.  Entries are only instantaneous refreshes (IDR) in H.264; in HEVC all
# random access points, as no frame shown after one may refer to frames before it.
UNITS = {"h264": ({5}, {7, 8}), "hevc": (set(range(16, 24)), {32, 33, 34})}
WITH_NONREF = ("h264", "hevc", "mpeg4", "mpeg2video")  # codecs whose decoders can skip frames that no other refers to
PROGRESSIVE = (0, 1)  # FFmpeg's field orders "unknown" and "progressive"; with others a packet may hold half a frame


class Mark(NamedTuple):
    """One packet; times in ticks."""

    pts: int | None
    dts: int | None
    is_entry: bool


@dataclasses.dataclass(frozen=True)
class Index:
    """All packets of the stream, also hidden ones.  Their `pts` are distinct."""

    pts: Int64[np.ndarray, " P"]
    dts: Int64[np.ndarray, " P"]
    entries: Int64[np.ndarray, " E"]  # numbers of packets, ascending
    can_seek: bool  # else the only entry is the start of the file
    has_nonref: bool  # whether frames that no other refers to can be skipped
    area: int  # pixels of a frame

    @functools.cached_property
    def _by_time(self) -> Int64[np.ndarray, " P"]:
        return np.argsort(self.pts)

    def numbers(self, pts: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """The numbers of the packets with these `pts`; -1 for times that no packet has."""
        places = np.searchsorted(self.pts, pts, sorter=self._by_time).clip(max=len(self.pts) - 1)
        found = self._by_time[places]
        return np.where(self.pts[found] == pts, found, -1)


class Units:
    """Finds entries from a stream's undecoded packets, given in file order."""

    def __init__(self, codec_context):
        self.codec, self._seen = codec_context.codec.canonical_name, set()
        extradata = codec_context.extradata or b""
        place = {"h264": 4, "hevc": 21}.get(self.codec, 0)  # of the length field's size; 0: start codes instead
        self._width = (extradata[place] & 3) + 1 if len(extradata) > place and extradata[0] == 1 else 0
        self.are_whole = True  # in all packets so far; detects a hole in the file

    def is_entry(self, packet) -> bool:
        """Whether decoding may begin with this packet, the next one of the stream."""
        if self.codec not in UNITS:
            return packet.is_keyframe
        if not self._width:
            return False
        begins, sets = UNITS[self.codec]
        types = self._types(memoryview(packet))
        given = types & sets
        self._seen |= given  # sets that came mid-stream must be repeated at the entry
        return packet.is_keyframe and bool(types & begins) and given == self._seen

    def _types(self, data: memoryview) -> set[int]:
        """The types of a packet's NAL units, each of which follows its length."""
        at, types = 0, set()
        while at + self._width < len(data):
            length = int.from_bytes(data[at : at + self._width])
            head = data[at + self._width]
            types.add(head & 31 if self.codec == "h264" else head >> 1 & 63)
            at += self._width + length
            self.are_whole &= length > 0 and at <= len(data)
        return types


def index_of(marks: Sequence[Mark], units: Units, kind: str, codec_context) -> Index | None:
    """None if only decoding in order is right or finds all damage; `kind` is FFmpeg's name of the format."""
    codec = codec_context.codec.canonical_name
    pts = [mark.pts for mark in marks]
    is_known = codec in PLAIN_KEYS or codec in UNITS
    if (
        not units.are_whole
        or not is_known
        or None in pts
        or len(set(pts)) < len(pts)
        or codec_context.field_order not in PROGRESSIVE
    ):
        return None
    entries = [number for number, mark in enumerate(marks) if mark.is_entry]
    can_seek = any(name in kind for name in SEEKABLE) and bool(entries)
    dts = [mark.pts if mark.dts is None else mark.dts for mark in marks]
    has_nonref = codec in WITH_NONREF and (codec != "hevc" or _sublayers(codec_context.extradata) == 1)
    if not can_seek and not has_nonref:
        return None
    area = codec_context.width * codec_context.height
    return Index(np.array(pts), np.array(dts), np.array(entries if can_seek else [0]), can_seek, has_nonref, area)


def _sublayers(extradata: bytes | None) -> int:
    """HEVC's number of temporal layers; 0 if the file does not say.

    With a single layer, a frame that its own layer does not refer to is referred to by none.
    """
    return extradata[21] >> 3 & 7 if extradata and len(extradata) > 21 and extradata[0] == 1 else 0
