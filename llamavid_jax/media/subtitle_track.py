"""The subtitles in a video file, or in a file of subtitles of any kind that FFmpeg knows (.ass, .ssa, .sub, ...)."""

from pathlib import Path

from llamavid_jax.media.container import PLAYLISTS
from llamavid_jax.media.source import MediaError, local_file
from llamavid_jax.media.video import read_timeline

PICTURES = ("dvdsub", "pgssub", "dvbsub", "xsub")  # FFmpeg's names of subtitles that hold no text


def read_track(path: str | Path) -> list[tuple[float, str]]:
    """(end in seconds after the first frame, text with the marks of .ass) of the track that a player would show.

    That is the one marked as default, else the first one of text.  Raises MediaError for a file without one.
    """
    import av  # here, so that importing the package loads no video library

    file = local_file(path)
    try:
        with av.open(str(file), metadata_errors="replace", options={"protocol_whitelist": "file"}) as container:
            tracks = [track for track in container.streams.subtitles if track.codec_context is not None]
            texts = [track for track in tracks if track.codec_context.name not in PICTURES]
            if container.format.name in PLAYLISTS or not texts:
                held = "subtitles that are pictures" if tracks else "no subtitles"
                raise MediaError(f"{path} holds {held}; give them as text with --subtitles FILE.srt")
            track = next((one for one in texts if one.disposition & av.stream.Disposition.default), texts[0])
            video = container.streams.best("video")  # whose start FFmpeg may take from another stream
            start = int(read_timeline(path, lambda _: None).pts[0]) * video.time_base if video else 0
            found = []
            for packet in container.demux(track):
                if packet.pts is not None and packet.size:
                    # FFmpeg gives the last cue of a .lrc no length: it stands behind the frame that is shown then
                    end = float((packet.pts + max(packet.duration or 0, 1)) * packet.time_base - start)
                    texts = (part.dialogue for part in packet.decode() if hasattr(part, "dialogue"))
                    found += [(end, text.decode("utf-8", errors="replace")) for text in texts]
    except (av.FFmpegError, ValueError) as error:
        if isinstance(error, MediaError):
            raise
        raise MediaError(f"the subtitles in {path} cannot be read ({error}); save them as .srt in UTF-8") from None
    if not found:
        raise MediaError(f"the track of subtitles in {path} is empty; give them with --subtitles FILE.srt")
    return found
