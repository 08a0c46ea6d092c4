"""Subtitles of a video -> the text of a movie: one `<image>` per frame, and the subtitles between them.

    .srt or .vtt, or a video's track -> cues (end in seconds, text) ─┐
    times of the sampled frames, in seconds ─────────────────────────┴─> "<image>Hello.<image><image>Who goes?"

The layout is the original's: a text follows the last frame before its end, but never precedes the text before it;
several texts of one frame are joined by a space, and so are the lines of a cue.

Deviations: a text that ends before the first frame follows that frame, not the last one.  Tags, such as those for
italics, are deleted, and so is `<image>`, which would count as a frame; `...` stays.  The cues of a .srt file begin at
their times, not at their numbers.  `as_original` handles these as the original does.  With times, "[0:59]" or
"[1:02:03]" precedes each frame, or the first one of each minute.
"""

import codecs
import html
import itertools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from llamavid_jax.files import find
from llamavid_jax.text.conversation import IMAGE, ConversationError

CLOCK = r"(?:(\d+):)?(\d{1,2}):(\d{1,2})[.,](\d{1,6})"
TIMING = re.compile(rf"\s*{CLOCK}\s*-->\s*{CLOCK}(?:\s|$)")
MEANT = re.compile(r"[\s\d:.,-]*\d[\s\d:.,-]*-->[\s-]*\d")  # a malformed line of times: it would be read as words
SRT_TAG = re.compile(r"</?(?:i|b|u|s|font)\b[^<>]*>|\{\\[^{}]*\}", re.IGNORECASE)
ASS_DRAWING = re.compile(r"\{[^{}]*\\p[1-9][^{}]*\}.*?(?:\{[^{}]*\\p0[^{}]*\}|$)", re.DOTALL)
ASS_TAG = re.compile(r"\{[^{}]*\}")
VTT_TAG = re.compile(r"<[^<>]*>")
TIMES = ("frame", "minute")  # what the text may give the time of
MAX_BYTES = 16 * 2**20  # those of a feature film take 100 kB


class Cue(NamedTuple):
    """A subtitle, and its `end` in seconds."""

    end: float
    text: str


def read_subtitles(path: str | Path, as_original: bool = False) -> list[Cue]:
    """The cues of a .srt or .vtt file, in file order.  Raises ConversationError."""
    return parse_subtitles(subtitle_text(path, as_original), as_original)


def subtitle_text(path: str | Path, as_original: bool = False) -> str:
    """The text of a .srt or .vtt file.  Raises ConversationError if it cannot be read or has no cues."""
    try:
        file = find(path)
        if file.exists() and not file.is_file():
            raise OSError("no regular file")
        with file.open("rb") as opened:
            content = opened.read(MAX_BYTES + 1)
        encoding = "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
        text = content.decode(encoding) if len(content) <= MAX_BYTES else ""
        cues = parse_subtitles(text, as_original)
    except UnicodeDecodeError as error:
        remedy = "copy it again" if encoding == "utf-16" else "save it as UTF-8, such as with: iconv -f latin1 -t utf-8"
        raise ConversationError(f"{path} is not {error.encoding.upper()} (byte {error.start}); {remedy}") from None
    except ConversationError as error:
        raise ConversationError(f"{path}, {error}") from None
    except (OSError, ValueError, RuntimeError) as error:  # such as a NUL in the name, or no home folder for ~
        raise ConversationError(f"{str(path)!r} cannot be read ({error}); check its name and permissions") from None
    if not cues:
        raise ConversationError(f"{path} holds no subtitles, such as 00:01,000 --> 00:02,500; give a .srt or .vtt file")
    return text


