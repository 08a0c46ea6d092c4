"""PyTorch → JAX: `python -m conversion.torch_to_jax SRC OUT`.

SRC is a LLaMA-VID checkpoint in the original or the documented layout, or a LLaMA (a folder or a `.gguf` file) whose
other parts come from `--vision`, `--qformer` and `--projectors`.  OUT gets config.json, `weights/` (Orbax), both
tokenizers and the image settings: all that `from_pretrained` needs.  Weights stream one by one, so memory holds one
tensor at a time.  The CRC-32 of `.bin` files is checked; the SHA-256 of every file is printed, and compared with
`--verify FILE`, because the other formats have no checksums.
"""

import dataclasses
import logging
import math
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from llamavid_jax import copies
from llamavid_jax.commands.program import keep_programs
from llamavid_jax.errors import CheckpointError, Parser, command, printable
from llamavid_jax.files import find, local
from llamavid_jax.media.image_processor import LLaMAVIDLlavaImageProcessor
from llamavid_jax.models.quantize import quantize_kernels
from llamavid_jax.models.structure import flat_paths
from llamavid_jax.weights.files import Weight, to_jax
from llamavid_jax.weights.llama import QUANTISED

from . import folder
from .model_card import write_card
from .orbax_store import LayerWriter
from .plan import LEFTOVERS, Plan, plan, random_layer
from .read_gguf import write_tokenizer
from .read_torch import checkpoint_files
from .sources import model_config, open_sources
from .stored_tensor import count_not_finite
from .sums import sha256_sums, verify

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def leaf_dtypes(plan: Plan, dtype: str) -> dict[str, np.dtype]:
    """The stored type of every parameter: `dtype`, or ("keep") the one that holds all its layers exactly."""
    if dtype != "keep":
        return dict.fromkeys(plan.shapes, DTYPES[dtype])
    dtypes: dict[str, np.dtype] = {}
    for (path, _), fill in plan.fills.items():
        dtypes[path] = np.dtype(jnp.promote_types(dtypes.get(path, fill.tensor.dtype), fill.tensor.dtype))
    usual = max(set(dtypes.values()), key=list(dtypes.values()).count, default=DTYPES["float32"])
    return {path: dtypes.get(path, usual) for path in plan.shapes}


