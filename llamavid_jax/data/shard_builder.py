"""Plans -> shards: the tensorflow-datasets builder of `build_shards.py`.

It is a ShardBasedBuilder because a GeneratorBasedBuilder sorts data above 1 GB through temporary files, which it writes
with TensorFlow, and under Beam holds all media in memory to sort them.
"""

import contextlib
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from llamavid_jax.data.shards import FORMAT_VERSION
from llamavid_jax.files import find


def write_shards(plans: Sequence[Path], folder: Path, pipeline_options) -> Path:
    """Writes tensorflow-datasets' folder of shards inside `folder` from the plans; returns its path."""
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    if pipeline_options is not None:
        from apache_beam.options.pipeline_options import StandardOptions

        runner = pipeline_options.view_as(StandardOptions).runner or "DirectRunner"
        config = config.replace(beam_runner=runner, beam_options=pipeline_options)
    builder = LlamaVidShards(plans, data_dir=folder / "tfds", file_format="array_record")
    tfds.display_progress_bar(False)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints that it downloads
        builder.download_and_prepare(download_dir=folder / "downloads", download_config=config)
    return Path(builder.data_dir)


class LocalInfo(tfds.core.DatasetInfo):
    def initialize_from_bucket(self) -> None:
        """Does nothing: tfds's bucket does not have this data set, but tfds would make a folder for its description."""


class LlamaVidShards(tfds.core.ShardBasedBuilder, skip_registration=True):
    """Plans -> shards of the splits `train` (with media bytes) and `outline` (without), in the plans' order."""

    name = "llamavid"
    VERSION = tfds.core.Version(f"{FORMAT_VERSION}.0.0")
    code_path = None  # nothing is downloaded; looking for checksums beside this file would need an undeclared package

    def __init__(self, plans: Sequence[Path], **kwargs):
        self.plans = plans
        super().__init__(**kwargs)

    def _info(self) -> LocalInfo:
        features = tfds.features.FeaturesDict(
            {
                "id": tfds.features.Text(),
                "kind": tfds.features.Text(),
                "conversations": tfds.features.Text(),  # JSON
                "media": tfds.features.Text(),  # the file's name; empty for text only
                "data": tfds.features.Tensor(shape=(), dtype=np.object_),  # the file's bytes
                "frames": tfds.features.Scalar(np.int64),
                "average_fps": tfds.features.Scalar(np.float64),
                "seconds": tfds.features.Scalar(np.float64),
                "inputs": tfds.features.Text(),  # JSON: a film's text, from its feature file or subtitles
                "times": tfds.features.Text(),  # whether a film's text has those of each "frame" or "minute"; or empty
            }
        )
        return LocalInfo(builder=self, features=features, disable_shuffling=True)

    def _shard_iterators_per_split(self, dl_manager) -> dict[str, list["PlannedShard"]]:
        return {split: [PlannedShard(plan, split == "train") for plan in self.plans] for split in ("train", "outline")}

    def _download_and_prepare(self, dl_manager, download_config=None) -> None:
        super()._download_and_prepare(dl_manager, download_config)
        # After Beam, tfds 4.9 has the shards' lengths sorted by their numbers as text: 0, 1, 10, 11, 2 ...
        lengths = [len(plan.read_bytes().splitlines()) for plan in self.plans]
        splits = [split.replace(shard_lengths=lengths) for split in self.info.splits.values()]
        self.info.set_splits(tfds.core.SplitDict(splits))
        for rest in Path(self.data_dir).glob("*.shard_infos.json"):
            rest.unlink()


class PlannedShard(NamedTuple):
    """A function that yields the examples of one shard.  Beam pickles it, so it holds a path and no samples."""

    plan: Path
    with_data: bool

    def __call__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, line in enumerate(self.plan.read_bytes().splitlines()):
            sample = json.loads(line)
            data = find(sample["path"]).read_bytes() if sample["path"] and self.with_data else b""
            yield number, sample["example"] | {"data": data}
