"""Recorded outputs against this model: `python -m conversion.check DIR --expected FILE.npz`.

A recording holds inputs and the original's outputs under `video.*`, `image.*`, `long.*` and `generate.*`.  One row is
printed for each output: relative error ‖a − b‖ / ‖b‖, tolerance, verdict.  The exit code is 1 when one fails or when
nothing was compared.  Everything runs in float32 at the highest matmul precision.
"""

import dataclasses
import json
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from llamavid_jax import LLaMAVIDLlavaForConditionalGeneration
from llamavid_jax.commands.program import keep_programs
from llamavid_jax.errors import CheckpointError, InputError, Parser, command, printable
from llamavid_jax.files import find, local
from llamavid_jax.shapes import IGNORE_LABEL, IMAGE_TOKEN

TOLERANCES = {"vision_features": 1e-5, "tokens": 1e-5, "logits": 5e-5, "loss": 1e-5, "greedy": 0.0}
MAX_RECORDING = 4 << 30  # bytes, unpacked


@dataclasses.dataclass(frozen=True)
class Row:
    """One compared array; for `greedy` the error is the share of ids that differ."""

    name: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # a NaN fails


def compare(name: str, actual: Any, expected: Any) -> Row:
    """Relative error of one output; infinite where the shapes differ."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    tolerance = TOLERANCES[name.split(".")[1]]
    if actual.shape != expected.shape:
        return Row(name, float("inf"), tolerance)
    if tolerance == 0:
        return Row(name, float(np.mean(actual != expected)), tolerance)
    return Row(name, float(np.linalg.norm(actual - expected) / np.linalg.norm(expected)), tolerance)


def check_case(model: LLaMAVIDLlavaForConditionalGeneration, expected: Mapping[str, np.ndarray]) -> list[Row]:
    """Runs every kind of case that the recording holds; an empty list if it holds none."""
    with jax.default_matmul_precision("highest"):
        rows: list[Row] = []
        for kind in ("video", "image"):
            if f"{kind}.input_ids" in expected:
                rows += _pixel_case(model, expected, kind)
        if "long.input_ids" in expected:
            rows += _long_case(model, expected)
        if "generate.input_ids" in expected:
            rows += _generate_case(model, expected)
    return rows


def _pixels(expected: Mapping[str, np.ndarray], kind: str) -> list[np.ndarray]:
    """One array of frames a sample: `pixels.i`, or one still image a sample in `pixels`."""
    if f"{kind}.pixels" in expected:
        return [image[None] for image in expected[f"{kind}.pixels"]]
    count = len(expected[f"{kind}.input_ids"])
    return [expected[f"{kind}.pixels.{i}"] for i in range(count)]


def _pixel_case(model, expected: Mapping[str, np.ndarray], kind: str) -> Iterator[Row]:
    pixels, prompts = _pixels(expected, kind), json.loads(str(expected[f"{kind}.prompts"]))
    merged = []
    for i, (frames, questions) in enumerate(zip(pixels, prompts, strict=True)):
        if f"{kind}.vision_features.{i}" in expected:
            features = model.vision_features(frames)
            yield compare(f"{kind}.vision_features.{i}", features, expected[f"{kind}.vision_features.{i}"])
        tokens = np.asarray(model.visual_tokens(pixel_values=frames, prompts=questions))
        if f"{kind}.tokens.{i}" in expected:
            yield compare(f"{kind}.tokens.{i}", tokens, expected[f"{kind}.tokens.{i}"])
        merged.append(tokens.shape[1])
    # text alone: frames were recorded with it that no token shows, as in the original's training
    for i in np.flatnonzero((expected[f"{kind}.input_ids"] != IMAGE_TOKEN).all(axis=1)):
        pixels[i], prompts[i] = None, None
    yield from _forward(model, expected, kind, merged, pixel_values=pixels, prompts=prompts)


def _long_case(model, expected: Mapping[str, np.ndarray]) -> Iterator[Row]:
    """Precomputed features without CLS; one placeholder for every visual token."""
    features, prompt = expected["long.features"], str(expected["long.prompt"])
    if "long.tokens" in expected:
        yield compare("long.tokens", model.visual_tokens(features=features, prompts=[prompt]), expected["long.tokens"])
    yield from _forward(model, expected, "long", [1], features=[features], prompts=[[prompt]])


def _forward(model, expected: Mapping[str, np.ndarray], kind: str, slot: list[int], **visuals: Any) -> Iterator[Row]:
    """Logits where a row holds tokens, and the loss; `slot[i]` visual tokens replace each placeholder of row i.

    The documented layout's vocabulary is padded: logits, and the softmax of the loss, are taken over the recorded one.
    """
    ids, labels = expected[f"{kind}.input_ids"], expected.get(f"{kind}.labels")
    output = model(ids, labels=labels, **visuals)
    logits, loss = np.asarray(output.logits), output.loss
    if f"{kind}.logits" in expected:
        recorded = expected[f"{kind}.logits"]
        ends = [merge_length(row, tokens) for row, tokens in zip(ids, slot, strict=True)]
        kept = [(row, position) for row, end in enumerate(ends) for position in range(end)]
        rows, positions = np.array(kept).T
        same_length = logits.shape[:2] == recorded.shape[:2]
        vocabulary = recorded.shape[-1]
        actual = logits[rows, positions, :vocabulary] if same_length else logits
        yield compare(f"{kind}.logits", actual, recorded[rows, positions] if same_length else recorded)
        if labels is not None and logits.shape[-1] > vocabulary:
            merged = [merge_labels(*row) for row in zip(ids, labels, slot, strict=True)]
            loss = mean_loss(logits[..., :vocabulary], merged)
    if f"{kind}.loss" in expected:
        yield compare(f"{kind}.loss", loss, expected[f"{kind}.loss"])


def merge_length(ids: np.ndarray, slot: int) -> int:
    """Length of a row after merging, without the id 0 that pads it on the right."""
    length = len(np.trim_zeros(ids, "b"))
    return length + (slot - 1) * int((ids == IMAGE_TOKEN).sum())


def merge_labels(ids: np.ndarray, labels: np.ndarray, slot: int) -> np.ndarray:
    """Labels of a merged row: visual tokens are ignored."""
    return np.repeat(labels, np.where(ids == IMAGE_TOKEN, slot, 1))


def mean_loss(logits: np.ndarray, labels: list[np.ndarray]) -> float:
    """Mean cross-entropy of position t's logits against label t+1, over all labels that are not ignored."""
    losses = []
    for row, targets in zip(logits.astype(np.float64), labels, strict=True):
        (kept,) = np.nonzero(targets[1:] != IGNORE_LABEL)
        used = row[kept]
        top = used.max(-1, keepdims=True)
        normalizer = np.log(np.exp(used - top).sum(-1)) + top[:, 0]
        losses.append(normalizer - used[np.arange(len(kept)), targets[1:][kept]])
    return float(np.concatenate(losses).mean())


