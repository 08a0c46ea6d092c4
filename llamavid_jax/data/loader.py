"""Records -> batches of a training step, in the planned order: Grain reads and lays out rows ahead of the step.

    Schedule (which samples, which bucket) ─ row i of this process ─▶ read and lay out (threads, worker processes) ─▶
    LoadedBatch of the process's rows

A process reads the rows of every batch that its devices hold.  The position is the number of batches handed out, so
that a run may resume with other numbers of threads, workers and processes.  A sample that cannot be read leaves its
part of the row empty and is reported; the original substitutes a random one.
"""

import atexit
import math
import signal
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import absl.flags
import grain
import numpy as np
import numpy.typing as npt

from llamavid_jax.data.examples import ExampleReader
from llamavid_jax.data.plan import Schedule, fit
from llamavid_jax.data.record import DataError
from llamavid_jax.data.rows import lay_out_row
from llamavid_jax.data.sizes import KINDS, Sizes
from llamavid_jax.errors import InputError, OutageError
from llamavid_jax.shapes import Batch, RowShape
from llamavid_jax.text.qformer_tokenizer import QFormerTokenizer

READ_AHEAD = 2**34  # most bytes of frames read ahead of the batch in use; two batches if these are smaller


class FrameLayout(NamedTuple):
    """Shape and type of one frame: `(H, W, 3)` and uint8, or `(P, E)` and a float type."""

    shape: tuple[int, ...]
    dtype: npt.DTypeLike


class LoadedBatch(NamedTuple):
    """This process's rows of one step."""

    batch: Batch
    ids: list[list[str]]  # of the samples in each row
    skipped: list[dict[str, str]]  # {"id", "reason"} of the samples whose place stays empty
    truncated: int  # samples that lost frames or their end
    samples: int
    frames: int  # without padding
    tokens: int  # text and visual, without padding
    slots: int  # rows x tokens of the bucket


class _PlannedRow(NamedTuple):
    shape: RowShape
    kind: str
    samples: list[int]


class _Rows:
    """A data source for Grain: the planned rows of one process, step after step."""

    def __init__(self, schedule: Schedule, rows: Sequence[int], steps: int):
        self.schedule, self.rows, self.steps = schedule, rows, steps

    def __len__(self) -> int:
        return self.steps * len(self.rows)

    def __getitem__(self, index: int) -> _PlannedRow:
        step, row = divmod(int(index), len(self.rows))
        planned = self.schedule[step]
        return _PlannedRow(self.schedule.shapes[planned.shape_index], planned.kind, planned.rows[self.rows[row]])


class _ReadRow:
    """Planned row -> LoadedBatch of that row alone, its arrays without the first axis."""

    def __init__(
        self,
        records: Sequence,  # of Record; annotated as such, the tests' type checks would read a random one
        reader: ExampleReader,
        qformer_tokenizer: QFormerTokenizer,
        question_tokens: int,
        frames: Mapping[str, FrameLayout],
        sizes: Sizes,
        room: np.ndarray,
        shares: int,
    ):
        self.records, self.reader, self.room, self.sizes, self.shares = records, reader, room, sizes, shares
        self.qformer_tokenizer, self.question_tokens, self.frames = qformer_tokenizer, question_tokens, frames

    def __call__(self, row: _PlannedRow) -> LoadedBatch:
        layout = self.frames.get(row.kind, self.frames["pixels"])  # a bucket without frames has 0 of these
        examples, thinned, skipped = [], [], []
        for index in row.samples:
            name = f"record {index}"  # until it is known to have an id
            try:
                record = self.records[index]
                name = record.id
                # A video may hold more frames than its header says; it must not take other samples' room.
                tokens, frames = self.room[:, index].tolist()
                example = self.reader.read(record, index, frames, tokens)
                if example.frames is not None and example.frames.shape[1:] != layout.shape:
                    raise DataError(f"its frames are {example.frames.shape[1:]}; this model takes {layout.shape}")
                examples.append(example)
                thinned.append(example.frames is not None and len(example.frames) < self.sizes.frames[index])
            except InputError as error:
                skipped.append({"id": name, "reason": str(error)})
            except OutageError:  # the sample is not to blame
                raise
            except Exception as error:
                raise RuntimeError(f"sample {name} cannot be read: {type(error).__name__}: {error}") from error
        ids = [example.id for example in examples]
        try:
            batch, cut = lay_out_row(
                examples,
                row.shape,
                self.reader.tokens_per_frame,
                self.qformer_tokenizer,
                self.question_tokens,
                layout.shape,
                layout.dtype,
                self.shares,
            )
        except Exception as error:
            raise RuntimeError(f"samples {ids} cannot be laid out: {type(error).__name__}: {error}") from error
        truncated = int(np.logical_or(cut, thinned).sum())
        return LoadedBatch(
            batch,
            [ids],
            skipped,
            truncated,
            len(ids),
            sum(len(example.frames) for example in examples if example.frames is not None),
            int((batch.segment_ids > 0).sum()),
            row.shape.tokens,
        )


