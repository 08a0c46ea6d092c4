"""From records to batches on the devices: which rows a process reads, and the transfer of each batch.

records ─ make_loader ─▶ Loader, this process's rows ─ upcoming ─▶ Batch, sharded over the mesh
"""

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from llamavid_jax.checkpoints.tower import TowerHash
from llamavid_jax.data.examples import ExampleReader
from llamavid_jax.data.labels import check_template
from llamavid_jax.data.loader import FrameLayout, LoadedBatch, Loader
from llamavid_jax.data.record import DataError
from llamavid_jax.data.records import media_file, read_records
from llamavid_jax.data.shards import Shards
from llamavid_jax.data.sizes import KINDS, Sizes, read_sizes
from llamavid_jax.errors import ConfigError, TrainingError
from llamavid_jax.media.features import check_made_by, check_rate, describe, processing
from llamavid_jax.media.source import MediaError
from llamavid_jax.parallel.mesh import ShardingError, row_shards
from llamavid_jax.shapes import Batch
from llamavid_jax.training.config import DataConfig, LoopConfig
from llamavid_jax.training.layout import batch_sharding
from llamavid_jax.training.start import Start

FETCHED_AHEAD = 2**30  # bytes of frames per device; larger batches wait on the host until the previous step is done


class Upcoming(NamedTuple):
    """A batch on the devices, what was loaded for it, and the data position after it."""

    batch: Batch | None  # None once its step is under way
    loaded: LoadedBatch
    position: dict[str, Any]
    wait: float  # seconds spent waiting for the loader


def own_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """The rows of a batch that this process's devices hold, in order.

    They need not be contiguous, as meshes follow the chips' wiring.  Along `tensor` and `sequence` several processes
    may hold the same rows.  Raises ShardingError, on all processes, if one has no device in the mesh.
    """
    idle = set(range(jax.process_count())) - {device.process_index for device in mesh.devices.flat}
    if idle:
        raise ShardingError(
            f"a mesh of {mesh.size} devices leaves process {min(idle)} without one; use all {jax.device_count()}"
        )
    places = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for place in places for row in range(*place[0].indices(batch_size))})


def open_data(data: DataConfig, report: Callable[[str], None]) -> tuple[Sequence, Sequence | None]:
    """The training records and the held-out ones.  Raises ConfigError or DataError for a wrong path."""
    if not data.path:
        raise ConfigError("data.path is empty; give a LLaVA-format .json or .jsonl, or a folder of shards")
    opened = []
    for name in ("path", "evaluation_path"):
        path = getattr(data, name)
        try:
            opened.append(read_records(path, data.media) if path else None)
        except DataError as error:
            raise DataError(f"data.{name}: {error}") from None
    if data.media and all(isinstance(records, Shards | None) for records in opened):
        report(f"data.media={data.media} changes nothing: shards hold their media")
    return tuple(opened)


def make_loader(
    records: Sequence,
    output: Path,
    start: Start,
    data: DataConfig,
    loop: LoopConfig,
    rows: Sequence[int],
    *,
    held_out: bool = False,
    resumed: bool = False,
) -> Loader:
    """The loader of this process's `rows`, for the training data or for one pass over the held-out set."""
    vision = start.config.vision_tower_config
    check_template(data.template, start.tokenizer)
    reader = ExampleReader(
        start.tokenizer,
        data.template,
        vision.image_size,
        start.config.image_aspect_ratio,
        start.config.tokens_per_frame,
        data.fps,
        data.seed,
        vision.image_mean,
        start.config.mm_use_im_start_end,
    )
    frames = {"pixels": FrameLayout((vision.image_size, vision.image_size, 3), np.uint8)}
    if start.config.tokens_of(has_cls=False) == start.config.tokens_per_frame:  # else features would lack a token
        frames["features"] = FrameLayout((vision.num_patches, vision.hidden_size), jnp.dtype(loop.dtype))
    path, table = (data.evaluation_path, "sizes-evaluation.npz") if held_out else (data.path, "sizes.npz")
    sizes = read_sizes(records, reader, path, output / table, max(data.threads, data.processes), retry=not resumed)
    check_features(records, sizes, start, data.fps)
    return Loader(
        records,
        sizes,
        reader,
        start.qformer_tokenizer,
        data.shapes,
        frames,
        batch_size=loop.batch_size,
        question_tokens=data.question_tokens,
        seed=data.seed,
        packing=data.packing,
        shuffle=not held_out,
        epochs=1 if held_out else loop.epochs,
        steps=0 if held_out else loop.steps,
        threads=data.threads,
        processes=0 if held_out else data.processes,
        rows=rows,
        shares=row_shards(start.mesh),
    )


def check_features(records: Sequence, sizes: Sizes, start: Start, fps: float) -> None:
    """Raises MediaError for a feature file of another vision tower or rate; of shards only one sample is checked.

    Other kinds of files say nothing of either, and unreadable ones are skipped later.
    """
    places = np.flatnonzero(sizes.kind == KINDS.index("features"))[: 1 if isinstance(records, Shards) else None]
    if not len(places):
        return
    vision, tower = start.config.vision_tower_config, TowerHash(start).rounded()
    prepared = processing(vision.image_size, vision.image_mean, vision.image_std)
    for record in (records[place] for place in places.tolist()):
        found = None
        with contextlib.suppress(MediaError), media_file(record) as path:
            found = describe(path)
        if found:
            check_made_by(record.media, found, tower, prepared)
            check_rate(record.media, found, fps)


def check_same_data(identity: Mapping[str, Any], *loaders: Loader | None) -> None:
    """Raises TrainingError if the processes have different data: they would run different programs."""
    plans = [bytes.fromhex(loader.schedule.fingerprint()) for loader in loaders if loader is not None]
    own = hashlib.sha256(json.dumps(identity, sort_keys=True).encode() + b"".join(plans)).digest()
    every = multihost_utils.process_allgather(np.frombuffer(own, np.uint8)).reshape(jax.process_count(), -1)
    if np.any(every != every[0]):
        raise TrainingError(
            "the processes see different data: a file is missing, unreadable or another on some of them; "
            "run `python -m llamavid_jax.data.validate` on each host, and compare the files"
        )


def room_ahead(loader: Loader, mesh: Mesh, batch_size: int) -> bool:
    """Whether the devices have room for the next batch while they compute with the current one."""
    device_rows = batch_sharding(mesh).shard_shape((batch_size,))[0]
    return loader.row_bytes * device_rows // row_shards(mesh) <= FETCHED_AHEAD


def upcoming(loader: Loader, mesh: Mesh, batch_size: int, packing: bool) -> Iterator[Upcoming]:
    """Transfers batches to the devices; each process contributes its own rows.

    Rows of one sample need no segment ids: causal attention hides the padding after it.
    """

    def place(field: str, array: np.ndarray) -> jax.Array:
        whole = (batch_size, *array.shape[1:])
        return jax.make_array_from_process_local_data(batch_sharding(mesh, field), array, whole)

    batches, unused = iter(loader), () if packing else ("segment_ids", "positions")
    while True:
        began = time.perf_counter()
        loaded = next(batches, None)
        if loaded is None:
            return
        fields = loaded.batch._replace(**dict.fromkeys(unused))._asdict()
        placed = (None if array is None else place(field, array) for field, array in fields.items())
        yield Upcoming(Batch(*placed), loaded, loader.get_state(), time.perf_counter() - began)
