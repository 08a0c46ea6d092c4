"""A folder of ArrayRecord shards -> Records with their media bytes, by index.

`build_shards.py` writes such a folder as a tensorflow-datasets data set with two splits of the same samples in the same
order: `train` holds everything, `outline` everything but the media bytes, so that planning for a million videos reads
megabytes instead of all of them.  `manifest.json` lists the folder's content; a folder without it is incomplete and is
refused.  TensorFlow is neither needed nor imported.
"""

import bisect
import functools
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llamavid_jax.buckets import listing, url
from llamavid_jax.copies import fetch, limit
from llamavid_jax.data.record import DataError, Record
from llamavid_jax.files import find, local, read_object

FORMAT_VERSION = 2
MANIFEST, INFO = "manifest.json", "dataset_info.json"  # our file; the one of tensorflow-datasets
SPLITS = "train", "outline"


def _features() -> dict[str, Any]:
    """The expected `features.json` of every folder of shards; it names Python classes."""
    home = "tensorflow_datasets.core.features."
    text = {"pythonClassName": f"{home}text_feature.Text", "text": {}}

    def tensor(kind: str, dtype: str) -> dict[str, Any]:
        return {"pythonClassName": home + kind, "tensor": {"dtype": dtype, "encoding": "none", "shape": {}}}

    integer, real = (tensor("scalar.Scalar", dtype) for dtype in ("int64", "float64"))
    fields = dict.fromkeys(("id", "kind", "conversations", "media", "inputs", "times"), text)
    fields |= {"data": tensor("tensor_feature.Tensor", "string"), "frames": integer}
    fields |= dict.fromkeys(("average_fps", "seconds"), real)
    return {"featuresDict": {"features": fields}, "pythonClassName": f"{home}features_dict.FeaturesDict"}