def write_weights(
    plan: Plan, dtypes: dict[str, np.dtype], out: Path, seed: int | None, quantize: str | None, console: Console
) -> int:
    """Streams every tensor into the checkpoint at `out`, in the order in which the files hold them; returns bytes."""
    stacked = {path for path, index in plan.fills if index is not None} | {
        weight.path for weight in plan.missing if weight.index is not None
    }

    def few_bits(leaves: dict[str, Any]) -> dict[str, Any]:
        return {
            path: quantize_kernels(x, QUANTISED[path], quantize) if path in QUANTISED else x
            for path, x in leaves.items()
        }

    whole = {path: jax.ShapeDtypeStruct(shape, dtypes[path]) for path, shape in plan.shapes.items()}
    stored = whole if quantize is None else flat_paths(jax.eval_shape(few_bits, whole))
    arrays = LayerWriter(out, stored, {path for path in stored if {path, path.rpartition(".")[0]} & stacked})

    def write(weight: Weight, value: np.ndarray) -> None:
        value = value.astype(dtypes[weight.path], copy=False)
        if count_not_finite(value):
            plan.not_finite.append(weight.name)
        if weight.path in stored:
            arrays.write(weight.path, weight.index, value)
            return
        for path, part in flat_paths(few_bits({weight.path: value[None]})).items():
            arrays.write(path, weight.index, np.asarray(part[0]))

    fills = sorted(plan.fills.values(), key=lambda fill: (str(fill.tensor.file), fill.tensor.offset))
    columns = (TextColumn("converting"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=sum(fill.tensor.nbytes for fill in fills))
        for fill in fills:
            write(fill.weight, to_jax(fill.read(seed), fill.weight))
            progress.advance(task, fill.tensor.nbytes)
    for weight in plan.missing:
        write(weight, random_layer(weight, weight.layer_shape, seed))
    bits = (4 if leaf.dtype == jnp.int4 else 8 * leaf.dtype.itemsize for leaf in stored.values())
    return sum(leaf.size * size // 8 for leaf, size in zip(stored.values(), bits, strict=True))


def convert(
    source: Path,
    out: Path,
    *,
    dtype: str = "keep",
    tokenizer: Path | None = None,
    bert_tokenizer: Path | None = None,
    vision: Path | None = None,
    qformer: Path | None = None,
    projectors: Path | None = None,
    config_file: Path | None = None,
    image_size: int | None = None,
    init_missing: int | None = None,
    quantize: str | None = None,
    listing: Path | None = None,
    console: Console | None = None,
) -> Plan:
    """Writes the folder `out`; see the command line for the arguments.

    Raises CheckpointError or `llamavid_jax.errors.ConfigError`, and then leaves nothing at `out`.
    """
    console = console or Console(stderr=True)
    began = time.monotonic()
    for origin in (source, tokenizer, bert_tokenizer, vision, qformer, projectors, listing):
        if origin is not None:
            copies.fetch_all(origin)
    if not source.exists():
        raise CheckpointError(f"{source} does not exist; give the folder or the file of a checkpoint")
    config = model_config(source, config_file, image_size)
    home = source if source.is_dir() else source.parent
    files = [file for origin in (source, vision, qformer, projectors) if origin for file in checkpoint_files(origin)]
    files += folder.text_files(home, tokenizer, bert_tokenizer)
    sums = None
    if listing is not None:
        sums = sha256_sums(files)
        verify(sums, listing)
    sources = open_sources(source, vision, qformer, projectors, resizable=image_size is not None)
    found = plan(config, sources, init_missing is not None)
    with folder.whole_folder(out) as partial:
        if source.suffix == ".gguf" and tokenizer is None:
            write_tokenizer(source, partial)
        notes = folder.copy_tokenizers(home, tokenizer, bert_tokenizer, partial, config)
        images = LLaMAVIDLlavaImageProcessor.of(config)
        dataclasses.replace(images, **folder.video_rate(home)).save_pretrained(partial)
        dtypes = leaf_dtypes(found, dtype)
        written = write_weights(found, dtypes, partial / "weights", init_missing, quantize, console)
        (config.quantized(quantize) if quantize else config).save_pretrained(partial)
        parameters = sum(map(math.prod, found.shapes.values()))
        stored = quantize or ", ".join(sorted({str(kind) for kind in dtypes.values()}))
        write_card(partial, out.absolute().name, source.absolute().name, config, parameters, stored)
        notes += [f"{digest}  {file.name}" for file, digest in (sums or sha256_sums(files)).items()]
    _report(console, found, out, written, time.monotonic() - began, notes)
    return found


def _report(console: Console, plan: Plan, out: Path, written: int, seconds: float, notes: list[str]) -> None:
    table = Table(title=printable(out), show_header=False)
    table.add_row("weights", f"{len(plan.fills)}")
    table.add_row("parameters", f"{len(plan.shapes)}")
    table.add_row("size", f"{written / 2**30:.3f} GiB ({written:,} bytes)")
    table.add_row("time", f"{seconds:.1f} s")
    console.print(table)
    resized = [fill.weight.name for fill in plan.fills.values() if fill.resize]
    lines = [
        *_named("started at random", dict.fromkeys(weight.path for weight in plan.missing)),
        *_named("not used", plan.unused),
        *_named("overridden by a later file", plan.overridden),
        *_named("resized", resized),
        *_named("WARNING, NaN or infinite numbers in", plan.not_finite),
        *notes,
    ]
    if plan.leftovers:
        lines.append(f"skipped {plan.leftovers} computed buffers ({', '.join('*' + name for name in LEFTOVERS)})")
    for line in lines:
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def _named(what: str, names: Iterable[str]) -> list[str]:
    names = list(names)
    return [f"{what}: {', '.join(names)}"] if names else []


@command()
def main(arguments: list[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("source", metavar="SRC", type=local, help="LLaMA-VID or LLaMA folder, weight file or .gguf")
    parser.add_argument("out", metavar="OUT", type=local, help="the folder to make")
    parser.add_argument("--dtype", choices=("keep", *DTYPES), default="keep", help="stored type (keep: bit-exact)")
    parser.add_argument("--quantize", choices=("int8", "int4"), help="LLaMA's kernels, for inference on small chips")
    parser.add_argument("--tokenizer", metavar="DIR", type=local, help="LLaMA tokenizer, where SRC lacks it")
    parser.add_argument("--bert-tokenizer", metavar="DIR", type=local, help="folder with bert-base-uncased's vocab.txt")
    parser.add_argument("--vision", metavar="FILE", type=local, help="eva_vit_g.pth, or a CLIP")
    parser.add_argument("--qformer", metavar="FILE", type=local, help="instruct_blip_*_trimmed.pth, or a BERT")
    parser.add_argument("--projectors", metavar="FILE", type=local, help="stage 1's mm_projector.bin")
    parser.add_argument("--config", metavar="FILE", type=find, help="sizes to use instead of SRC's (.yaml or .json)")
    parser.add_argument(
        "--image-size", metavar="N", type=int, help="resize the position table to N pixels, such as 336"
    )
    parser.add_argument("--verify", metavar="FILE", type=local, help="SHA-256 sums that SRC must have, from sha256sum")
    parser.add_argument("--init-missing", metavar="SEED", type=int, help="random values for weights that no file holds")
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax reports its own steps as warnings
    options = vars(parser.parse_args(arguments))
    options["config_file"], options["listing"] = options.pop("config"), options.pop("verify")
    keep_programs()
    convert(options.pop("source"), options.pop("out"), **options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