def _generate_case(model, expected: Mapping[str, np.ndarray]) -> Iterator[Row]:
    """Greedy ids of the first video, as many as were recorded, without stopping."""
    pixels, prompts = _pixels(expected, "video")[:1], json.loads(str(expected["video.prompts"]))[:1]
    greedy = expected["generate.greedy"]
    output = model.generate(
        expected["generate.input_ids"],
        pixel_values=pixels,
        prompts=prompts,
        max_new_tokens=len(greedy),
        temperature=0,
        ignore_eos=True,
    )
    yield compare("generate.greedy", output.token_ids[0], greedy)


class Recording(dict):
    """Arrays by name; CheckpointError for one that is not there."""

    def __init__(self, file: Path, arrays: Mapping[str, np.ndarray]):
        super().__init__(arrays)
        self._file = file

    def __missing__(self, name: str):
        raise CheckpointError(f"{self._file} lacks the array {name}; record the case again")


def read_expected(file: Path) -> Recording:
    """A recording.  Raises CheckpointError when it is not a readable `.npz` file, and for one above MAX_RECORDING."""
    try:
        with zipfile.ZipFile(file) as archive:
            if (size := sum(entry.file_size for entry in archive.infolist())) > MAX_RECORDING:
                raise CheckpointError(f"{file} unpacks to {size} bytes; a recording has at most {MAX_RECORDING}")
        with np.load(file, allow_pickle=False) as arrays:
            return Recording(file, {name: arrays[name] for name in arrays.files})
    except CheckpointError:
        raise
    except Exception as error:  # a damaged archive may raise anything at all
        raise CheckpointError(f"{file} is not a readable .npz file ({error}); give a recorded expected.npz") from None


@command()
def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="python -m conversion.check", description=__doc__)
    parser.add_argument("directory", metavar="DIR", type=local, help="a converted checkpoint")
    parser.add_argument("--expected", metavar="FILE", type=local, required=True, help="recorded outputs (.npz)")
    options = parser.parse_args(arguments)
    expected = read_expected(find(options.expected))
    keep_programs()
    model = LLaMAVIDLlavaForConditionalGeneration.from_pretrained(options.directory, dtype="float32")
    try:
        rows = check_case(model, expected)
    except InputError:
        raise
    except (ValueError, TypeError, IndexError) as error:
        raise CheckpointError(
            f"{options.expected} does not record a case of this model ({error}); record it again"
        ) from None
    table = Table("array", "relative error", "tolerance", "verdict", title=printable(options.directory))
    for row in rows:
        table.add_row(row.name, f"{row.error:.2e}", f"{row.tolerance:.0e}", "ok" if row.passed else "FAILED")
    Console().print(table)
    if not rows:
        print(f"error: {options.expected} holds no recorded case; nothing was compared", file=sys.stderr)
    return 0 if rows and all(row.passed for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
