"""Compares JAX with PyTorch on a CPU, on the same random weights in float32: docs/performance.md, "On a CPU".

    python -m benchmarks.cpu --rounds 15

Two blocks of ViT-g on four frames; prefill of 512 tokens by a LLaMA of 135M parameters; decoding after them.  Both
sides alternate in one process, with as many threads as cores.  The table has medians over the rounds: wall time, and
CPU time of all cores, which is comparable even on a busy machine.  PyTorch is `torch_side.py`, eager or (--compiled)
under `torch.compile`.  `error` is ‖ours − theirs‖ / ‖theirs‖ of a run's result.
"""

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from benchmarks import torch_side
from benchmarks.device import apart
from llamavid_jax import LLaMAVIDLlavaConfig, LLaMAVIDLlavaForConditionalGeneration
from llamavid_jax.config.parts import LlamaConfig, LLaMAVIDLlavaVisionConfig
from llamavid_jax.errors import Parser, command
from llamavid_jax.inference.generate import BLOCK_STEPS, DecodeState, answer_room, decode_block, prefill
from llamavid_jax.inference.sampling import Sampling
from llamavid_jax.media.video import cores
from llamavid_jax.models.kv_cache import KVCache
from llamavid_jax.models.structure import Structure, params_of
from llamavid_jax.models.vision import VisionTower
from llamavid_jax.shapes import TEXT

TOKENS, FRAMES = 512, 4
VIT_G = LLaMAVIDLlavaVisionConfig(num_hidden_layers=2)
SMALL = LlamaConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, head_dim=64, max_position_embeddings=8192, rope_theta=1e5, tie_word_embeddings=True,
)  # fmt: skip
COLUMNS = "work", "JAX, ms", "PyTorch, ms", "PyTorch / JAX", "JAX, CPU ms", "PyTorch, CPU ms", "error"
Run = Callable[[], Any]
Pair = tuple[str, Run, Run, float, int]  # the work, ours, PyTorch's, their relative error, and units of work in a run


def tower(compiled: Callable) -> Iterator[Pair]:
    make = partial(VisionTower, VIT_G, dtype=jnp.float32, param_dtype=jnp.float32)
    structure = Structure(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))
    params = jax.jit(lambda: params_of(make(rngs=nnx.Rngs(0))))()
    pixels = np.random.default_rng(0).standard_normal((FRAMES, 3, VIT_G.image_size, VIT_G.image_size), np.float32)
    ours = partial(jax.jit(lambda params, x: structure.model(params)(x)), params, jnp.asarray(pixels))
    module = compiled(torch_side.Tower({f"vision.{path}": value for path, value in params.items()}, VIT_G))
    theirs = partial(module, torch.from_numpy(pixels))
    yield f"{VIT_G.num_hidden_layers} blocks of ViT-g, {FRAMES} frames", ours, theirs, apart(ours(), theirs()), 1


def language(compiled: Callable) -> Iterator[Pair]:
    config = LLaMAVIDLlavaConfig.from_yaml("configs/models/tiny.yaml")
    model = LLaMAVIDLlavaForConditionalGeneration(dataclasses.replace(config, text_config=SMALL), dtype="float32")
    own, greedy = (model.structure, model.params), Sampling(np.float32(0), np.int32(0), np.float32(1))
    ids = np.random.default_rng(0).integers(3, SMALL.vocab_size, (1, TOKENS))
    row, visual = jnp.asarray(ids, jnp.int32), jnp.zeros((1, 1, SMALL.hidden_size))
    lengths = np.array([TOKENS], np.int32)
    ours = partial(prefill, *own, row, visual, jnp.full_like(row, TEXT), lengths, np.uint32(0), greedy, greedy=True)
    llama = compiled(torch_side.Llama(model.params, SMALL))
    theirs = partial(llama, torch.from_numpy(ids), last=True)
    first, keys, prompt = ours()
    _, pairs = theirs()
    name = f"LLaMA of 135M: prefill of {TOKENS} tokens"
    yield name, ours, theirs, apart(prompt.k[-1, 0], pairs[-1][0][0].transpose(0, 1)), 1

    room = answer_room(prompt, slots=TOKENS)
    state = DecodeState(first, jnp.asarray(lengths), jnp.zeros(1, bool), KVCache(prompt, room, jnp.int32(0)), keys)
    kept = [tuple(torch.nn.functional.pad(x, (0, 0, 0, TOKENS)).contiguous() for x in pair) for pair in pairs]
    token, position = torch.tensor([[int(first[0])]]), torch.tensor([TOKENS])

    def block() -> jax.Array:
        nonlocal state
        state, tokens = decode_block(*own, state, np.int32(BLOCK_STEPS), np.int32(-1), greedy, greedy=True)
        return tokens[0]

    def steps() -> torch.Tensor:
        nonlocal token, position
        tokens = []
        for _ in range(BLOCK_STEPS):
            tokens.append(token)
            token = llama(token, position, kept)[0][:, -1].argmax(-1, keepdim=True)
            position = position + 1
        return torch.cat(tokens).flatten()

    yield "LLaMA of 135M: a token behind them", block, steps, apart(block(), steps()), BLOCK_STEPS


def took(run: Run) -> tuple[float, float]:
    """Wall seconds, and CPU seconds of all cores."""
    wall, cpu = time.perf_counter(), time.process_time()
    jax.block_until_ready(run())
    return time.perf_counter() - wall, time.process_time() - cpu


@command("cpu")
def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="cpu", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=15, metavar="N")
    parser.add_argument("--compiled", action="store_true", help="PyTorch under torch.compile")
    options = parser.parse_args(arguments)
    if not 1 <= options.rounds <= (most := TOKENS // BLOCK_STEPS - 2):  # so many fit PyTorch's cache
        parser.error(f"--rounds is {options.rounds}; give 1 to {most}")
    torch.set_num_threads(cores())
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("jax", "torch"))
    print(f"{cores()} cores, {versions}{', compiled' if options.compiled else ''}\n")
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    with torch.no_grad():
        for part in (tower, language):
            for name, ours, theirs, error, of in part(torch.compile if options.compiled else lambda module: module):
                rounds = [(took(ours), took(theirs)) for _ in range(1 + options.rounds)][1:]
                times = np.median(np.array(rounds), axis=0) * 1000 / of
                (wall, cpu), (their_wall, their_cpu) = times.tolist()
                ratio = statistics.median(theirs[0] / ours[0] for ours, theirs in rounds)
                numbers = f"{wall:.1f} | {their_wall:.1f} | {ratio:.2f} | {cpu:.1f} | {their_cpu:.1f}"
                print(f"| {name} | {numbers} | {error:.0e} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
