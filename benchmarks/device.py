"""Compares JAX with PyTorch on a device, on the same random weights: the table of docs/performance.md.

    python -m benchmarks.device --kept build/device.jsonl                          # one accelerator, 7B sizes
    python -m benchmarks.device --kept build/rehearsal.jsonl --rehearse            # the CPU, in a minute

All runs in one process.  Each part is written to --kept as a line of JSON once it is measured, and the same command
resumes at the part where it was stopped.  `error` is ‖ours − theirs‖ / ‖theirs‖: of the tower's features; of the last
layer's keys and values for the prompt, or for the next token; of the first train step's gradient norm.  PyTorch is
`torch_side.py` under `torch.compile`, its decode step as a CUDA graph.  A video (--film) is compared with reading it in
order.  Without PyTorch its column is empty.
"""

import os

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # two frameworks share the memory

import dataclasses
import gc
import importlib.util
import json
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import film
from benchmarks.timing import WARM_UP, seconds
from benchmarks.train_throughput import jax_seconds, random_batch, trained_model
from llamavid_jax import LLaMAVIDLlavaConfig, LLaMAVIDLlavaForConditionalGeneration
from llamavid_jax.errors import Parser, command
from llamavid_jax.inference.generate import BLOCK_STEPS, DecodeState, answer_room, decode_block, prefill
from llamavid_jax.inference.sampling import Sampling
from llamavid_jax.media.image_processor import LLaMAVIDLlavaImageProcessor
from llamavid_jax.media.source import local_file
from llamavid_jax.models.kv_cache import KVCache
from llamavid_jax.models.structure import params_of
from llamavid_jax.shapes import TEXT, RowShape, bucket, pad_rows

if HAS_TORCH := importlib.util.find_spec("torch") is not None:
    import torch

    from benchmarks import torch_side

COLUMNS = "| work | unit | JAX | PyTorch | JAX / PyTorch | error |\n|---|---|---|---|---|---|"


def row(work: str, unit: str, ours: float, theirs: float | None = None, error: float | None = None) -> dict[str, Any]:
    return {"work": work, "unit": unit, "jax": ours, "torch": theirs, "error": error}


def apart(ours: Any, theirs: Any) -> float:
    """Relative error of an array of ours against their tensor."""
    ours, theirs = np.asarray(ours, np.float64), theirs.detach().double().cpu().numpy()
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def jax_time(run: Callable[[], Any], steps: int) -> float:
    last = None

    def step() -> None:
        nonlocal last
        last = run()

    return seconds(step, lambda: jax.block_until_ready(last), steps)


def torch_time(run: Callable[[], Any], steps: int) -> float:
    return seconds(run, torch.cuda.synchronize if torch.cuda.is_available() else lambda: None, steps)


def compiled(function: Any, mode: str | None = None) -> Any:
    """Compiles on a GPU only: a rehearsal does not wait for a compiler."""
    return torch.compile(function, mode=mode) if torch.cuda.is_available() else function


def model_of(options: Namespace, vision: int | None, text: int | None, quantization: str = "none") -> Any:
    """A model with random weights and the given numbers of layers in the two towers (None: all)."""
    config = LLaMAVIDLlavaConfig.from_yaml(options.model)
    parts = {"vision_tower_config": vision, "text_config": text}
    parts = {
        name: dataclasses.replace(getattr(config, name), num_hidden_layers=number)
        for name, number in parts.items()
        if number
    }
    config = dataclasses.replace(config, **parts)
    config = config if quantization == "none" else config.quantized(quantization)
    return LLaMAVIDLlavaForConditionalGeneration(config, dtype=options.dtype)


def tower(options: Namespace) -> Iterator[dict[str, Any]]:
    from llamavid_jax.models.llama_vid import encode_frames

    model, size = model_of(options, None, 1), options.frames
    vision = model.config.vision_tower_config
    pixels = np.random.default_rng(0).standard_normal((size, 3, vision.image_size, vision.image_size), np.float32)
    pixels = jnp.asarray(pixels, model.dtype)
    run = partial(encode_frames, model.structure, model.params, pixels)
    ours = size / jax_time(run, options.steps)
    theirs = error = None
    if HAS_TORCH:
        with torch.no_grad():
            module = compiled(torch_side.Tower(model.params, vision))
            own = torch_side.tensor(pixels)
            theirs = size / torch_time(partial(module, own), options.steps)
            error = apart(run(), module(own))
    yield row(f"vision tower, {vision.num_hidden_layers} blocks, batch {size}", "frames/s", ours, theirs, error)


Times = dict[str, float]  # seconds of prefill, and of decoding one token


