"""Small samples for training tests: random images, clips and text, and the tiny model's structure."""

import functools
import math
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from llamavid_jax import LLaMAVIDLlavaConfig
from llamavid_jax.data.examples import Example
from llamavid_jax.data.rows import lay_out_row
from llamavid_jax.models.llama_vid import LlamaVid
from llamavid_jax.models.structure import Structure
from llamavid_jax.shapes import Batch, RowShape
from llamavid_jax.text.qformer_tokenizer import QFormerTokenizer
from llamavid_jax.training.config import LoopConfig, OptimizerConfig
from llamavid_jax.training.optimizer import make_optimizer
from llamavid_jax.training.step import TrainState

ROOT = Path(__file__).parent
CONFIG = LLaMAVIDLlavaConfig.from_yaml(ROOT.parent / "configs" / "models" / "tiny.yaml")
QUESTIONS = ["what is the man doing?", "where do they go", "what"]
STAGES = {  # what trains in each stage of the paper
    1: {"vision.*": False, "qformer.*": False, "visual_tokens.*": True, "llama.*": False},
    2: {"vision.*": False, "qformer.*": True, "visual_tokens.*": True, "llama.*": True},
    3: {
        "vision.*": False,
        "qformer.*": False,
        "visual_tokens.projector.*": True,
        "visual_tokens.*_projector.*": False,
        "llama.*": True,
    },
}
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup=0.0)
LOOP = LoopConfig(dtype="float32", remat="none", batch_size=8)


@functools.cache
def qformer_tokenizer() -> QFormerTokenizer:
    return QFormerTokenizer(ROOT / "golden" / "short_video_mean" / "qformer_tokenizer")


def example(seed: int, frames: int, length: int, questions: int = 1) -> Example:
    """With `frames` 0 the sample is text only; each question has one placeholder."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(3, CONFIG.text_config.vocab_size, length).astype(np.int32)
    labels = np.where(np.arange(length) < 6, -100, ids).astype(np.int32)
    if not frames:
        return Example(f"text {seed}", ids, labels, [], None)
    ids[2 : 2 + questions] = -200
    side = CONFIG.vision_tower_config.image_size
    pixels = rng.integers(0, 256, (frames, side, side, 3)).astype(np.uint8)
    return Example(f"clip {seed}", ids, labels, QUESTIONS[:questions], pixels)


def batch(rows: list[list[Example]], shape: RowShape, shares: int = 1) -> Batch:
    side = CONFIG.vision_tower_config.image_size
    laid_out = [
        lay_out_row(row, shape, CONFIG.tokens_per_frame, qformer_tokenizer(), 16, (side, side, 3), np.uint8, shares)
        for row in rows
    ]
    assert not any(any(cut) for _, cut in laid_out)
    return Batch(*(np.stack(arrays) for arrays in zip(*(arrays for arrays, _ in laid_out), strict=True)))


@functools.cache
def structure(remat: str = "none") -> Structure:
    return Structure(nnx.eval_shape(lambda: LlamaVid(CONFIG, rngs=nnx.Rngs(0), remat=remat)))


@functools.cache
def draw(seed: int, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    """`0.1 * jax.random.normal(key, shape)`, a key per shape, in one program; more shapes do not change the first."""
    sizes = list(map(math.prod, shapes))
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    rows = np.asarray(jax.vmap(lambda key: jax.random.normal(key, (max(sizes),)))(keys))
    return [0.1 * row[:size].reshape(shape) for row, size, shape in zip(rows, sizes, shapes, strict=True)]


def random_params(seed: int = 0) -> dict[str, jax.Array]:
    """Random weights, large enough that every part of the model matters."""
    shapes = {path: leaf.shape for path, leaf in structure().shapes.items()}
    values = zip(shapes, draw(seed, *shapes.values()), strict=True)
    return {path: jax.numpy.asarray(value + path.endswith("scale")) for path, value in values}


def state(params: dict[str, jax.Array]) -> TrainState:
    """The training state before the first step."""

    def zeros(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        """Zeros with the parameter's sharding, made on the host to avoid compiling a program per shape."""
        value, parameter = jax.numpy.asarray(np.zeros(leaf.shape, leaf.dtype)), params.get(getattr(path[-1], "key", ""))
        return value if parameter is None or not parameter.committed else jax.device_put(value, parameter.sharding)

    optimizer = jax.eval_shape(make_optimizer(OPTIMIZER).init, params)
    return TrainState(jax.numpy.int32(0), params, jax.tree.map_with_path(zeros, optimizer))
