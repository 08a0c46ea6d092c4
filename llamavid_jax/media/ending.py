"""Detects cut downloads and recordings before they are decoded: whether a media file ends where it says it does.

Checked are sizes of boxes, elements and tags (MP4, Matroska, AVI, WebP, WMV, FLV) and marks at the end (Ogg, GIF, PNG,
NUT, Motion JPEG).  MPEG-TS, MPEG-PS, Y4M and streams without a container do not mark their end, nor does a live
recording that is cut between two of its pieces: there a cut file is simply shorter.
"""

import re
import struct
from pathlib import Path
from typing import BinaryIO

TAIL = 2**17  # bytes; an Ogg page has half as many at most
MP4_BOXES = b"ftyp moov mdat moof mfra free skip wide sidx ssix styp uuid meta emsg prft udta".split()
# Matroska: EBML, Segment, SeekHead, Info, Tracks, Cluster, Cues, Tags, Chapters, Attachments; Void, CRC, Timestamp,
# SimpleBlock, BlockGroup, PrevSize, Position
ELEMENTS = bytes.fromhex(
    "1a45dfa3 18538067 114d9b74 1549a966 1654ae6b 1f43b675 1c53bb6b 1254c367 1043a770 1941a469 ec bf e7 a3 a0 ab a7"
)
LONG_ELEMENTS, SHORT_ELEMENTS = {ELEMENTS[i : i + 4] for i in range(0, 40, 4)}, set(ELEMENTS[40:])
ASF_HEADER = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
ASF_FILE_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
FLV_HEADER = b"FLV\1"
NUT_INDEX = bytes.fromhex("4e58dd672f23e64e")


def is_cut(path: Path, kind: str) -> bool:
    """`kind` is FFmpeg's name of the format.  Also False if the format does not mark its end."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if "mp4" in kind:
            return _boxes(file, size)[0] > size
        if "matroska" in kind:
            return _elements(file, size)[0] > size
        if kind in ("avi", "webp_pipe"):
            return _end_of_chunks(file, size) > size
        if kind == "asf":
            return _asf_size(file) > size
        if kind == "flv":
            file.seek(end := _end_of_tags(file, size))
            return end > size or 0 < len(file.read(15)) < 15  # part of a tag's header
        file.seek(max(0, size - TAIL))
        tail = file.read()
        if kind == "nut":  # the index says how far before the end it begins
            file.seek(max(0, size - int.from_bytes(tail[-12:-4])))
            return file.read(8) != NUT_INDEX
    if kind == "ogg":
        return not _ends_with_last_page(tail)
    if kind == "gif":
        return not tail.rstrip(b"\0").endswith(b"\0;")
    if kind == "apng":
        return b"IEND\xaeB`\x82" not in tail
    if kind == "mpjpeg":  # a boundary, which may follow the last image
        tail = re.sub(rb"--[^\r\n]*\s*\Z", b"", tail)
    return kind in ("mjpeg", "mpjpeg") and not tail.rstrip(b"\0\r\n").endswith(b"\xff\xd9")


def is_joined(path: Path, kind: str) -> bool:
    """Whether files are appended to the first that FFmpeg does not read; of Matroska it reads the second too."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if "mp4" in kind:
            return _boxes(file, size)[1].count(b"moov") > 1
        if "matroska" in kind:
            return _elements(file, size)[1] > 2
        if kind == "asf":
            file.seek(_asf_size(file) or size)
            return file.read(16) == ASF_HEADER
        if kind == "flv":
            file.seek(_end_of_tags(file, size))
            return file.read(4) == FLV_HEADER
    return False


def _boxes(file: BinaryIO, size: int) -> tuple[int, list[bytes]]:
    """Where the last box ends, and the names of all."""
    at, names = 0, []
    while at + 8 <= size:
        file.seek(at)
        head = file.read(16)
        length, name = struct.unpack(">I4s", head[:8])
        if name not in MP4_BOXES or length == 0:  # data after the last box; a box that extends to the end
            break
        names.append(name)
        at += max(8, int.from_bytes(head[8:]) if length == 1 else length)
    return at, names


def _end_of_chunks(file: BinaryIO, size: int) -> int:
    at = 0
    while at + 8 <= size:
        file.seek(at)
        name, length = struct.unpack("<4sI", file.read(8))
        if name != b"RIFF" or length == 2**32 - 1:  # data after the last chunk; a stream of unknown length
            break
        at += 8 + length
    return at


def _end_of_tags(file: BinaryIO, size: int) -> int:
    at = 13
    while at + 15 <= size:
        file.seek(at)
        head = file.read(4)
        if head == FLV_HEADER:
            break
        at += 11 + int.from_bytes(head[1:]) + 4
    return at


def _elements(file: BinaryIO, size: int) -> tuple[int, int]:
    """Where the last element ends, and the number of EBML headers.

    Enters elements of unknown length, such as a live recording's segment and clusters.
    """
    at, heads = 0, 0
    while at + 2 <= size:
        file.seek(at)
        head = file.read(12)
        width = 4 if head[:4] in LONG_ELEMENTS else 1
        width_of_length = 9 - head[width].bit_length() if len(head) > width else 9
        if (width == 1 and head[0] not in SHORT_ELEMENTS) or width_of_length > 8:  # data after the last element
            break
        heads += head[:4] == ELEMENTS[:4]
        unknown = (1 << 7 * width_of_length) - 1
        length = int.from_bytes(head[width : width + width_of_length]) & unknown
        at += width + width_of_length + (length if length != unknown else 0)
    return at, heads


def _asf_size(file: BinaryIO) -> int:
    """The file's size according to its header; 0 for a broadcast, which does not know it."""
    head = file.read(TAIL)
    at = head.find(ASF_FILE_PROPERTIES)
    known = at >= 0 and len(head) > at + 88 and not head[at + 88] & 1
    return int.from_bytes(head[at + 40 : at + 48], "little") if known else 0


def _ends_with_last_page(tail: bytes) -> bool:
    """Whether the last Ogg page is whole, and one of the last ones marked as the end of its stream."""
    at, ended = tail.find(b"OggS"), False
    while tail[at : at + 4] == b"OggS" and at + 27 <= len(tail):
        ended |= bool(tail[at + 5] & 4)
        lengths = tail[at + 27 : at + 27 + tail[at + 26]]
        at += 27 + len(lengths) + sum(lengths)
    return ended and at <= len(tail)
