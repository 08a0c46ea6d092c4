"""The programs of inference, compiled for a TPU slice from shapes alone: a model's configuration → one Report each.

    encode     FRAME_CHUNK frames through the vision tower
    compress   FRAME_CHUNK pairs of a frame and a question → visual tokens
    prefill    the prompt with its visual tokens
    decode     a block of decode steps; its numbers are for one token

All weights stay on the chips, so a program's peak includes those that it does not use.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from llamavid_jax.checkpoints.weights import abstract_params, parse_dtype
from llamavid_jax.config.schema import LLaMAVIDLlavaConfig
from llamavid_jax.errors import InputError
from llamavid_jax.inference.encode import SMALLEST_QUESTION
from llamavid_jax.inference.generate import SMALLEST_LENGTH, DecodeState, answer_room, decode_block, prefill
from llamavid_jax.inference.sampling import Sampling
from llamavid_jax.models.flops import PARTS, flops_per_step
from llamavid_jax.models.kv_cache import AXES, KVCache
from llamavid_jax.models.llama_vid import LlamaVid, compress_frames, encode_frames
from llamavid_jax.models.structure import Structure
from llamavid_jax.parallel.mesh import TENSOR, describe
from llamavid_jax.parallel.sharding import activation_spec
from llamavid_jax.precompile.memory import device_bytes
from llamavid_jax.precompile.report import Report, compile_report
from llamavid_jax.precompile.topology import chip_of, slice_mesh
from llamavid_jax.shapes import FRAME_CHUNK, bucket

REMEDY = "try a mesh with a larger tensor axis, fewer frames, or a generation with more memory"


def check_inference(
    config: LLaMAVIDLlavaConfig,
    topology: str,
    mesh: str,
    tokens: int,
    new_tokens: int,
    dtype: str = "bfloat16",
    name: str = "",
    kv_cache: str = "float",
    machine_code: bool = True,
) -> list[Report]:
    """Reports of encode, compress, prefill and decode, for one row of `tokens` and an answer of `new_tokens`.

    `config` sets how the weights are quantised, `kv_cache` how the cache is (`kv_cache.KINDS`).  An empty `mesh` puts
    all devices on `tensor`; without `machine_code`, compiling stops where `buffers.py` does.  Raises InputErrors like
    `check_training`.
    """
    kind = parse_dtype(dtype)
    chips = slice_mesh(topology, mesh, default=TENSOR)
    replicated, mesh_text = NamedSharding(chips, PartitionSpec()), describe(chips.shape) or "one device"

    def whole(shape: tuple[int, ...], of: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, of, sharding=replicated)

    types = {"dtype": kind, "param_dtype": kind, "kv_cache": kv_cache}
    structure = Structure(nnx.eval_shape(lambda: LlamaVid(config, rngs=nnx.Rngs(0), **types)))
    params = abstract_params(config, kind, chips)
    vision, text = config.vision_tower_config, config.text_config
    weights = dtype if config.quantization == "none" else f"{config.quantization} weights"
    named = ", ".join([name, weights, *(["int8 cache"] if kv_cache == "int8" else [])])
    if tokens + new_tokens > text.max_length:
        raise InputError(
            f"{tokens} tokens and {new_tokens} new ones are more than the {text.max_length} positions of {name}; "
            "give fewer, or a model for long videos"
        )
    length = bucket(tokens)

    def flops(frames: int = 0, pairs: int = 0, rows: int = 0, row_tokens: int = 1) -> int:
        return flops_per_step(
            config, dict.fromkeys(PARTS, False), frames=frames, pairs=pairs, question_tokens=SMALLEST_QUESTION,
            rows=rows, row_tokens=row_tokens,
        )  # fmt: skip

    def report(program: str, lowered: jax.stages.Lowered, uses: tuple[str, ...], work: int) -> Report:
        known = {"machine_code": machine_code, "topology": topology, "devices": chips.size, "mesh": mesh_text}
        own = compile_report(lowered, chip_of(topology), 1, work, remedy=REMEDY, program=f"{named}: {program}", **known)
        idle = (leaf for path, leaf in params.items() if not path.startswith(uses))
        peak = own.peak_gib + sum(device_bytes(leaf, leaf.sharding) for leaf in idle) / 2**30
        return dataclasses.replace(own, peak_gib=peak, remedy=REMEDY if peak > own.hbm_gib else own.remedy)

    with jax.set_mesh(chips):
        frames = whole((FRAME_CHUNK, 3, vision.image_size, vision.image_size), jnp.float32)
        features = whole((FRAME_CHUNK, vision.num_patches + vision.has_cls, vision.hidden_size), kind)
        pairs, questions = whole((FRAME_CHUNK,)), whole((1, SMALLEST_QUESTION))
        mask = whole((1, SMALLEST_QUESTION), jnp.bool_)
        sampling = Sampling(whole((), jnp.float32), whole(()), whole((), jnp.float32))
        row, visual = whole((1, length)), whole((1, length, text.hidden_size), kind)
        prefilled = prefill.lower(
            structure, params, row, visual, row, whole((1,)), whole((), np.uint32), sampling, greedy=True
        )

        def as_prefilled(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            spec = activation_spec(leaf.shape, *AXES[: leaf.ndim]) if leaf.ndim >= 4 else PartitionSpec()
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(chips, spec))

        token, keys, prompt = jax.tree.map(as_prefilled, prefilled.out_info)
        room = jax.eval_shape(functools.partial(answer_room, slots=bucket(new_tokens, SMALLEST_LENGTH)), prompt)
        cache = KVCache(prompt, jax.tree.map(as_prefilled, room), whole(()))
        state = DecodeState(token, whole((1,)), whole((1,), jnp.bool_), cache, keys)
        return [
            report(
                f"encode {FRAME_CHUNK} frames",
                encode_frames.lower(structure, params, frames),
                ("vision",),
                flops(frames=FRAME_CHUNK),
            ),
            report(
                f"compress {FRAME_CHUNK} pairs",
                compress_frames.lower(
                    structure, params, features, pairs, pairs, questions, mask, has_cls=vision.has_cls
                ),
                ("qformer", "visual_tokens"),
                flops(frames=FRAME_CHUNK, pairs=FRAME_CHUNK) - flops(frames=FRAME_CHUNK),  # without the tower's work
            ),
            report(f"prefill {tokens} tokens", prefilled, ("llama",), flops(rows=1, row_tokens=length)),
            report(
                "decode one token",
                decode_block.lower(structure, params, state, whole(()), whole(()), sampling, greedy=True),
                ("llama",),
                flops(rows=1),
            ),
        ]
