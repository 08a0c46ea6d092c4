"""The subtitles in a video file, or in a subtitle file of any format that FFmpeg knows (.ass, .ssa, .sub, ...)."""

from pathlib import Path
from typing import Any, NamedTuple

from llamavid_jax.media.container import PLAYLISTS
from llamavid_jax.media.source import MediaError, local_file
from llamavid_jax.media.video import read_timeline

PICTURES = ("dvdsub", "pgssub", "dvbsub", "xsub")  # FFmpeg's names of subtitle formats that hold images


class Said(NamedTuple):
    """One subtitle of a track; times in ticks."""

    place: int  # byte offset in the file
    pts: int
    length: int
    text: str
    is_hidden: bool  # by an edit list, at least partly


def read_track(path: str | Path) -> list[tuple[float, str]]:
    """(end in seconds after the first frame, text with .ass markup) of the track that a player would show.

    That is the track marked as default, else the first text track.  Raises MediaError for a file without one.
    """
    import av  # here, so that importing the package loads no video library

    file = local_file(path)
    try:
        with _opened(file) as container:
            tracks = [track for track in container.streams.subtitles if track.codec_context is not None]
            texts = [track for track in tracks if track.codec_context.name not in PICTURES]
            if container.format.name in PLAYLISTS or not texts:
                held = "subtitles that are pictures" if tracks else "no subtitles"
                raise MediaError(f"{path} holds {held}; give them as text with --subtitles FILE.srt")
            track = next((one for one in texts if one.disposition & av.stream.Disposition.default), texts[0])
            video = container.streams.best("video")  # whose start FFmpeg may take from another stream
            has_edits = "mp4" in container.format.name
            late = _late(file, video.index) if has_edits and video else 0
            start = (int(read_timeline(path, lambda _: None).pts[0]) + late) * video.time_base if video else 0
            said, tick, number = _said(container, track), track.time_base, track.index
        if has_edits:
            with _opened(file, advanced_editlist="0") as container:
                said = _in_edits(said, _said(container, container.streams[number]))
        found = [(float((one.pts + one.length) * tick - start), one.text) for one in said]
    except (av.FFmpegError, ValueError) as error:
        if isinstance(error, MediaError):
            raise
        raise MediaError(f"the subtitles in {path} cannot be read ({error}); save them as .srt in UTF-8") from None
    if not found:
        raise MediaError(f"the track of subtitles in {path} is empty; give them with --subtitles FILE.srt")
    return found


def _opened(file: Path, **options: str) -> Any:
    import av

    return av.open(str(file), metadata_errors="replace", options={"protocol_whitelist": "file"} | options)


def _said(container: Any, track: Any) -> list[Said]:
    found = []
    for packet in container.demux(track):
        if packet.pts is not None and packet.size:
            # FFmpeg gives the last cue of a .lrc no length; 1 tick places it after the frame shown then
            own = packet.pos, packet.pts, max(packet.duration or 0, 1)
            texts = (part.dialogue for part in packet.decode() if hasattr(part, "dialogue"))
            found += [Said(*own, text.decode("utf-8", errors="replace"), packet.is_discard) for text in texts]
    return found


def _late(file: Path, number: int) -> int:
    """Ticks from the beginning of the stream's edit list to the first frame that it shows, which FFmpeg drops."""

    def shown(place: int | None = None, **options: str) -> tuple[int, int]:
        """Offset and time of the first packet shown, or of the packet at offset `place`."""
        with _opened(file, **options) as container:
            packets = (one for one in container.demux(container.streams[number]) if one.size and one.pts is not None)
            wanted = (one for one in packets if (not one.is_discard if place is None else one.pos == place))
            return next(((one.pos, one.pts) for one in wanted), (0, 0))

    place, pts = shown()
    return shown(place, advanced_editlist="0")[1] - pts


def _in_edits(said: list[Said], whole: list[Said]) -> list[Said]:
    """The texts of the `whole` track that an edit list shows.

    FFmpeg returns these as `said`, but counts their times from the first text, not from the beginning of the edit list,
    and mixes up their lengths.  The `whole` track has both right, except for times after a second edit.
    """
    own = {one.place: one for one in whole}
    first = min((one for one in said if not one.is_hidden), key=lambda one: one.pts, default=None)
    late = own.get(first.place, first).pts - first.pts if first else 0
    found = []
    for one in said:
        pts, length = own.get(one.place, one)[1:3]
        if not one.is_hidden:
            found.append(one._replace(pts=one.pts + late, length=length))
        elif pts + length > 0:  # partly shown
            found.append(one._replace(pts=pts, length=length))
    return found
