"""One sample of a training set, as it stands in a JSON list or in a shard."""

import dataclasses

from llamavid_jax.errors import InputError


class DataError(InputError):
    """Training data that cannot be used: names the file or the record, what is wrong and what to do."""


def as_utf8(text: str) -> str:
    """`text` with what UTF-8 cannot hold written out: half a surrogate pair, a byte of a file name in another code."""
    return text.encode(errors="backslashreplace").decode()


@dataclasses.dataclass(frozen=True)
class Record:
    """One sample before it is tokenised or decoded.

    `media` is the path of its media file, not yet looked up; with `data`, the encoded file itself, its name.
    `subtitles` is the path of a film's .srt or .vtt file; with `data`, the text of that file.  `times`: whether the
    text says the time of each "frame" or "minute".
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
        """Whether text may stand between its frames."""
        return self.kind == "features" or self.subtitles is not None or self.times is not None
