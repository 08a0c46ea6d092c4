"""Which samples share a row and which rows a batch: sizes -> one epoch's batches.  NumPy; the same on every process.

Every row of a batch has the shape of one bucket (`RowShape`), so that all processes run the same compiled step.
Packing fills rows by first fit, largest first, over windows of the shuffled samples.  Images and videos open rows of
the smallest bucket that holds them; texts fill the remaining room and then open rows themselves.  Without packing a row
is one sample, and the buckets do what the original's sampler does by length and modality: rows of a batch cost the
same.

Unlike the original: lengths are tokens, not words; one modality alone will do; a text takes the cheapest bucket that
holds it, even one for images, as its row costs no more there; rows of the last, incomplete batch of a bucket may join
those of a larger bucket.  The last batches are filled up with empty rows, so that every sample is seen once an epoch.
"""

import hashlib
import threading
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from llamavid_jax.data.sizes import BROKEN, KINDS, TEXT_ONLY, Sizes
from llamavid_jax.errors import InputError
from llamavid_jax.shapes import RowShape

FRAME_TOKENS = 32  # a frame's cost in the vision tower, in tokens of the 7B model, about; orders buckets
WINDOW = 4096  # samples that are packed together, largest first
CARRIED = 512  # rows with room left that stay open for the next window
_PLANNING = threading.RLock()  # one thread plans an epoch, others wait for it


class PlannedBatch(NamedTuple):
    """Rows of bucket `shape_index`, each a list of its samples, [] for an empty row.

    `kind` is that of the rows' frames, "pixels" or "features"; "text" in buckets without frames.
    """

    shape_index: int
    kind: str
    rows: list[list[int]]


class _Row(NamedTuple):
    shape_index: int
    kind: int
    samples: list[int]


def fit(
    sizes: Sizes, shapes: Sequence[RowShape], tokens_per_frame: int, shares: int = 1, packing: bool = False
) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, "4 N"], Int[np.ndarray, " N"]]:
    """Each sample's bucket, the (tokens, frames, pairs, questions) it takes there, and 1 if it is cut to fit, else 0.

    The bucket is the one that keeps most of the sample: one that holds it all, or if none does, one with room for its
    text, and of these the one with most pairs.  Ties go to the cheapest bucket; with `packing` to the one where the
    sample's part of the row costs least, so that images open rows that several can share.  `shares`: chips that hold a
    row's frames.  Raises InputError if there are frames but no bucket has room for any.
    """
    home, best = np.full((2, len(sizes.kind)), -1, np.int64)
    price = np.full(len(sizes.kind), np.inf)
    taken = np.zeros((4, len(sizes.kind)), np.int32)
    for kind in np.unique(sizes.kind[sizes.kind != BROKEN]):
        of_kind = sizes.kind == kind
        fitting = [i for i, shape in enumerate(shapes) if kind == TEXT_ONLY or shape.frames]
        if not fitting:
            raise InputError(
                f"{of_kind.sum()} samples have {KINDS[kind]} but no bucket has frames; add one to data.buckets"
            )
        for i in sorted(fitting, key=lambda i: _cost(shapes[i]), reverse=True):  # of ties the last one wins
            kept = _kept(sizes, shapes[i], tokens_per_frame, shares)
            has_text = kept[0] <= shapes[i].tokens
            kept[0] = np.minimum(kept[0], shapes[i].tokens)
            score = (has_text.astype(np.int64) << 62) + (kept[2].astype(np.int64) << 32) + kept[0]
            part = (kept / np.maximum(_room(shapes[i]), 1)[:, None]).max(0) if packing else 1
            cost = _cost(shapes[i])[0] * part
            better = of_kind & ((score > best) | ((score == best) & (cost <= price)))
            home[better], best[better], taken[:, better] = i, score[better], kept[:, better]
            price = np.where(better, cost, price)
    need = np.stack([sizes.tokens, sizes.frames, sizes.frames * sizes.questions, sizes.questions])
    return home, taken, ((taken < need).any(0) & (sizes.kind != BROKEN)).astype(np.int8)


