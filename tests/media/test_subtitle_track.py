"""Subtitle tracks in video files, as FFmpeg writes them."""

from pathlib import Path

import av
import pytest
from clips import index_frame, write_clip

from llamavid_jax.media.source import MediaError
from llamavid_jax.media.subtitle_track import Said, _in_edits, read_track
from llamavid_jax.text.subtitles import cues_of_track, interleave

SRT = "1\n00:00:01,000 --> 00:00:02,500\n<i>Hi</i> there,\nyou\n\n2\n00:00:04,000 --> 00:00:05,000\nBye...\n"
ASS = """[Script Info]
ScriptType: v4.00+
[Events]
Format: Layer, Start, End, Style, Name, MarginL, MarginR, MarginV, Effect, Text
Comment: 0,0:00:00.00,0:00:09.00,Default,,0,0,0,,not said
Dialogue: 0,0:00:01.00,0:00:02.50,Default,Bob,0,0,0,,{\\i1}Hello{\\i0}, you\\Nthere
"""


def film(folder, *tracks: tuple[str, str], late: float = 0.0):
    """A clip of ten seconds that starts `late` seconds after 0, with a subtitle stream for each kind and content."""
    names = [write_clip(folder / "clip.mkv", [index_frame(i) for i in range(10)], times_ms=range(0, 10_000, 1000))]
    for number, (kind, content) in enumerate(tracks):
        names.append(folder / f"{number}.{kind}")
        names[-1].write_text(content)
    with av.open(str(folder / "film.mkv"), "w") as out:
        sources = [av.open(str(name)) for name in names]
        copies = [out.add_stream_from_template(source.streams[0]) for source in sources]
        for source, copy in zip(sources, copies, strict=True):
            for packet in source.demux():
                if packet.size:
                    packet.dts = packet.pts if packet.dts is None else packet.dts
                    shift = round(late / packet.time_base)
                    packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                    packet.stream = copy
                    out.mux(packet)
            source.close()
    return folder / "film.mkv"


@pytest.mark.parametrize("late", [0.0, 3.0, 3.3])
def test_the_first_track_of_text(tmp_path, late):
    """Times count from the first frame, however late it starts; the time 5.0 equals a frame's to the last bit."""
    found = read_track(film(tmp_path, ("srt", SRT), ("ass", ASS), late=late))
    assert [end for end, _ in found] == [2.5, 5.0]
    assert [text for _, text in found] == ["{\\i1}Hi{\\i0} there,\nyou", "Bye..."]


def test_of_a_trimmed_film_what_is_said_keeps_its_time():
    """`ffmpeg -ss 4.5 -c copy` of texts at 1-2, 4-6, 7.5-8.5 and 9 s: an edit list hides the first, and a part of the
    second.

    FFmpeg shows the third 1.5 s too early, with the length of another, and the frame of 4.6 s at 0.  (It also writes
    the last text as long as the film.)
    """
    trimmed = Path(__file__).with_name("trimmed_with_subtitles.mp4")
    assert read_track(trimmed) == [(1.4, "Half"), (3.9, "Whole"), (9.4, "Last")]


def test_texts_of_a_film_whose_end_is_shown_first():
    """Two edits: from 30 s on, where a text starts at 32 s, and from 5 s on, where one starts at 6 s."""
    said = [Said(300, 0, 1, "late", False), Said(60, 9, 2, "early", False)]  # FFmpeg's times and durations
    whole = [Said(10, -29, 1, "hidden", False), Said(60, -24, 1, "early", False), Said(300, 2, 2, "late", False)]
    assert [(one.pts, one.length, one.text) for one in _in_edits(said, whole)] == [(2, 2, "late"), (11, 1, "early")]


def test_a_file_of_its_own(tmp_path):
    (tmp_path / "film.ass").write_text(ASS)
    assert read_track(tmp_path / "film.ass") == [(2.5, "{\\i1}Hello{\\i0}, you\nthere")]


def test_the_last_line_of_a_song(tmp_path):
    """A .lrc gives start times only: a line ends where the next starts; the last one follows the frame of its start."""
    (tmp_path / "song.lrc").write_text("[00:01.00]one\n[00:03.00]two\n[00:10.00]bye\n")
    cues = cues_of_track(read_track(tmp_path / "song.lrc"))
    film = interleave([float(second) for second in range(13)], cues)
    assert film == "<image>" * 3 + "one" + "<image>" * 7 + "two" + "<image>bye" + "<image>" * 2


@pytest.mark.parametrize("content", [b"", b"[Script Info]\n[Events]\n", b"RIFF\0\0", b"\x89PNG"])
def test_files_that_are_refused(tmp_path, content):
    (tmp_path / "film.ass").write_bytes(content)
    with pytest.raises(MediaError, match=r"film.ass (is empty|cannot be read|holds no subtitles).*; (save|give|copy) "):
        read_track(tmp_path / "film.ass")


def test_a_video_without_subtitles(tmp_path):
    with pytest.raises(MediaError, match="holds no subtitles; give them as text"):
        read_track(film(tmp_path))
