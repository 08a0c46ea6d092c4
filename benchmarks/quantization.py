"""What quantisation costs: the table of docs/quantization.md, against the same weights in float32.

    python -m benchmarks.quantization docs/quantization.md --data build/demo_data/instruct_test.json

Logits are of prompts and answers; all but the first few tokens are decoded one at a time, so that errors of the cache
count.  `logits` is the relative error ‖a − b‖ / ‖b‖ and `top-1` the share of positions with the same likeliest token,
on the recorded checkpoints of tests/golden and on questions about clips that the shipped demo model has not seen;
`exact` is the share of its answers that are right.  Everything runs on the CPU.  Only the text between the file's two
marks is replaced.
"""

import functools
import itertools
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from conversion.check import read_expected
from conversion.torch_to_jax import main as torch_to_jax
from demo.evaluate import answers, questions_of
from llamavid_jax import LLaMAVIDLlavaConfig, LLaMAVIDLlavaForConditionalGeneration, LLaMAVIDLlavaProcessor
from llamavid_jax.checkpoints.weights import abstract_params
from llamavid_jax.errors import InputError, Parser, command
from llamavid_jax.files import write_files
from llamavid_jax.inference.request import read_request
from llamavid_jax.models.kv_cache import KVCache
from llamavid_jax.models.llama_vid import LlamaVid
from llamavid_jax.models.quantize import quantize_linear
from llamavid_jax.models.structure import Structure, params_of
from llamavid_jax.shapes import TEXT, bucket, pad_rows
from llamavid_jax.weights import vision

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
COLUMNS = (
    "weights",
    "cache",
    "vision tower",
    "7B weights",
    "golden: logits",
    "top-1",
    "demo: logits",
    "top-1",
    "exact",
)
ROOT = Path(__file__).parent.parent
GOLDEN = ("short_video_mean", "image_none")
PREFILLED = 8  # tokens of a row; the rest are decoded
ROW = 96  # tokens, so that one program serves all cases of a model
CASES = 40  # questions about clips whose logits are compared
SEVEN = ROOT / "configs" / "models" / "llamavid_7b_224_video.yaml"


class Variant(NamedTuple):
    """One row of the table."""

    dtype: str
    quantize: str | None
    kv_cache: str
    vision: str | None


VARIANTS = [
    Variant("float32", None, "float", None),
    Variant("bfloat16", None, "float", None),
    Variant("bfloat16", None, "int8", None),
    Variant("bfloat16", "int8", "float", None),
    Variant("bfloat16", "int8", "int8", None),
    Variant("bfloat16", "int8", "int8", "int8"),
    Variant("bfloat16", "int4", "float", None),
    Variant("bfloat16", "int4", "int8", None),
]


def load(folder: Path, variant: Variant) -> LLaMAVIDLlavaForConditionalGeneration:
    model = LLaMAVIDLlavaForConditionalGeneration.from_pretrained(
        folder, dtype=variant.dtype, quantize=variant.quantize, kv_cache=variant.kv_cache
    )
    if variant.vision:
        whole = model.structure.model(model.params)
        rows_by_path = {row.path: row for row in vision.ROWS}
        for part, names in (("attn", ("qkv", "out")), ("mlp", ("fc1", "fc2"))):
            for name in names:
                linear = getattr(getattr(whole.vision.blocks, part), name)
                quantize_linear(linear, rows_by_path[f"vision.blocks.{part}.{name}.kernel"], variant.vision)
        model.structure, model.params = Structure(whole), params_of(whole)
    return model


@functools.partial(jax.jit, static_argnums=0)
def decoded_logits(
    structure, params, token_ids: Int[Array, "1 T"], visual: Float[Array, "1 N D"], visual_index: Int[Array, "1 T"]
) -> Float[Array, "T V"]:
    """Logits of a row whose first tokens are prefilled and whose remaining ones are decoded one by one."""
    model: LlamaVid = structure.model(params)
    row = model.merge(token_ids, visual, visual_index)
    length = row.shape[1]
    hidden, prompt = model.llama.prefill(row[:, :PREFILLED])

    def step(cache, position):
        new = jax.lax.dynamic_slice_in_dim(row, position, 1, axis=1)
        hidden, cache = model.llama.decode(new, position[None], cache)
        return cache, hidden[0, 0]

    cache = KVCache(prompt, prompt.room(length - PREFILLED), jnp.int32(0))
    _, rest = jax.lax.scan(step, cache, jnp.arange(PREFILLED, length))
    return model.llama.logits(jnp.concatenate([hidden[0], rest]))


