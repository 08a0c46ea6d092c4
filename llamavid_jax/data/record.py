"""One sample of a training set, from a JSON list or a shard."""

import dataclasses

from llamavid_jax.errors import InputError


class DataError(InputError):
    """Training data that cannot be used; the message names the file or record, the problem and the remedy."""


def as_utf8(text: str) -> str:
    """`text` with escapes for what UTF-8 cannot hold: half a surrogate pair, undecodable bytes of a file name."""
    return text.encode(errors="backslashreplace").decode()


@dataclasses.dataclass(frozen=True)
class Record:
    """One sample before it is tokenised or decoded.

    `media` is the path of its media file, not yet looked up, or, if `data` holds the encoded file itself, its name.
    `subtitles` is the path of a video's .srt or .vtt file or, with `data`, the text of that file.  `times`: whether the
    text gives the time of each "frame" or "minute".
    """

    id: str
    conversations: list
    media: str | None
    kind: str  # "text", "image", "video" or "features"
    data: bytes | None = None
    subtitles: str | None = None
    times: str | None = None

    @property
    def is_film(self) -> bool:
        """Whether the record may have text between its frames."""
        return self.kind == "features" or self.subtitles is not None or self.times is not None
