"""The data types of an evaluation: an Item is a question, a Row its answer on disk, Scores are computed from rows.

    official folder ─ read ─▶ Items ─ answers.py ─▶ answers.jsonl (Rows) ─ score ─▶ Scores ─▶ result.json, submission/

The file of rows is all that scoring reads, so each row also carries its `reference`: everything that scoring needs.
"""

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

SHORT_ANSWER = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclasses.dataclass(frozen=True)
class Item:
    """One question.

    `text` follows the image in the user's turn; `question` is what the Q-Former reads; `prompt` is the question as the
    original's files write it.  With `media` None the question is text only.  `subtitles` is a file whose text is put
    between the video's frames.
    """

    id: str  # unique in its set
    text: str
    question: str
    prompt: str
    media: Path | str | None  # a file, or a data: URL
    is_video: bool
    reference: dict[str, Any]
    subtitles: Path | None = None
    subtitles_start: float = 0.0  # seconds in the subtitles' time at which the video starts
    duration: float = math.inf  # seconds of the video, if the set gives it; subtitles outside it are left out


Row = Mapping[
    str, Any
]  # id, index, prompt, text (None: never asked), frames, seconds, media, reference; error if broken


class Figure(NamedTuple):
    """A score, its standard error (None if unknown), and the number of questions it is computed from."""

    value: float
    error: float | None
    count: int


@dataclasses.dataclass
class Scores:
    """What scoring computes.

    `figures`: the set's scores, the one of the paper's table first.  `groups`: the same score for parts of the set.
    `items`: the score of each question by its id, for comparisons.  `files`: for the set's server or tool.
    `media`: the video of each item whose id is not that of its row.
    `counts`: other results of the set's tools, for result.json.  `details`: how each question was scored.
    """

    figures: dict[str, Figure]
    groups: dict[str, dict[str, Figure]] = dataclasses.field(default_factory=dict)
    items: dict[str, float] = dataclasses.field(default_factory=dict)
    files: dict[str, bytes] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    counts: dict[str, Any] = dataclasses.field(default_factory=dict)
    media: dict[str, Any] = dataclasses.field(default_factory=dict)
    details: dict[str, Any] = dataclasses.field(default_factory=dict)


def mean(values: Sequence[float], scale: float = 1.0, clusters: Sequence[Hashable] | None = None) -> Figure:
    """The mean and its standard error; values of one cluster (an image, a video) do not count as independent."""
    if not values:
        return Figure(math.nan, None, 0)
    return Figure(scale * (sum(values) / len(values)), error_of(shares(values), scale, clusters), len(values))


def shares(values: Sequence[float], names: Sequence[Any] | None = None) -> list[float]:
    """What each value adds to the mean's deviation: (value - mean) / count, over all values or those of its name."""
    names = [None] * len(values) if names is None else names
    sums, counts = defaultdict(float), Counter(names)
    for name, value in zip(names, values, strict=True):
        sums[name] += value
    return [(value - sums[name] / counts[name]) / counts[name] for name, value in zip(names, values, strict=True)]


def error_of(shares: Sequence[float], scale: float, clusters: Sequence[Hashable] | None = None) -> float | None:
    """A score's standard error, from each question's contribution to its deviation; None if there is only one cluster.

    A question without a cluster (None) is a cluster by itself.
    """
    sums: dict[Hashable, float] = defaultdict(float)
    for place, share in enumerate(shares):
        cluster = None if clusters is None else clusters[place]
        sums[(place,) if cluster is None else cluster] += share
    return scale * math.sqrt(sum(total**2 for total in sums.values())) if len(sums) > 1 else None


def by_group(
    names: Iterable[Any], values: Iterable[float], clusters: Iterable[Hashable], scale: float = 100.0
) -> dict[str, Figure]:
    """The mean of each group, sorted by the groups' names."""
    groups: dict[Any, tuple[list[float], list[Hashable]]] = defaultdict(lambda: ([], []))
    for name, value, cluster in zip(names, values, clusters, strict=True):
        groups[name][0].append(value)
        groups[name][1].append(cluster)
    ordered = sorted(groups, key=lambda name: (str(type(name)), name))
    return {str(name): mean(groups[name][0], scale, groups[name][1]) for name in ordered}


def average(
    parts: Collection[Figure], shares: Sequence[float], clusters: Sequence[Hashable], scale: float = 100.0
) -> Figure:
    """The mean of several scores.

    `shares` are each question's contributions to the deviation of its own score; clusters may span several scores, as
    one image may.
    """
    known = parts and all(part.error is not None for part in parts)
    error = error_of(shares, scale / len(parts), clusters) if known else None
    value = sum(part.value for part in parts) / len(parts) if parts else math.nan
    return Figure(value, error, sum(part.count for part in parts))


def without_reference(rows: Iterable[Row], known: Collection[Row]) -> list[str]:
    """A note about questions that were answered but cannot be scored."""
    lost = sum(row["text"] is not None for row in rows) - sum(row["text"] is not None for row in known)
    return [f"{lost} answers have no reference and are not counted: other annotations?"] if lost else []


def unique(names: Iterable[Any]) -> list[str]:
    """Unique ids from names: repeated names become "a", "a#2", "a#3"."""
    seen: dict[str, int] = defaultdict(int)
    ids = []
    for name in map(str, names):
        seen[name] += 1
        ids.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return ids


def lettered(options: Iterable[tuple[str, Any]]) -> str:
    """Options, one per line: "A. cat"."""
    return "\n".join(f"{letter}. {option}" for letter, option in options)