def logits_of(model: LLaMAVIDLlavaForConditionalGeneration, *request: Any, **visuals: Any) -> np.ndarray:
    """Logits of all tokens of all rows of a request, concatenated."""
    table, rows = model._merge(read_request(model.config, *request, **visuals))
    found = []
    for row in rows:
        size = bucket(len(row.token_ids), ROW)
        ids, index = pad_rows([row.token_ids], 1, size, 0), pad_rows([row.visual_index], 1, size, TEXT)
        found.append(np.asarray(decoded_logits(model.structure, model.params, ids, table[None], index)))
        found[-1] = found[-1][: len(row.token_ids)]
    return np.concatenate(found)


def golden_logits(work: Path, variant: Variant) -> np.ndarray:
    """Logits for the videos of the recorded cases, whose checkpoints are converted into `work`."""
    found = []
    for name in GOLDEN:
        expected = read_expected(ROOT / "tests" / "golden" / name / "expected.npz")
        pixels = [expected[f"video.pixels.{number}"] for number in range(len(expected["video.input_ids"]))]
        prompts = json.loads(str(expected["video.prompts"]))
        model = load(work / name, variant)
        found.append(logits_of(model, expected["video.input_ids"], pixel_values=pixels, prompts=prompts))
    return np.concatenate(found)


def demo_logits(model: LLaMAVIDLlavaForConditionalGeneration, processor: Any, cases: list[tuple]) -> np.ndarray:
    """Logits for questions with their true answers."""
    found = []
    for video, question, truth in cases:
        asked = [{"type": "video", "path": video}, {"type": "text", "text": question}]
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": truth}]
        inputs = processor.chat(messages, add_generation_prompt=False)
        found.append(logits_of(model, **inputs))
    return np.concatenate(found)


def compare(got: np.ndarray, wanted: np.ndarray) -> list[str]:
    """Relative error and top-1 agreement, as table cells."""
    error = np.linalg.norm(got - wanted) / np.linalg.norm(wanted)
    return [f"{error:.2%}", f"{np.mean(got.argmax(-1) == wanted.argmax(-1)):.1%}"]


def gib_of_7b(variant: Variant) -> float:
    """GiB of the 7B model's parameters."""
    config = LLaMAVIDLlavaConfig.from_yaml(SEVEN)
    config = config.quantized(variant.quantize) if variant.quantize else config
    leaves = abstract_params(config, variant.dtype)
    bits = {path: 4 if leaf.dtype == jnp.int4 else 8 * leaf.dtype.itemsize for path, leaf in leaves.items()}
    if variant.vision:  # eight bits a weight, and a scale of 16 bits for each block of 64
        bits |= {path: 8.25 for path in bits if path.startswith("vision.blocks") and path.endswith(".kernel")}
    return sum(leaf.size * bits[path] for path, leaf in leaves.items()) / 8 / 2**30


def rows(data: Path, limit: int) -> Iterator[list[str]]:
    """Yields the cells of every variant; the first variant is the reference for all."""
    demo = ROOT / "demo" / "model"
    processor = LLaMAVIDLlavaProcessor.from_pretrained(demo)
    records = json.loads(data.read_text(encoding="utf-8"))[:limit]
    cases = []
    for record in records[:CASES]:
        _, question, truth = next(questions_of(record))
        cases.append((data.parent / record["video"], question, truth))
    with tempfile.TemporaryDirectory() as work:
        for name in GOLDEN:
            torch_to_jax([str(ROOT / "tests" / "golden" / name), f"{work}/{name}"])
        wanted: list[np.ndarray] = []
        for variant in VARIANTS:
            model = load(demo, variant)
            found = [golden_logits(Path(work), variant), demo_logits(model, processor, cases)]
            wanted = wanted or found
            right = [answer == truth for *_, truth, answer in answers(model, processor, records, data.parent, batch=8)]
            near = [cell for pair in zip(found, wanted, strict=True) for cell in compare(*pair)]
            kinds = [variant.quantize or variant.dtype, variant.kv_cache, variant.vision or variant.dtype]
            yield [*kinds, f"{gib_of_7b(variant):.1f} GiB", *near, f"{np.mean(right):.1%} of {len(right)}"]


@command()
def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="quantization", description="Measures what quantisation costs.", allow_abbrev=False)
    parser.add_argument("file", type=Path, help="docs/quantization.md")
    parser.add_argument("--data", type=Path, required=True, help="instruct_test.json of demo/make_data.py")
    parser.add_argument("--limit", type=int, default=100, help="number of clips for the demo model's accuracy (100)")
    options = parser.parse_args(arguments)
    before, _, rest = options.file.read_text(encoding="utf-8").partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise InputError(f"{options.file} has no place for the table; write {BEGIN} and {END} into it")
    lines = []
    for cells in itertools.chain([COLUMNS, ["---"] * len(COLUMNS)], rows(options.data, options.limit)):
        lines.append("| " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    table = "\n".join(lines)
    write_files(options.file.parent, {options.file.name: f"{before}{BEGIN}\n{table}\n{END}{after}".encode()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
