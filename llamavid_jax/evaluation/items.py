"""What the two halves of an evaluation are about: an Item is asked, a Row is its answer on disk, Scores come of rows.

    official folder ─ read ─▶ Items ─ answers.py ─▶ answers.jsonl (Rows) ─ score ─▶ Scores ─▶ result.json, submission/

The halves meet in the file of rows alone, so each row carries all that scoring it takes: its `reference`.
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

    `text` stands in the user's turn behind the picture; `question` is what the Q-Former reads; `prompt` is how the
    original's files write the question down.  `media` None asks in words alone.  `subtitles`, a file, make the video a
    film with what is said.
    """

    id: str  # unique in its set
    text: str
    question: str
    prompt: str
    media: Path | str | None  # a file, or a data: URL
    is_video: bool
    reference: dict[str, Any]
    subtitles: Path | None = None
    subtitles_start: float = 0.0  # seconds of the subtitles' own clock at which the video begins
    duration: float = math.inf  # seconds of the video, where the set says so: what is said outside it is left out


Row = Mapping[
    str, Any
]  # id, index, prompt, text (None: never asked), frames, seconds, media, reference; error, where one


class Figure(NamedTuple):
    """A number of a table, its standard error (None where there is none) and the questions behind it."""

    value: float
    error: float | None
    count: int


@dataclasses.dataclass
class Scores:
    """`figures`: the set's numbers, that of the paper's table first.  `groups`: the same number for parts of the set.

    `items`: the score of each question by its id, for comparisons.  `files`: what the set's server or tool takes.
    `media`: the video of each item that goes by another id than its row.
    `counts`: what else the set's tools say, for result.json; `details`: what scoring found out about each question.
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
    """The mean and its standard error; values of one cluster (a picture, a video) are not taken for independent."""
    if not values:
        return Figure(math.nan, None, 0)
    return Figure(scale * (sum(values) / len(values)), error_of(shares(values), scale, clusters), len(values))


def shares(values: Sequence[float], names: Sequence[Any] | None = None) -> list[float]:
    """What each value adds to the deviation of the mean: of all, or of those of its name."""
    names = [None] * len(values) if names is None else names
    sums, counts = defaultdict(float), Counter(names)
    for name, value in zip(names, values, strict=True):
        sums[name] += value
    return [(value - sums[name] / counts[name]) / counts[name] for name, value in zip(names, values, strict=True)]


def error_of(shares: Sequence[float], scale: float, clusters: Sequence[Hashable] | None = None) -> float | None:
    """A figure's standard error, by what each question adds to its deviation; None where all are of one cluster.

    A question whose cluster is None is one of its own.
    """
    sums: dict[Hashable, float] = defaultdict(float)
    for place, share in enumerate(shares):
        cluster = None if clusters is None else clusters[place]
        sums[(place,) if cluster is None else cluster] += share
    return scale * math.sqrt(sum(total**2 for total in sums.values())) if len(sums) > 1 else None


def by_group(
    names: Iterable[Any], values: Iterable[float], clusters: Iterable[Hashable], scale: float = 100.0
) -> dict[str, Figure]:
    """The mean of each group, in the groups' order."""
    groups: dict[Any, tuple[list[float], list[Hashable]]] = defaultdict(lambda: ([], []))
    for name, value, cluster in zip(names, values, clusters, strict=True):
        groups[name][0].append(value)
        groups[name][1].append(cluster)
    ordered = sorted(groups, key=lambda name: (str(type(name)), name))
    return {str(name): mean(groups[name][0], scale, groups[name][1]) for name in ordered}


def average(
    parts: Collection[Figure], shares: Sequence[float], clusters: Sequence[Hashable], scale: float = 100.0
) -> Figure:
    """The mean of several figures, by what each question adds to the deviation of its own: a picture may be in
    several of them."""
    known = parts and all(part.error is not None for part in parts)
    error = error_of(shares, scale / len(parts), clusters) if known else None
    value = sum(part.value for part in parts) / len(parts) if parts else math.nan
    return Figure(value, error, sum(part.count for part in parts))


def without_reference(rows: Iterable[Row], known: Collection[Row]) -> list[str]:
    """A note about questions that were answered, and are counted nowhere."""
    lost = sum(row["text"] is not None for row in rows) - sum(row["text"] is not None for row in known)
    return [f"{lost} answers have no reference and are not counted: other annotations?"] if lost else []


def unique(names: Iterable[Any]) -> list[str]:
    """The names as ids: "a", "a#2", "a#3" where one comes again."""
    seen: dict[str, int] = defaultdict(int)
    ids = []
    for name in map(str, names):
        seen[name] += 1
        ids.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return ids


def lettered(options: Iterable[tuple[str, Any]]) -> str:
    """Options on a line each: "A. cat"."""
    return "\n".join(f"{letter}. {option}" for letter, option in options)