def _stack(rows: Sequence[LoadedBatch]) -> LoadedBatch:
    batch = Batch(*(np.stack(arrays) for arrays in zip(*(row.batch for row in rows), strict=True)))
    _, ids, skipped, *counts = zip(*rows, strict=True)
    return LoadedBatch(batch, list(chain(*ids)), list(chain(*skipped)), *map(sum, counts))


def _outlive_signals(worker: int, workers: int) -> None:
    """Workers ignore Ctrl-C and schedulers' signals: the run saves first, and Grain kills them at its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class Loader:
    """Iterates the batches of `steps` steps, or of `epochs` epochs if `steps` is 0.

    batch_size       rows of a step, over all processes
    rows             those that this process loads, None for all
    shares           chips that hold one row's frames, the mesh's `sequence`
    frames           layout of the frames of each kind, {"pixels": ..., "features": ...}
    question_tokens  maximum Q-Former ids of a question
    threads          read rows ahead, in each worker process or, if `processes` is 0, in this one
    Raises InputError for settings that do not fit together or the data, and if no sample can be read.

    For one pass over held-out data, set `shuffle` False and `epochs` 1.  Every `iter` begins anew, as for a list; only
    the one after `set_state` begins at the position that was set.
    """

    def __init__(
        self,
        records: Sequence,  # of Record
        sizes: Sizes,
        reader: ExampleReader,
        qformer_tokenizer: QFormerTokenizer,
        shapes: Sequence[RowShape],
        frames: Mapping[str, FrameLayout],
        *,
        batch_size: int,
        question_tokens: int,
        seed: int,
        packing: bool,
        shuffle: bool = True,
        epochs: int = 1,
        steps: int = 0,
        threads: int = 2,
        processes: int = 0,
        rows: Sequence[int] | None = None,
        shares: int = 1,
    ):
        self.schedule = Schedule(sizes, shapes, batch_size, reader.tokens_per_frame, seed, packing, shuffle, shares)
        self.steps = steps or self.schedule.steps(epochs)
        self.rows = range(batch_size) if rows is None else rows
        self._threads, self._processes = threads, processes
        self._source = _Rows(self.schedule, self.rows, self.steps)
        room = fit(sizes, shapes, reader.tokens_per_frame, shares)[1][:2]
        self._read = _ReadRow(records, reader, qformer_tokenizer, question_tokens, frames, sizes, room, shares)
        kinds = {KINDS[kind] for kind in np.unique(sizes.kind)} & frames.keys()
        frame_bytes = max((np.dtype(frames[k].dtype).itemsize * math.prod(frames[k].shape) for k in kinds), default=0)
        self.row_bytes = frame_bytes * max(shape.frames for shape in shapes)  # bytes of frames, in the largest bucket
        self._ahead = int(np.clip(READ_AHEAD // max(self.row_bytes, 1), 1, max(2 * len(self.rows), threads)))
        self._next = self._start = 0

    def __iter__(self) -> Iterator[LoadedBatch]:
        self._next, self._start = self._start, 0
        rows = grain.MapDataset.source(self._source).slice(slice(self._next * len(self.rows), None)).map(self._read)
        threads = min(self._threads, self._ahead)
        rows = rows.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=self._ahead))
        if self._processes:
            if not absl.flags.FLAGS.is_parsed():  # Grain reads absl flags, which only absl programs parse
                absl.flags.FLAGS.mark_as_parsed()
            buffered = -(-self._ahead // self._processes)
            workers = grain.MultiprocessingOptions(self._processes, per_worker_buffer_size=buffered)
            rows = rows.mp_prefetch(workers, worker_init_fn=_outlive_signals)
        batches = iter(rows.batch(len(self.rows), batch_fn=_stack))
        atexit.register(batches.close)  # if the pass is still open at exit: Grain's workers hold shared memory
        try:
            for batch in batches:
                self._next += 1
                yield batch
        finally:
            atexit.unregister(batches.close)
            batches.close()

    def get_state(self) -> dict[str, Any]:
        """The position, as JSON: a loader that is set to it continues after the last batch handed out."""
        return {"step": self._next, "plan": self.schedule.fingerprint()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Raises DataError for a position in other data, or in the same data under other settings."""
        if state["plan"] != self.schedule.fingerprint():
            raise DataError(
                "the saved position is in another order of samples: the data, the buckets, batch_size, seed, packing, "
                "or a packed run's sequence=N changed since; restore them, or start a new run from the saved model"
            )
        self._next = self._start = int(state["step"])
