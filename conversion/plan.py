"""Which tensor fills which weight: names matched and every shape checked before anything is read."""

import dataclasses
import math
import zlib
from collections import defaultdict
from collections.abc import Iterable, Mapping

import jax.numpy as jnp
import numpy as np

from llamavid_jax.errors import CheckpointError
from llamavid_jax.weights import inventory
from llamavid_jax.weights.files import EMPTY, Weight, weight_table

from .resize import grow_rows, resize_positions
from .sources import Source, Tensor

LEFTOVERS = (".rotary_emb.inv_freq", ".position_ids")  # buffers that are computed, not learned
INIT_STD = 0.02  # LLaMA's and BERT's initializer_range
MOST_AT_RANDOM = 1 << 31  # randomly initialised values; all parts but the language model have 1.2 billion


@dataclasses.dataclass(frozen=True)
class Fill:
    """One layer of one parameter and the tensor that fills it."""

    weight: Weight
    tensor: Tensor
    resize: bool  # the tensor has another length

    def read(self, seed: int | None) -> np.ndarray:
        """The file's value, resized to the weight's length."""
        value, shape = self.tensor.read(), self.weight.shape
        if not self.resize:
            return value
        if self.weight.path == "vision.position":
            side = math.isqrt(shape[-2] - 1)
            return resize_positions(value.reshape(-1, shape[-1]), side).reshape(shape)
        # an odd number of new rows: `<im_patch>` alone, or before `<im_start>` and `<im_end>`
        has_patch_token = self.weight.path.startswith("llama.") and (shape[0] - len(value)) % 2
        drawn = INIT_STD * draw(self.weight, (1, shape[1]), seed or 0) if has_patch_token else None
        return grow_rows(value, shape[0], drawn)


@dataclasses.dataclass
class Plan:
    """Where every parameter comes from and what becomes of every tensor."""

    shapes: dict[str, tuple[int, ...]]
    fills: dict[tuple[str, int | None], Fill]
    missing: list[Weight]
    unused: list[str]  # names in the sources that no weight of this model has
    overridden: list[str]  # names that a later source holds too
    leftovers: int
    not_finite: list[str] = dataclasses.field(default_factory=list)  # weights with NaN or infinity in them, as written


def plan(config, sources: list[Source], init_missing: bool) -> Plan:
    """Matches names and checks every shape before anything is read.

    Raises CheckpointError for a wrong shape or dtype, and for missing weights unless they are to be initialised.
    """
    shapes = inventory.shapes(config)
    # for tokens that the language model lacks, and for [DEC], which BERT lacks and no question contains
    new_rows = dict.fromkeys(("llama.embed.embedding", "llama.lm_head.kernel"), len(config.added_tokens))
    new_rows |= {"qformer.word_embeddings.embedding": 1}
    table, documented = weight_table(config, "original"), weight_table(config, "documented")
    by_name: dict[str, list[Weight]] = defaultdict(list)
    for weight in {*table, *documented}:
        by_name[weight.name].append(weight)
    fills: dict[tuple[str, int | None], Fill] = {}
    unused, overridden, leftovers = [], [], 0
    for source in sources:
        for name, tensor in source.tensors.items():
            if name.endswith(LEFTOVERS):
                leftovers += 1
            elif name not in by_name:
                unused.append(name)
            for weight in by_name.get(name, ()):
                place = (weight.path, weight.index)
                if place in fills:
                    overridden.append(name)
                fills[place] = Fill(weight, tensor, _check(source, weight, tensor, new_rows))
    missing = [weight for weight in table if (weight.path, weight.index) not in fills]
    if missing and not init_missing:
        given = max(table, documented, key=lambda one: len({weight.name for weight in one} & sources[0].tensors.keys()))
        named = [weight.name for weight in given if (weight.path, weight.index) not in fills]
        _refuse_missing(sources[0], fills, named, unused)
    if (count := sum(math.prod(weight.layer_shape) for weight in missing)) > MOST_AT_RANDOM:
        raise CheckpointError(
            f"--init-missing would start {count} values at random, more than 2**31; check config.json"
        )
    return Plan(shapes, fills, missing, unused, overridden, leftovers)


def _check(source: Source, weight: Weight, tensor: Tensor, new_rows: Mapping[str, int]) -> bool:
    """Whether the tensor must be resized; CheckpointError if it does not fit and cannot be."""
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        raise CheckpointError(
            f"{source.origin}: {weight.name} is {tensor.dtype}; weights are float32, float16 or bfloat16"
        )
    if tensor.shape == weight.shape:
        return False
    if 0 in tensor.shape:
        raise CheckpointError(f"{source.origin}: {weight.name} {EMPTY}")
    same_width = len(tensor.shape) == len(weight.shape) and tensor.shape[-1] == weight.shape[-1]
    resizable = weight.path == "vision.position" and same_width
    if resizable and source.resizable:
        return True
    rows = new_rows.get(weight.path)
    if rows and same_width and weight.shape[0] - tensor.shape[0] == rows:
        return True
    remedy = "--image-size N resizes it" if resizable else "check config.json, or give the right sizes with --config"
    raise CheckpointError(
        f"{source.origin}: {weight.name} has shape {tensor.shape}, but the configuration needs {weight.shape}; {remedy}"
    )


def _refuse_missing(
    checkpoint: Source, fills: Iterable[tuple[str, int | None]], missing: list[str], unused: list[str]
) -> None:
    if {path.split(".")[0] for path, _ in fills} == {"llama"}:
        raise CheckpointError(
            f"{checkpoint.origin} holds only the language model: no vlm_att weights and no vision tower. Give them "
            "with --vision, --qformer and --projectors, or start them at random with --init-missing SEED"
        )
    lacks, holds = (", ".join(names[:6]) + (", ..." if len(names) > 6 else "") for names in (missing, unused))
    left = f", and has no place for {len(unused)}: {holds}" if unused else ""
    raise CheckpointError(
        f"{checkpoint.origin} lacks {len(missing)} weights: {lacks}{left}. Give the files that hold them (--vision, "
        "--qformer, --projectors), or start them at random with --init-missing SEED"
    )


def random_layer(weight: Weight, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """An initial value that depends on the seed and the weight's name alone: ones, zeros or N(0, 0.02²)."""
    if weight.path.endswith("scale"):
        return np.ones(shape, np.float32)
    if weight.path.endswith("bias"):
        return np.zeros(shape, np.float32)
    return INIT_STD * draw(weight, shape, seed)


def draw(weight: Weight, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """N(0, 1) that depends on the seed and the weight's name alone."""
    return np.random.default_rng([seed, zlib.crc32(weight.name.encode())]).standard_normal(shape, np.float32)