def _kept(sizes: Sizes, shape: RowShape, tokens_per_frame: int, shares: int) -> np.ndarray:
    """The (tokens, frames, pairs, questions) of each sample in a row of `shape`; the tokens may be more than it has.

    Frames are cut before text: a long video keeps its question and its answer, and loses frames, with their times.
    """
    asked = np.minimum(sizes.questions, min(shape.questions, shape.pairs // shares))
    room = shape.pairs // shares // np.maximum(asked, 1) * shares
    frames = np.minimum(np.minimum(sizes.frames, shape.frames), room)
    each = sizes.questions * tokens_per_frame + sizes.marks // np.maximum(sizes.frames, 1)
    text = sizes.tokens - sizes.frames * each
    spared = np.maximum((shape.tokens - text) // np.maximum(each, 1), 1)
    frames = np.where(text < shape.tokens, np.minimum(frames, spared), frames)
    tokens = sizes.tokens - (sizes.frames - frames) * each
    return np.stack([tokens, frames, frames * asked, asked])


def plan_epoch(
    sizes: Sizes,
    shapes: Sequence[RowShape],
    batch_size: int,
    tokens_per_frame: int,
    seed: int,
    epoch: int,
    packing: bool,
    shuffle: bool = True,
    shares: int = 1,
) -> list[PlannedBatch]:
    """The batches of one epoch, `batch_size` rows each; every sample that is not broken is in exactly one row.

    The order depends on `seed` and `epoch` alone; without `shuffle` samples keep their order as far as buckets allow.
    `tokens_per_frame`: visual tokens of a frame read with one question; `shares`: chips that hold a row's frames, an
    even share of each sample's.  Raises InputError as `fit` does.
    """
    home, need, _ = fit(sizes, shapes, tokens_per_frame, shares, packing)
    need[1] = -(-need[1] // shares) * shares
    need[2] = need[1] * need[3]
    random = np.random.default_rng([seed, epoch])
    samples = np.flatnonzero(sizes.kind != BROKEN)
    if shuffle:
        samples = random.permutation(samples)
    if packing:
        rows = _pack(samples, home, need, sizes.kind, shapes)
    else:
        media = _media_kind(sizes.kind)
        own = zip(samples.tolist(), home[samples].tolist(), sizes.kind[samples].tolist(), strict=True)
        rows = [_Row(bucket, _row_kind(kind, shapes[bucket], media), [i]) for i, bucket, kind in own]

    groups = defaultdict(list)
    for row in rows:
        groups[row.shape_index, row.kind].append(row.samples)
    groups = dict(sorted(groups.items(), key=lambda item: (_cost(shapes[item[0][0]]), item[0])))
    if shuffle:
        for group in groups.values():
            random.shuffle(group)
    _merge_remainders(groups, shapes, batch_size)
    batches = [
        PlannedBatch(shape_index, KINDS[kind], (group[start : start + batch_size] + [[]] * batch_size)[:batch_size])
        for (shape_index, kind), group in groups.items()
        for start in range(0, len(group), batch_size)
    ]
    if shuffle:
        random.shuffle(batches)
    return batches


def _pack(
    samples: np.ndarray, home: np.ndarray, need: np.ndarray, kind: np.ndarray, shapes: Sequence[RowShape]
) -> list[_Row]:
    """First fit over the open rows.  A row takes frames of one kind only, and any texts."""
    rank = np.argsort(np.argsort([_cost(shape)[0] for shape in shapes], kind="stable"))
    limit = np.stack([_room(shape) for shape in shapes], 1)
    media = _media_kind(kind)
    done: list[_Row] = []
    rows: list[_Row] = []  # open, oldest first
    room = np.zeros((4, CARRIED + WINDOW), np.int32)
    row_kind = np.zeros(CARRIED + WINDOW, np.int8)
    for start in range(0, len(samples), WINDOW):
        window = samples[start : start + WINDOW]
        share = (need[:, window] / np.maximum(limit[:, home[window]], 1)).max(0)
        window = window[np.lexsort((-share, -rank[home[window]], kind[window] == TEXT_ONLY))]
        columns = window.tolist(), need[:, window].T, home[window].tolist(), kind[window].tolist()
        for i, own, bucket, own_kind in zip(*columns, strict=True):
            count = len(rows)
            fits = room[0, :count] >= own[0]
            if own_kind != TEXT_ONLY:
                fits &= (room[1, :count] >= own[1]) & (room[2, :count] >= own[2]) & (room[3, :count] >= own[3])
                fits &= row_kind[:count] == own_kind
            place = int(fits.argmax()) if count else 0
            if not count or not fits[place]:
                place = count
                rows.append(_Row(bucket, _row_kind(own_kind, shapes[bucket], media), []))
                room[:, place], row_kind[place] = limit[:, bucket], rows[place].kind
            rows[place].samples.append(i)
            room[:, place] -= own
        # a row with less than a sixteenth left counts as full; of the others the newest have the most room
        size = limit[0, [row.shape_index for row in rows]]
        kept = np.flatnonzero(room[0, : len(rows)] * 16 >= size)[-CARRIED:]
        done += [rows[i] for i in np.setdiff1d(np.arange(len(rows)), kept)]
        room[:, : len(kept)], row_kind[: len(kept)] = room[:, kept], row_kind[kept]
        rows = [rows[i] for i in kept]
    return done + rows


def _merge_remainders(groups: dict[tuple[int, int], list], shapes: Sequence[RowShape], batch_size: int) -> None:
    """Moves a group's last, incomplete batch into that of a larger bucket if all its rows fit: one batch fewer."""
    for (small, kind), group in groups.items():
        rest = len(group) % batch_size
        for (large, other), target in groups.items():
            free = -len(target) % batch_size
            holds = (_room(shapes[small]) <= _room(shapes[large])).all() and kind in (other, TEXT_ONLY)
            if target is not group and holds and 0 < rest <= free:
                target += group[-rest:]
                del group[-rest:]
                break


def _room(shape: RowShape) -> np.ndarray:
    return np.array([shape.tokens, shape.frames, shape.pairs, shape.questions], np.int32)


def _cost(shape: RowShape) -> tuple[int, int, int]:
    return shape.tokens + FRAME_TOKENS * shape.frames, shape.pairs, shape.questions


def _media_kind(kind: np.ndarray) -> int:
    """The kind of frames that most samples have, pixels if none has any."""
    return 1 + int(np.bincount(kind, minlength=len(KINDS))[1:BROKEN].argmax())


def _row_kind(kind: int, shape: RowShape, media: int) -> int:
    """A row of text in a bucket with frames gets the usual kind of frames: one program fewer to compile."""
    return media if kind == TEXT_ONLY and shape.frames else kind


class Schedule:
    """The batches of all epochs, one after another: `schedule[step]`.  An epoch is planned when it is first needed."""

    def __init__(
        self,
        sizes: Sizes,
        shapes: Sequence[RowShape],
        batch_size: int,
        tokens_per_frame: int,
        seed: int,
        packing: bool,
        shuffle: bool = True,
        shares: int = 1,
    ):
        if (sizes.kind == BROKEN).all():
            raise InputError(f"none of the {len(sizes.kind)} samples can be read; check the data's path and media")
        self.sizes, self.shapes, self.tokens_per_frame = sizes, shapes, tokens_per_frame
        self._settings = {"seed": seed, "packing": packing, "shuffle": shuffle, "batch_size": batch_size}
        places = fit(sizes, shapes, tokens_per_frame, shares, packing)
        settings = repr((sorted(self._settings.items()), list(shapes), tokens_per_frame, shares if packing else "any"))
        parts = settings.encode(), sizes.fingerprint(), *(array.tobytes() for array in places)
        self._fingerprint = hashlib.sha256(b"".join(parts)).hexdigest()
        self._settings["shares"] = shares
        self._plans: dict[int, list[PlannedBatch]] = {}  # at most two, for the epochs on either side of a boundary
        self._starts = [0]  # first step of each epoch known so far

    def epoch(self, epoch: int) -> list[PlannedBatch]:
        """The batches of one epoch."""
        with _PLANNING:
            if epoch not in self._plans:
                while len(self._plans) > 1:
                    del self._plans[max(self._plans, key=lambda known: abs(known - epoch))]
                self._plans[epoch] = plan_epoch(
                    self.sizes, self.shapes, tokens_per_frame=self.tokens_per_frame, epoch=epoch, **self._settings
                )
            return self._plans[epoch]

    def steps(self, epochs: int) -> int:
        """Number of steps of so many epochs; with packing, epochs differ a little in length."""
        with _PLANNING:
            while len(self._starts) <= epochs:
                self._starts.append(self._starts[-1] + len(self.epoch(len(self._starts) - 1)))
            return self._starts[epochs]

    def __getitem__(self, step: int) -> PlannedBatch:
        with _PLANNING:
            while self._starts[-1] <= step:
                self.steps(len(self._starts))
            epoch = bisect_right(self._starts, step) - 1
            return self.epoch(epoch)[step - self._starts[epoch]]

    def fingerprint(self) -> str:
        """Equal if and only if every step has the same batch: the same data, buckets and settings.

        It contains `shares` only as far as the batches depend on it: most rows of one sample do not.
        """
        return self._fingerprint


def describe(
    plan: Sequence[PlannedBatch], sizes: Sizes, shapes: Sequence[RowShape], tokens_per_frame: int, shares: int = 1
) -> str:
    """One epoch as a table for the log: per bucket its rows, samples, padding in % of its tokens, and cut samples."""
    _, need, cut = fit(sizes, shapes, tokens_per_frame, shares)
    lines = [
        f"{'frames':>7} {'tokens':>7} {'kind':>9} {'batches':>8} {'rows':>8} {'samples':>8} {'padding':>8} {'cut':>7}"
    ]
    total = np.zeros(6, np.int64)
    groups = defaultdict(list)
    for batch in plan:
        groups[batch.shape_index, batch.kind].append(batch.rows)
    for (shape_index, kind), group in sorted(groups.items()):
        rows = [row for batch in group for row in batch]
        samples = np.array([i for row in rows for i in row], np.int64)
        slots = len(rows) * shapes[shape_index].tokens
        counts = (len(group), len(rows), len(samples), cut[samples].sum(), need[0, samples].sum(), slots)
        total += counts
        lines.append(_line(shapes[shape_index].frames, shapes[shape_index].tokens, kind, *counts))
    return "\n".join([*lines, _line("all", "", "", *total.tolist())])


def _line(frames, tokens, kind, batches, rows, samples, cut, used, slots) -> str:
    padding = f"{100 - 100 * used / max(slots, 1):.1f} %"
    return f"{frames:>7} {tokens:>7} {kind:>9} {batches:>8} {rows:>8} {samples:>8} {padding:>8} {cut:>7}"