def parse_subtitles(text: str, as_original: bool = False) -> list[Cue]:
    """The cues of a text: a .vtt if it begins with WEBVTT, else a .srt.

    A cue of a .vtt ends at a blank line, one of a .srt at the next cue's times.  Raises ConversationError for malformed
    times.
    """
    is_vtt, cues, end, lines = text.startswith("WEBVTT"), [], None, []
    if as_original and not is_vtt:
        return _cues_by_number(text)
    followed = itertools.pairwise([*text.splitlines(), "", "0:00.0 --> 0:00.0", ""])
    for number, (line, after) in enumerate(followed, 1):
        timing = _timing(number, line)
        words = html.unescape(VTT_TAG.sub("", line)) if is_vtt else SRT_TAG.sub("", line)
        words = words.replace(IMAGE, " ").strip()
        is_number = not is_vtt and words.isdigit() and TIMING.match(after)
        if timing or (is_vtt and not line.strip()):
            cues += [Cue(end, " ".join(lines))] if lines else []
            end, lines = timing and _end(timing), []
        elif end is not None and words and not is_number:
            lines.append(words)
    return cues


def _cues_by_number(text: str) -> list[Cue]:
    """The cues of a .srt, as in the original: a line of digits begins one, and one without text or times continues."""
    cues, end, lines = [], None, []
    for number, line in enumerate([*re.split(r"\r\n?|\n", text), "0"], 1):
        words = line.replace("\0", "").strip().replace("...", "").strip()
        timing = _timing(number, words) if " --> " in words else None
        if words.isdigit():
            if lines and end is not None:
                cues.append(Cue(end, " ".join(lines)))
                end, lines = None, []
        elif timing:
            end = _end(timing)
        elif words:
            lines.append(words)
    return cues


def cues_of_track(events: Iterable[tuple[float, str]]) -> list[Cue]:
    """The cues of a video's track, from (end in seconds, text with the markup of .ass files)."""
    cues = []
    for end, text in events:
        words = ASS_TAG.sub("", ASS_DRAWING.sub("", text)).replace("\\h", " ").replace(IMAGE, " ").split("\n")
        if words := " ".join(filter(None, map(str.strip, words))):
            cues.append(Cue(end, words))
    return cues


def interleave(times: Iterable[float], cues: Iterable[Cue], as_original: bool = False) -> str:
    """`<image>` for each frame of `times`, followed by the texts that belong to the frame."""
    times = list(times)
    texts: Sequence[list[str]] = [[] for _ in times]
    reached = 0
    for end, text in cues:
        while reached < len(times) and times[reached] < end:
            reached += 1
        texts[reached - 1 if reached or as_original else 0].append(text)
    return "".join(IMAGE + " ".join(own) for own in texts)


def with_times(film: str | None, times: Iterable[float], of: str | None) -> str | None:
    """`film` with the time before each frame, or before the first one in each minute (`of`, one of TIMES or None).

    `film` None means frames without text.
    """
    if of is None:
        return film
    times = [int(time + 0.5) for time in times]  # the frame shown at 60 s may have the time 59.98
    before, *texts = (film or IMAGE * len(times)).split(IMAGE)
    minutes = [None, *(time // 60 for time in times)]
    marks = [
        clock(time) if of == "frame" or time // 60 != last else "" for time, last in zip(times, minutes, strict=False)
    ]
    return before + "".join(mark + IMAGE + text for mark, text in zip(marks, texts, strict=True))


def clock(time: int) -> str:
    """The mark of a time in seconds: "[0:59]" or "[1:02:03]"."""
    minutes, seconds = divmod(time, 60)
    return f"[{minutes}:{seconds:02d}]" if minutes < 60 else f"[{minutes // 60}:{minutes % 60:02d}:{seconds:02d}]"


def _timing(number: int, line: str) -> re.Match | None:
    timing = TIMING.match(line)
    if not timing and MEANT.match(line):
        raise ConversationError(f"line {number} is {line[:60]!r}; write times as 00:00:01,000 --> 00:00:02,500")
    return timing


def _end(timing: re.Match) -> float:
    """The end in seconds, rounded once: a frame may have exactly that time."""
    hours, minutes, seconds, fraction = timing.groups()[4:]
    whole = 3600 * int(hours or 0) + 60 * int(minutes) + int(seconds)
    return (1000000 * whole + int(fraction.ljust(6, "0"))) / 1000000
