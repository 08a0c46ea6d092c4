"""What a run depends on, kept with its checkpoints, so that it never resumes with something else unnoticed.

recipe, model, weights, tokenizers, data ─ identity ─▶ {name: value} in each checkpoint ─ check_same_run ─▶ the same
sizes and times of the media files, a column a record  ─ check_same_media ─▶ output/media.npy
"""

import dataclasses
import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llamavid_jax.data.shards import MANIFEST, Shards
from llamavid_jax.data.sizes import media_files
from llamavid_jax.errors import TrainingError
from llamavid_jax.files import find, write_files
from llamavid_jax.models.structure import flat_paths
from llamavid_jax.parallel.processes import on_any
from llamavid_jax.training.config import TrainConfig
from llamavid_jax.training.start import Start

FREE = {  # fields that may change between restarts: neither the order of the data nor the steps depend on them
    *("output", "mesh", "data.path", "data.media", "data.evaluation_path"),  # the content of data.path counts
    *("data.max_broken", "data.threads", "data.processes"),
    *("training.log_every", "training.save_every", "training.keep", "training.evaluate_every"),
    *("training.max_bad_steps", "training.hang_after", "training.remat", "training.compiler_options"),
    *("training.device_rows", "training.local_copies", "training.local_every", "training.tracker"),
}
MEDIA = "media.npy"


def identity(config: TrainConfig, start: Start) -> dict[str, Any]:
    """All that a run depends on, except its media files, as flat JSON."""
    recipe, free = {}, FREE | ({"training.micro_batches"} if config.training.loss_weighting == "tokens" else set())
    for section, value in dataclasses.asdict(config).items():
        named = {f"{section}.{name}": x for name, x in value.items()} if isinstance(value, dict) else {section: value}
        recipe |= {name: x for name, x in named.items() if name not in free}
    sizes = {f"the model's {name}": x for name, x in flat_paths(dataclasses.asdict(start.config)).items()}
    weights = {f"the fingerprint of {path} in start.model": value for path, value in start.read.items()}
    tokenizer, data = find(config.data.tokenizer or config.start.model), find(config.data.path)
    texts = (file for pattern in ("*token*", "qformer_tokenizer/*") for file in sorted(tokenizer.glob(pattern)))
    contents = {
        "the SHA-256 of data.path": _sha256([data / MANIFEST if data.is_dir() else data]),
        "the SHA-256 of the tokenizers": _sha256([file for file in texts if file.is_file()]),
    }
    return json.loads(json.dumps(recipe | sizes | weights | contents))


def _sha256(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()[:16]


def check_same_run(now: Mapping[str, Any], before: Mapping[str, Any], output: Path) -> None:
    """Raises TrainingError, on all processes, for the first value that has changed since the run began."""
    differing = [name for name in (*now, *before) if now.get(name) != before.get(name)]
    _agree(
        f"{differing[0]} is {now.get(differing[0])!r}, but the run in {output} began with "
        f"{before.get(differing[0])!r}; set it back, or give another output folder"
        if differing
        else ""
    )


def check_same_media(
    records: Sequence, output: Path, resumed: bool, threads: int, report: Callable[[str], None]
) -> None:
    """Raises TrainingError, on all processes, if a file's size or time has changed since the run began, or it is gone.

    If all times differ but no size does, the files were copied, which is only reported.  Process 0 checks the files
    that it sees.
    """
    problem, file = "", output / MEDIA
    if jax.process_index() == 0 and not isinstance(records, Shards):  # whose manifest has the sizes
        now = media_files(records, threads)
        before = _read_media(file) if resumed else None
        if before is None or before.shape != now.shape:
            if resumed:
                report(f"{file} is absent or damaged: whether the media files are those of before is not known")
            content = io.BytesIO()
            np.save(content, now)
            write_files(output, {MEDIA: content.getvalue()})
            before = now
        sizes, times = now != before
        media = before[0] >= 0  # the others are text only
        copied = times[media].all() and len(np.unique(before[0][media])) > 1 and not sizes.any()
        changed = np.flatnonzero(sizes | times)
        if copied and len(changed):
            report("all media files have other times than when the run began, as copies have, and the same sizes")
        elif len(changed):
            problem = (
                f"{len(changed)} records have other media files than when the run in {output} began, by size or time; "
                f"the first is {records[int(changed[0])].media}: put it back, give another output folder or, where the "
                f"content is the same, remove {file}"
            )
    _agree(problem)


def _read_media(file: Path) -> np.ndarray | None:
    """The saved table; None if it is absent or damaged."""
    try:
        return np.load(file)
    except (OSError, ValueError, EOFError):
        return None


def _agree(problem: str) -> None:
    """Raises TrainingError on all processes if any has a problem: otherwise they would wait for it."""
    if on_any(problem):
        raise TrainingError(problem or "another process found that this is not the run that began; see its output")
