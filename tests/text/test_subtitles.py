"""Subtitles: files as found in practice, and the original's recorded layout."""

import json

import pytest
from paths import GOLDEN

from llamavid_jax.text.conversation import ConversationError
from llamavid_jax.text.subtitles import Cue, cues_of_track, interleave, parse_subtitles, read_subtitles, with_times

CASES = {case["name"]: case for case in json.loads((GOLDEN / "movie" / "cases.json").read_text(encoding="utf-8"))}


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case["inputs"] is not None])
def test_recorded_layout(name):
    case = CASES[name]
    cues = [Cue(cue["end"], cue["text"]) for cue in case["subtitles"]]
    assert interleave(case["frame_times"], cues, as_original=True) == case["inputs"]
    if case["source"] == "srt":
        assert parse_subtitles(case["srt"], as_original=True) == cues


VTT = """WEBVTT - a film
X-TIMESTAMP-MAP=LOCAL:00:00:00.000

STYLE
::cue { color: lime }

NOTE an earlier version had
00:09.000

1
00:00.500 --> 00:02.000 align:start position:10%
<v Roger>First <i>line</i>
second&nbsp;line &amp; more

intro
01:00:02.000 --> 01:00:04.250
1984

00:05.000 --> 00:06.000

00:07.000 --> 00:08.000
<00:07.500>&lt;image&gt; <b>here</b>...
"""


def test_vtt():
    found = parse_subtitles(VTT)
    assert [cue.end for cue in found] == [2.0, 3604.25, 8.0]
    assert [cue.text.split() for cue in found] == [
        ["First", "line", "second", "line", "&", "more"],
        ["1984"],
        ["here..."],
    ]


def test_srt():
    """A cue needs text; text after a blank line belongs to it; a line of digits is text unless it numbers a cue."""
    text = (
        "\r\n7\r\n00:00:01,000 --> 00:00:02,000\r\n\r\n8\r\n0:0:3,5 --> 00:00:04.25 X1:0\r\n{\\an8}<i>Hi</i>  <font\r\n"
        "<im<image>age> 5 < 6\r\n\r\nbehind\r\n1984\r\n...\r\n"
    )
    as_there = "{\\an8}<i>Hi</i>  <font <im<image>age> 5 < 6 behind"
    assert parse_subtitles(text, as_original=True) == [Cue(4.25, as_there)]
    assert parse_subtitles(text) == [Cue(4.25, "Hi  <font <im age> 5 < 6 behind 1984 ...")]
    assert parse_subtitles("1\n00:00:01,000 --> 00:00:02,000\n1984") == [Cue(2.0, "1984")], "the last line is no number"
    assert parse_subtitles("no times\n1\n00:00:01,000 ->\n") == []


def test_what_is_said_before_the_first_frame_is_its():
    cues = [Cue(0.0, "Once..."), Cue(1.5, "then")]
    assert interleave([0.0, 1.0, 2.0], cues) == "<image>Once...<image>then<image>"
    assert interleave([0.0, 1.0, 2.0], cues, as_original=True) == "<image><image>then<image>Once..."


def test_the_marks_of_a_track_are_no_text():
    events = [(2.0, "{\\i1}Hi{\\r}, you\nthere..."), (3.0, "{\\an8\\p1}m 0 0 l 9 0{\\p0}"), (4.0, "a\\hb <image>")]
    assert cues_of_track(events) == [Cue(2.0, "Hi, you there..."), Cue(4.0, "a b")]


def test_no_text_takes_a_frames_place():
    cues = parse_subtitles("0:01.0 --> 0:02.0\n<im<i>age>\n")
    assert interleave([0.0, 1.0], cues).count("<image>") == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no subtitles"),
        (b"WEBVTT\n", "holds no subtitles"),
        (b"1\n00:00:01,000 --> 00:00:02,000\ncaf\xe9\n", "is not UTF-8 .byte 35.; save it"),
        (b"1\n00:00:01,000 --> 00:00:02,000\nHi\n\n2\n00:00:03 --> 00:00:04\nBye\n", "line 6 is '00:00:03 -"),
        (b"1\n00:00:01:000 --> 00:00:02:000\nHi\n", "line 2 is .*; write times as 00:00:01,000 --> 00:00:02,500"),
        (b"1\n-00:00:01,000 --> 00:00:02,000\nHi\n", "line 2 is"),
        (b"1\n00: 00: 01,000 --> 00: 00: 02,000\nHi\n", "line 2 is"),
        ("1\n0:01.0 --> 0:02.0\nÀ".encode("utf-16")[:-1], "is not UTF-16-.E .byte 42.; copy it"),
        (b"0:01.0 --> 0:02.0\na\n" * 2**20, "holds no subtitles"),
    ],
)
def test_files_that_are_refused(tmp_path, content, message):
    (tmp_path / "film.srt").write_bytes(content)
    for as_original in (False, True):
        with pytest.raises(ConversationError, match=rf"film\.srt,? {message}"):
            read_subtitles(tmp_path / "film.srt", as_original)


@pytest.mark.parametrize("name", ["nothing.srt", "", "a\0b", "~nobody-here/a.srt"])
def test_names_that_are_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConversationError, match="cannot be read"):
        read_subtitles(name)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "utf-16-be"])
def test_a_byte_order_mark(tmp_path, encoding):
    (tmp_path / "film.srt").write_bytes("\ufeff1\n00:00:00,000 --> 00:00:01,000\nÀ\n".encode(encoding))
    assert read_subtitles(str(tmp_path / "film.srt")) == [Cue(1.0, "À")]


def test_times_of_frames_and_minutes():
    """Rounded to the second, before the frames; a minute is shown once, even if a frame just before rounds up to it."""
    film = "<image>Hi.<image><image><image>"
    assert with_times(film, [0.0, 59.98, 61.0, 3723.4], "frame") == (
        "[0:00]<image>Hi.[1:00]<image>[1:01]<image>[1:02:03]<image>"
    )
    assert with_times(film, [0.0, 59.98, 61.0, 3723.4], "minute") == (
        "[0:00]<image>Hi.[1:00]<image><image>[1:02:03]<image>"
    )
    assert with_times(None, [0.2, 0.7], "frame") == "[0:00]<image>[0:01]<image>"
    assert with_times(film, [], None) == film and with_times(None, [], None) is None
