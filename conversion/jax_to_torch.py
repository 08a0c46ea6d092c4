"""JAX → PyTorch: `python -m conversion.jax_to_torch DIR OUT --layout original|documented`.

`original` writes `pytorch_model-0000i-of-0000n.bin`, their index and a `config.json` in the original's form (needs
torch); `documented` writes safetensors and the configuration of the transformers port.  Every weight is written as it
is stored: PyTorch → JAX → PyTorch is bit-exact, also from one layout to the other, the vocabulary included (the
documented layout usually has rows for `<image>` and padding; none are added or removed).  Memory holds one `.bin` file,
or one tensor of a safetensors file.
"""

import json
import logging
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from llamavid_jax.checkpoints.arrays import Arrays
from llamavid_jax.checkpoints.weights import WEIGHTS, check_params
from llamavid_jax.config.schema import LLaMAVIDLlavaConfig
from llamavid_jax.errors import CheckpointError, Parser, command, printable
from llamavid_jax.files import find, local
from llamavid_jax.media.image_processor import VIDEO_FILE
from llamavid_jax.weights import inventory
from llamavid_jax.weights.files import Weight, to_torch, weight_table

from . import folder
from .read_torch import SAFETENSORS_DTYPES
from .torch_config import documented_config, original_config

SHARD_BYTES = {"original": 1 << 30, "documented": 5 << 30}
SAFETENSORS_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


class FileWeight:
    """One weight of the file to write: its parts in the checkpoint (two for a fused `qkv.bias`), shape and size."""

    def __init__(self, name: str, parts: list[Weight], arrays: Arrays):
        self.name, self.parts, self.arrays = name, parts, arrays
        self.shape = parts[0].shape
        self.dtype = arrays[parts[0].path].dtype.numpy_dtype
        self.nbytes = int(np.prod(self.shape)) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """The values in the file's layout; a fused bias is assembled around its zero third."""
        values = [to_torch(self.arrays.read(part.path, part.index), part.pattern) for part in self.parts]
        if self.parts[0].third is not None:
            thirds = dict(zip((part.third for part in self.parts), values, strict=True))
            return np.concatenate([thirds[0], np.zeros_like(thirds[0]), thirds[2]])
        return np.ascontiguousarray(values[0])


def file_weights(source: Path, config: LLaMAVIDLlavaConfig, layout: str) -> list[FileWeight]:
    """Every weight of the layout.  Raises CheckpointError when the checkpoint does not fit its configuration."""
    arrays = Arrays(source / WEIGHTS)
    table = weight_table(config, layout)
    check_params(arrays.folder, arrays, inventory.shapes(config))
    parts: dict[str, list[Weight]] = {}
    for weight in table:
        parts.setdefault(weight.name, []).append(weight)
    if layout == "original" and config.text_config.tie_word_embeddings:
        parts["lm_head.weight"] = parts["model.embed_tokens.weight"]  # torch's state_dict names a tied weight twice
    return [FileWeight(name, found, arrays) for name, found in parts.items()]


def shards(weights: list[FileWeight], limit: int) -> list[list[FileWeight]]:
    """Groups of at most `limit` bytes, or of one weight, in the given order."""
    groups: list[list[FileWeight]] = []
    size = limit
    for weight in weights:
        if not groups or size + weight.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(weight)
        size += weight.nbytes
    return groups


def write_torch(shard: list[FileWeight], file: Path) -> Iterator[FileWeight]:
    """Writes a dictionary of tensors with torch; yields each weight after reading it."""
    import torch

    tensors = {}
    for weight in shard:
        value = weight.read()
        bits = torch.from_numpy(value.view(np.int16) if value.dtype.name == "bfloat16" else value)
        tensors[weight.name] = bits.view(torch.bfloat16) if value.dtype.name == "bfloat16" else bits
        yield weight
    torch.save(tensors, file)


def write_safetensors(shard: list[FileWeight], file: Path) -> Iterator[FileWeight]:
    """Writes the header, then one tensor at a time (the library would hold all of them); yields each weight."""
    header: dict = {"__metadata__": {"format": "pt"}}
    end = 0
    for weight in shard:
        begin, end = end, end + weight.nbytes
        dtype = SAFETENSORS_NAMES[weight.dtype.name]
        header[weight.name] = {"dtype": dtype, "shape": weight.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of eight
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for weight in shard:
            stream.write(weight.read().reshape(-1).view(np.uint8))
            yield weight


def convert(
    source: Path, out: Path, *, layout: str, max_shard_bytes: int | None = None, console: Console | None = None
) -> None:
    """Writes the folder `out` from the converted checkpoint `source`.

    Raises CheckpointError or ConfigError, and then leaves nothing at `out`.
    """
    console = console or Console(stderr=True)
    began = time.monotonic()
    source = find(source)
    config = LLaMAVIDLlavaConfig.from_pretrained(source).require_whole(source)
    if layout == "documented":
        values, write, stem, suffix = documented_config(config), write_safetensors, "model", "safetensors"
    else:
        values, write, stem, suffix = original_config(config), write_torch, "pytorch_model", "bin"
        _require_torch()
    weights = file_weights(source, config, layout)
    groups = shards(weights, max_shard_bytes or SHARD_BYTES[layout])
    total = sum(weight.nbytes for weight in weights)
    single = layout == "documented" and len(groups) == 1
    weight_map = {}
    with folder.whole_folder(out) as partial, Progress(console=console) as progress:
        task = progress.add_task("writing", total=total)
        for number, group in enumerate(groups, 1):
            name = f"{stem}.{suffix}" if single else f"{stem}-{number:05d}-of-{len(groups):05d}.{suffix}"
            weight_map |= {weight.name: name for weight in group}
            for weight in write(group, partial / name):
                progress.advance(task, weight.nbytes)
        if not single:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            _write_json(partial / f"{stem}.{suffix}.index.json", index)
        for file in _companions(source):
            (shutil.copytree if file.is_dir() else shutil.copy)(file, partial / file.name)
        _write_json(partial / "config.json", values)
    report = Table(title=printable(out), show_header=False)
    report.add_row("weights", f"{len(weights)} in {len(groups)} files")
    report.add_row("size", f"{total / 2**30:.3f} GiB ({total:,} bytes)")
    report.add_row("time", f"{time.monotonic() - began:.1f} s")
    console.print(report)


def _require_torch() -> None:
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError:
        raise CheckpointError("writing .bin files needs torch: pip install torch") from None


def _companions(source: Path) -> Iterator[Path]:
    names = (*folder.TEXT_FILES, "preprocessor_config.json", VIDEO_FILE, "qformer_tokenizer")
    return (source / name for name in names if find(source / name).exists())


def _write_json(file: Path, values: dict) -> None:
    file.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


@command()
def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="python -m conversion.jax_to_torch", description=__doc__)
    parser.add_argument("source", metavar="DIR", type=local, help="a converted checkpoint")
    parser.add_argument("out", metavar="OUT", type=local, help="the folder to make")
    parser.add_argument("--layout", choices=tuple(SHARD_BYTES), required=True)
    parser.add_argument("--max-shard-bytes", metavar="N", type=int, help="size of one weight file (1 or 5 GiB)")
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax reports its own steps as warnings
    options = parser.parse_args(arguments)
    convert(options.source, options.out, layout=options.layout, max_shard_bytes=options.max_shard_bytes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