class MediaHeader(NamedTuple):
    """What a media file's header tells without decoding; 0 frames means no media."""

    frames: int  # in the file
    average_fps: float = 0.0  # of a video with a constant frame rate, else 0
    inputs: str | None = None  # a film's text: from a feature file, or from a video's subtitles
    seconds: float = 0.0  # duration of a video without one, else 0
    times: list[float] | None = None  # of a film's frames; not stored in shards


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a complete folder of shards; DataError if it is absent, unreadable or of another version."""
    path = find(folder) / MANIFEST
    try:
        manifest = read_object(path)
    except FileNotFoundError:
        raise DataError(
            f"{folder} is no complete folder of shards ({MANIFEST} is absent); "
            "build it with: python -m llamavid_jax.data.build_shards JSON OUT"
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); build the shards again") from None
    if (version := manifest.get("format_version")) != FORMAT_VERSION:
        raise DataError(f"{path} has format version {version!r}, not {FORMAT_VERSION}; build the shards again")
    for name, kind in (("samples", int), ("files", dict), ("source", dict), ("kinds", dict), ("skipped", list)):
        if type(manifest.get(name)) is not kind:
            raise DataError(f"{path}: {name} is no {kind.__name__}; build the shards again")
    for name, size in manifest["files"].items():
        if Path(name).name != name or type(size) is not int:
            raise DataError(f"{path} lists the file {name!r} of {size!r} bytes; build the shards again")
    return manifest


class Shards(Sequence):  # of Record; annotated as such, the tests' type checks would read a random one
    """Samples by index.  Each process, and each unpickled copy, opens the files at its first read."""

    def __init__(self, folder: str | Path):
        self.folder = local(folder).resolve()
        manifest = read_manifest(folder)
        self._length, there = manifest["samples"], listing(self.folder)
        if url(self.folder) and (size := sum(size for size, _ in there.values())) > limit():
            raise DataError(
                f"{self.folder} has {size / 1e9:.3g} GB, more than LLAMAVID_BUCKETS_SIZE: samples are read in any "
                "order, so the shards stay on each host; raise that, or mount the bucket"
            )
        for name, size in manifest["files"].items():
            file = self.folder / name
            found = there[name].size if name in there else None
            if found != size:
                state = "is absent" if found is None else f"has {found} bytes"
                raise DataError(f"{file} {state}, and {MANIFEST} says {size}; copy the folder again, or build it again")
        self._check_features()

    def _check_features(self) -> None:
        """Must run before tensorflow-datasets reads the file: it imports the modules of the classes named there."""
        path = self.folder / "features.json"
        try:
            features = read_object(path)
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read ({error}); copy the folder again, or build it again") from None
        if features != _features():
            raise DataError(f"{path} describes other fields than shards have; build the folder again")

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Record:
        """The sample with its media bytes.  Raises DataError that names the file if it is damaged."""
        return self._read(
            "train", index, lambda sample: _to_record(sample, sample["data"] if sample["media"] else None)
        )

    def outline(self, index: int) -> tuple[Record, MediaHeader]:
        """The sample without its media bytes, and its media header: all that a plan needs."""
        return self._read("outline", index, lambda sample: (_to_record(sample, None), _to_header(sample)))

    def _read(self, split: str, index: int, parse: Callable[[dict[str, Any]], Any]) -> Any:
        if not -self._length <= index < self._length:
            raise IndexError(f"sample {index} of {self._length}")
        index %= self._length
        if self._is_remote and (file := self._file(split, index)) not in self._fetched:
            fetch(file)
            self._fetched.add(file)
        try:
            return parse(self._sources[split][index])
        except DataError:
            raise
        # whatever the readers of a damaged file raise: checksums, lengths and protocol buffers have their own errors
        except Exception as error:
            raise DataError(
                f"{self._file(split, index)} is damaged: sample {index} cannot be read ({_first_line(error)}); "
                "copy the folder again, or build it again"
            ) from None

    @functools.cached_property
    def _is_remote(self) -> bool:
        return url(self.folder) is not None

    @functools.cached_property
    def _fetched(self) -> set[Path]:
        return set()

    @functools.cached_property
    def _builder(self):
        import tensorflow_datasets as tfds  # imported here: it takes half a second

        self._check_features()  # again in each process, right before the import that it guards
        problem = f"it has not the {self._length} samples of {MANIFEST}, or not its files"
        try:
            builder = tfds.builder_from_directory(self.folder)
            splits, there = [builder.info.splits[split] for split in SPLITS], listing(self.folder)
            if all(
                split.num_examples == self._length and all(path.name in there for path in split.filepaths)
                for split in splits
            ):
                return builder
        except Exception as error:  # protocol buffers, versions and name patterns raise their own
            problem = _first_line(error)
        raise DataError(f"{self.folder / INFO} is damaged ({problem}); copy the folder again, or build it again")

    @functools.cached_property
    def _sources(self) -> dict[str, Any]:
        return {split: self._builder.as_data_source(split) for split in SPLITS}

    def _file(self, split: str, index: int) -> Path:
        """The shard that sample `index` is in."""
        ends, files = self._parts[split]
        return [*files, self.folder / INFO][bisect.bisect_right(ends, index)]  # INFO if that counts fewer samples

    @functools.cached_property
    def _parts(self) -> dict[str, tuple[list[int], list[Path]]]:
        """For each split, the end index (exclusive) of every shard, and the shards."""
        splits = {split: self._builder.info.splits[split].file_instructions for split in SPLITS}
        return {
            split: (list(itertools.accumulate(part.take for part in parts)), [Path(part.filename) for part in parts])
            for split, parts in splits.items()
        }

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "_length": self._length}


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0][:200]


def _to_record(sample: dict[str, Any], data: bytes | None) -> Record:
    return Record(
        id=sample["id"].decode(),
        conversations=json.loads(sample["conversations"]),
        media=sample["media"].decode() or None,
        kind=sample["kind"].decode(),
        data=data,
        subtitles=json.loads(sample["inputs"]) if sample["kind"] == b"video" else None,
        times=sample["times"].decode() or None,
    )


def _to_header(sample: dict[str, Any]) -> MediaHeader:
    numbers = int(sample["frames"]), float(sample["average_fps"])
    return MediaHeader(*numbers, json.loads(sample["inputs"]), float(sample["seconds"]))


def read_shards(folder: str | Path) -> Shards:
    """The samples of a folder that `build_shards` wrote.  Raises DataError if it is not complete."""
    return Shards(folder)