def jax_language(model: Any, ids: np.ndarray, options: Namespace) -> tuple[Times, int, dict[str, np.ndarray]]:
    """Seconds, the prompt's next token, and the last layer's keys and values `[2, B, T, K, H]` of prompt and token."""
    text, greedy = model.config.text_config, Sampling(np.float32(0), np.int32(0), np.float32(1))
    row_ids, lengths = jnp.asarray(pad_rows([ids], 1, bucket(len(ids)), 0)), jnp.array([len(ids)], jnp.int32)
    visual, index = jnp.zeros((1, 1, text.hidden_size), model.dtype), jnp.full_like(row_ids, TEXT)
    own = model.structure, model.params
    run = partial(prefill, *own, row_ids, visual, index, lengths, np.uint32(0), greedy, greedy=True)
    took = {"prefill": jax_time(run, options.steps)}
    token, keys, prompt = run()
    first = int(token[0])
    cache = KVCache(prompt, answer_room(prompt, slots=bucket(BLOCK_STEPS * (options.steps + WARM_UP))), jnp.int32(0))
    state = DecodeState(token, lengths, jnp.zeros(1, bool), cache, keys)

    def block() -> jax.Array:
        nonlocal state
        state, tokens = decode_block(*own, state, np.int32(BLOCK_STEPS), np.int32(-1), greedy, greedy=True)
        return tokens

    took["decode"] = jax_time(block, options.steps) / BLOCK_STEPS
    seen = {
        name: np.stack([np.asarray(x[-1, :, :last], np.float32) for x in pair])
        for name, pair, last in (("prefill", state.cache.prompt, len(ids)), ("decode", state.cache.answer, 1))
    }
    return took, first, seen


