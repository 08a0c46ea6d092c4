"""One sample of a training set, as it stands in a JSON list or in a shard."""

import dataclasses

from llamavid_jax.errors import InputError


class DataError(InputError):
    """Training data that cannot be used: names the file or the record, what is wrong and what to do."""


@dataclasses.dataclass(frozen=True)
class Record:
    """One sample before it is tokenised or decoded.

    `media` is the path of its medium, not yet looked up on the disk; with `data`, the encoded file itself, its name.
    """

    id: str
    conversations: list
    media: str | None
    kind: str  # "text", "image", "video" or "features"
    data: bytes | None = None
