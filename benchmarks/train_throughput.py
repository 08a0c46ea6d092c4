"""Measures a train step: tokens/s, seconds and model-FLOPs utilisation, on random data of one bucket.

    python -m benchmarks.train_throughput --model configs/models/llamavid_7b_224_video.yaml --layers 4 --llama-only

The step is the one that train.py runs, with stage 2's trained parameters, AdamW and clipping.  `benchmarks.device`
compares it with PyTorch's.
"""

import dataclasses
import sys
from argparse import Namespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.timing import WARM_UP, seconds
from llamavid_jax.config.schema import LLaMAVIDLlavaConfig
from llamavid_jax.errors import Parser, command
from llamavid_jax.models.flops import PARTS, flops_per_step
from llamavid_jax.models.llama_vid import LlamaVid
from llamavid_jax.models.stack import REMAT
from llamavid_jax.models.structure import Structure, params_of
from llamavid_jax.parallel.chips import peak_flops
from llamavid_jax.parallel.sharding import param_shardings
from llamavid_jax.shapes import TEXT, Batch, RowShape
from llamavid_jax.training.config import LoopConfig, OptimizerConfig
from llamavid_jax.training.layout import batch_sharding, run_mesh
from llamavid_jax.training.optimizer import make_optimizer
from llamavid_jax.training.step import StepMetrics, TrainState, make_train_step

QUESTION_TOKENS = 64


def random_batch(config: LLaMAVIDLlavaConfig, rows: int, shape: RowShape) -> Batch:
    """Rows without padding: one question for all frames, their tokens first, every position labelled."""
    random = np.random.default_rng(0)
    size, visual = config.vision_tower_config.image_size, shape.frames * config.tokens_per_frame
    places = np.arange(shape.tokens, dtype=np.int32)
    ids = random.integers(0, config.text_config.vocab_size, (rows, shape.tokens), np.int32)
    questions = (rows, shape.questions, QUESTION_TOKENS)

    def of_each_row(values: Any) -> np.ndarray:
        return np.tile(np.asarray(values, np.int32), (rows, 1))

    return Batch(
        frames=random.integers(0, 256, (rows, shape.frames, size, size, 3), np.uint8),
        pair_frame=of_each_row(range(shape.pairs)),
        pair_question=of_each_row([0] * shape.pairs),
        question_ids=random.integers(0, config.qformer_config.vocab_size, questions, np.int32),
        question_mask=np.ones(questions, bool),
        token_ids=ids,
        visual_index=of_each_row(np.where(places < visual, places, TEXT)),
        labels=ids,
        segment_ids=of_each_row(places * 0 + 1),
        positions=of_each_row(places),
    )


def trained_model(config: LLaMAVIDLlavaConfig, remat: str = "none") -> LlamaVid:
    """The model of the step, with float32 parameters that are always the same."""
    return LlamaVid(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16, remat=remat)


def jax_seconds(config: LLaMAVIDLlavaConfig, shape: RowShape, options: Namespace) -> tuple[float, int, StepMetrics]:
    """Seconds of one step, the number of devices that share it, and the metrics of the first step."""
    dtype, mesh = jnp.bfloat16, run_mesh(options.mesh)

    def make() -> LlamaVid:
        return trained_model(config, options.remat)

    def init() -> dict[str, jax.Array]:
        params = params_of(make())
        return {path: value if path in trains else value.astype(dtype) for path, value in params.items()}

    with jax.set_mesh(mesh):
        structure = Structure(nnx.eval_shape(make))
        trains = {path for path in structure.shapes if trained_parts(options.llama_only)[path.split(".")[0]]}
        shardings = param_shardings(structure.shapes, config, mesh)
        params = jax.jit(init, out_shardings=shardings)()
        trained = {path: params.pop(path) for path in trains}
        optimizer = OptimizerConfig()
        step = make_train_step(
            structure, optimizer, LoopConfig(batch_size=options.rows, remat=options.remat),
            dict.fromkeys(trained, 1.0), WARM_UP + options.steps,
        )  # fmt: skip
        batch = jax.device_put(random_batch(config, options.rows, shape), batch_sharding(mesh))
        state, said = TrainState(jnp.int32(0), trained, make_optimizer(optimizer).init(trained)), []

        def run() -> None:
            nonlocal state
            state, metrics = step(state, params, batch)
            said.append(metrics)

        return seconds(run, lambda: jax.block_until_ready(state), options.steps), mesh.size, said[0]


def trained_parts(llama_only: bool) -> dict[str, bool]:
    return {part: part == "llama" if llama_only else part != "vision" for part in PARTS}


@command()
def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="train_throughput", description="Speed of a train step.", allow_abbrev=False)
    parser.add_argument("--model", default="configs/models/tiny.yaml", metavar="FILE", help="one of configs/models/")
    parser.add_argument("--layers", type=int, metavar="N", help="keep N of LLaMA's layers, to fit one device")
    parser.add_argument("--rows", type=int, default=8, metavar="N")
    parser.add_argument("--tokens", type=int, default=2048, metavar="N", help="tokens of a row")
    parser.add_argument("--frames", type=int, default=64, metavar="N", help="frames of a row")
    parser.add_argument("--steps", type=int, default=10, metavar="N")
    parser.add_argument("--remat", choices=REMAT, default="full")
    parser.add_argument("--mesh", default="", help="such as fsdp=4,tensor=2; all devices on fsdp by default")
    parser.add_argument("--llama-only", action="store_true", help="only text, and only LLaMA is trained")
    options = parser.parse_args(arguments)
    config = LLaMAVIDLlavaConfig.from_yaml(options.model)
    if options.layers:
        text = dataclasses.replace(config.text_config, num_hidden_layers=options.layers)
        config = dataclasses.replace(config, text_config=text)
    frames = 0 if options.llama_only else options.frames
    if frames * config.tokens_per_frame > options.tokens:
        parser.error(f"{frames} frames are {frames * config.tokens_per_frame} tokens; --tokens must hold them")
    tokens = options.rows * options.tokens

    took, devices, _ = jax_seconds(config, RowShape(frames, frames, min(frames, 1), options.tokens), options)

    kind = jax.devices()[0].device_kind
    sizes = {"pairs": options.rows * frames, "question_tokens": QUESTION_TOKENS, "row_tokens": options.tokens}
    trains = trained_parts(options.llama_only)
    flops = flops_per_step(config, trains, frames=options.rows * frames, rows=options.rows, **sizes)
    peak = peak_flops(kind)
    used = f"{flops / took / (peak * devices):.1%} of the peak" if peak else f"{flops / took / 1e12:.3g} TFLOP/s"
    print(f"{options.model}, {devices} × {kind}, {options.rows} rows of {frames} frames and {options.tokens} tokens")
    print(f"{took * 1e3:.1f} ms a step, {tokens / took:,.0f} tokens/s, {used}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
