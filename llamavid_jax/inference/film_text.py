"""The subtitles of a video: from a file, from its own track or from its sound."""

from pathlib import Path

from llamavid_jax.media.speech import read_speech
from llamavid_jax.media.subtitle_track import read_track
from llamavid_jax.text.subtitles import Cue, cues_of_track, read_subtitles


def film_subtitles(given: str, video: str | Path, as_original: bool = False) -> list[Cue]:
    """The subtitles of `video`: from the file `given`, or from its own track if that is "auto".

    Raises InputErrors.
    """
    if given != "auto" and Path(given).suffix.lower() in (".srt", ".vtt", ""):
        return read_subtitles(given, as_original)
    return cues_of_track(read_track(video if given == "auto" else given))


def film_speech(video: str | Path, model: str = "small") -> list[Cue]:
    """Subtitles of `video` transcribed from its sound by faster-whisper's `model`, a folder or a name.

    Raises InputErrors.
    """
    return cues_of_track(read_speech(video, model))