def torch_language(
    llama: Any, ids: np.ndarray, first: int, seen: dict[str, np.ndarray], options: Namespace
) -> tuple[Times, Times]:
    """Seconds, and the errors of `seen` against the last layer's keys and values."""
    steps, device = BLOCK_STEPS * options.steps, llama.norm.device
    whole, own_ids = compiled(lambda ids: llama(ids, last=True)), torch.from_numpy(ids[None]).to(device)
    took = {"prefill": torch_time(partial(whole, own_ids), options.steps)}
    _, pairs = whole(own_ids)
    error = {"prefill": apart(seen["prefill"], torch.stack([x.transpose(1, 2) for x in pairs[-1]]))}
    room = 1 + WARM_UP + steps
    kept = [tuple(torch.nn.functional.pad(x, (0, 0, 0, room)) for x in pair) for pair in pairs]
    for x in (x for pair in kept for x in pair):
        torch._dynamo.mark_static_address(x)  # written in place, which a CUDA graph allows only for these

    def one(token: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        return llama(token, position, kept)[0][:, -1].argmax(-1, keepdim=True)

    one = compiled(one, mode="reduce-overhead")
    token, position = torch.tensor([[first]], device=device), torch.tensor([len(ids)], device=device)
    one(token, position)
    new = [x[:, :, len(ids) : len(ids) + 1].transpose(1, 2) for x in kept[-1]]
    error["decode"] = apart(seen["decode"], torch.stack(new))

    def step() -> None:
        nonlocal token
        position.add_(1)
        token = one(token, position).clone()

    took["decode"] = torch_time(step, steps)
    return took, error


def language(options: Namespace, quantization: str = "none") -> Iterator[dict[str, Any]]:
    """Prefill and decode of one row, greedily."""
    model = model_of(options, 1, options.layers, quantization)
    text = model.config.text_config
    ids = np.random.default_rng(0).integers(3, text.vocab_size, options.tokens)
    ours, first, seen = jax_language(model, ids, options)
    theirs: dict[str, float | None] = dict.fromkeys(ours)
    error: dict[str, float | None] = dict.fromkeys(ours)
    if HAS_TORCH:
        plain = model if quantization == "none" else model_of(options, 1, options.layers)
        with torch.no_grad():
            llama = torch_side.Llama(plain.params, text)
            llama = llama if quantization == "none" else llama.rounded()
            theirs, error = torch_language(llama, ids, first, seen, options)
    name = f"{text.num_hidden_layers} layers of {text.hidden_size}, {options.tokens} tokens"
    weights = f", {quantization} weights" if quantization != "none" else ""
    yield row(f"prefill, {name}{weights}", "s", ours["prefill"], theirs["prefill"], error["prefill"])
    rates = [took["decode"] and 1 / took["decode"] for took in (ours, theirs)]
    yield row(f"decode, {name}{weights}", "tokens/s", *rates, error["decode"])


def train(options: Namespace) -> Iterator[dict[str, Any]]:
    """A training step of LLaMA alone, with few layers, float32 parameters and optimizer state."""
    config = LLaMAVIDLlavaConfig.from_yaml(options.model)
    text = dataclasses.replace(config.text_config, num_hidden_layers=options.train_layers)
    vision = dataclasses.replace(config.vision_tower_config, num_hidden_layers=1)
    config = dataclasses.replace(config, text_config=text, vision_tower_config=vision)
    run = Namespace(rows=options.rows, steps=options.steps, mesh="fsdp=1", remat="none", llama_only=True)
    took, _, said = jax_seconds(config, RowShape(0, 0, 0, options.row_tokens), run)
    tokens = options.rows * options.row_tokens
    theirs = error = None
    if HAS_TORCH:
        torch.set_float32_matmul_precision("high")
        params = jax.jit(lambda: params_of(trained_model(config).llama))()
        params = {f"llama.{path}": value for path, value in params.items()}
        model = torch_side.Llama(params, text)
        ids = random_batch(config, options.rows, RowShape(0, 0, 0, options.row_tokens)).token_ids
        step = torch_side.train_step(model, torch.from_numpy(ids).long().to(model.norm.device), compiled)
        _, norm = step()
        error = abs(float(said.grad_norm) - float(norm)) / float(norm)
        theirs = tokens / torch_time(step, options.steps)
    yield row(
        f"train step, {options.train_layers} layers of {text.hidden_size}, {options.rows} rows of {options.row_tokens}",
        "tokens/s", tokens / took, theirs, error,
    )  # fmt: skip


def films(options: Namespace) -> Iterator[dict[str, Any]]:
    path, demo = str(local_file(options.film)), LLaMAVIDLlavaForConditionalGeneration.from_pretrained("demo/model")
    model = model_of(options, None, options.layers)
    model.tokenizer, model.qformer_tokenizer = demo.tokenizer, demo.qformer_tokenizer
    images = LLaMAVIDLlavaImageProcessor.of(model.config)
    tokens = 2 * len(film.plan_video(path, 1.0)) * model.config.tokens_per_frame + 1000
    taken = {name: wall for _, name, wall, *_ in film.measure(path, 1.0, film.stretched(model, tokens), images, 1)}
    theirs = taken.pop("plain: file to first word")
    yield row("film: file to first word (beside the plain reader)", "s", taken["session: file to first word"], theirs)
    yield from (row(f"film, {name}", "s", wall) for name, wall in taken.items() if name.startswith("alone"))
    yield row("film: second question", "s", taken["session: second question"])


PARTS: dict[str, Callable[[Namespace], Iterator[dict[str, Any]]]] = {
    "tower": tower,
    "language": language,
    "language int8": partial(language, quantization="int8"),
    "train": train,
    "film": films,
}
SEVEN = {"model": "configs/models/llamavid_7b_224_long_video.yaml", "dtype": "bfloat16", "layers": None}
SEVEN |= {"tokens": 7300, "frames": 128, "steps": 10, "train_layers": 4, "rows": 4, "row_tokens": 2048}
TINY = {"model": "configs/models/tiny.yaml", "dtype": "float32", "layers": 2}
TINY |= {"tokens": 90, "frames": 2, "steps": 1, "train_layers": 1, "rows": 1, "row_tokens": 64}


def line(found: dict[str, Any]) -> str:
    ratio = ""
    if found["torch"]:
        ratio = found["torch"] / found["jax"] if found["unit"] == "s" else found["jax"] / found["torch"]
        ratio = f"× {ratio:.2f}"
    numbers = (f"{found['jax']:.4g}", f"{found['torch']:.4g}" if found["torch"] else "", ratio)
    error = "" if found["error"] is None else f"{found['error']:.1e}"
    return "| " + " | ".join([found["work"], found["unit"], *numbers, error]) + " |"


@command("device")
def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="device", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--kept", required=True, metavar="FILE", help="JSON lines; parts in it are not repeated")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes")
    parser.add_argument("--layers", type=int, metavar="N", help="keep N of LLaMA's layers, to save time")
    parser.add_argument("--film", metavar="FILE", help="a video of up to an hour; without it this part is skipped")
    options = parser.parse_args(arguments)
    sizes = (TINY if options.rehearse else SEVEN) | ({"layers": options.layers} if options.layers else {})
    chosen = Namespace(**sizes, film=options.film)
    versions = {name: metadata.version(name) for name in ("jax", "torch") if name == "jax" or HAS_TORCH}
    about = {"device": jax.devices()[0].device_kind, **versions, **vars(chosen)}
    kept = Path(options.kept)
    kept.parent.mkdir(parents=True, exist_ok=True)
    lines = kept.read_text().splitlines(keepends=True) if kept.exists() else []
    lines = [text for text in lines if text.endswith("\n")]  # the last line may be incomplete
    kept.write_text("".join(lines))
    known = {one["part"]: one["rows"] for one in map(json.loads, lines) if one["about"] == about}
    print(", ".join(f"{name} {value}" for name, value in about.items()) + f"\n\n{COLUMNS}", flush=True)
    for part, measure in PARTS.items():
        if part == "film" and not options.film:
            continue
        if part not in known:
            known[part] = list(measure(chosen))
            with kept.open("a") as file:
                file.write(json.dumps({"part": part, "about": about, "rows": known[part]}) + "\n")
            gc.collect()
        print("\n".join(map(line, known[part])), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
