"""Prefill in chunks: the same answers in constant memory."""

import jax
import jax.numpy as jnp
import pytest
from test_generation import PROMPT, TEXT, VIDEO, frames

from llamavid_jax.inference import generate as generation
from llamavid_jax.inference.generate import extend
from llamavid_jax.inference.prompt_cache import PromptCache
from llamavid_jax.inference.sampling import Sampling
from llamavid_jax.models.kv_cache import KeysValues
from llamavid_jax.parallel.mesh import make_mesh
from llamavid_jax.parallel.sharding import param_shardings


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "seed": 3}])
def test_chunks_give_the_ids_of_one_piece(tiny_model, monkeypatch, settings):
    """Rows that end in the first, a middle and the last chunk, some with visual tokens in every chunk."""
    long_video = [1, *range(30, 40), VIDEO[3], *range(100, 260)]
    rows, pixels = [VIDEO, TEXT, long_video, [1, *range(100, 190)]], [frames(3), None, frames(50), None]
    prompts = [[PROMPT], [], [PROMPT], []]

    def ask() -> list[list[int]]:
        given = {"pixel_values": pixels, "prompts": prompts, "max_new_tokens": 12, "ignore_eos": True}
        return tiny_model.generate(rows, **given, **settings).token_ids

    in_one_piece = ask()
    monkeypatch.setattr(generation, "PREFILL_CHUNK", 64)
    started = []
    monkeypatch.setattr(generation, "extend", lambda *a, **kw: started.append(int(a[7])) or extend(*a, **kw))
    assert ask() == in_one_piece
    assert started == [64, 128, 192, 256]  # of 271 positions
    monkeypatch.setattr(generation, "prefills_at_once", lambda: True)  # as on TPUs and GPUs
    started.clear()
    assert ask() == in_one_piece and not started


def test_memory_does_not_grow_with_the_prompt(tiny_model):
    """The memory of a chunk, besides the cache, is the same after 2,000 positions as after 32,000."""
    text = tiny_model.config.text_config

    def needed(slots: int) -> int:
        def of(shape, kind=jnp.int32):
            return jax.ShapeDtypeStruct(shape, kind)

        cache = of((text.num_hidden_layers, 1, slots, text.num_key_value_heads, text.head_dim), jnp.float32)
        size = generation.PREFILL_CHUNK
        lowered = extend.lower(
            tiny_model.structure, tiny_model.params, of((1,)), KeysValues(cache, cache), of((1, size)),
            of((1, size, text.hidden_size), jnp.float32), of((1, size)), of(()), of((1,)), of((), jnp.uint32),
            Sampling(of((), jnp.float32), of(()), of((), jnp.float32)), greedy=True,
        )  # fmt: skip
        return lowered.compile().memory_analysis().temp_size_in_bytes

    short, long = needed(2048), needed(32768)
    assert long <= 1.01 * short and short < 128e6, (short, long)


@pytest.mark.sharding
@pytest.mark.parametrize("axes", [{"tensor": 2, "fsdp": 4}, {"sequence": 4, "data": 2}])
def test_a_kept_prompt_on_a_mesh(tiny_model, axes):
    mesh = make_mesh(**axes)
    params = tiny_model.params
    placed = jax.device_put(params, param_shardings(params, tiny_model.config, mesh))
    model = type(tiny_model)(tiny_model.config, placed, mesh=mesh)
    block, cache = tiny_model.visual_tokens(frames(20), [PROMPT])[0], PromptCache()
    again = {"visual_tokens": [[block, block]], "max_new_tokens": 8, "ignore_eos": True}
    model.generate([VIDEO], visual_tokens=[[block]], max_new_tokens=8, cache=cache)
    rest = [[*VIDEO, VIDEO[3], 44]]
    kept = model.generate(rest, cache=cache, **again)
    assert kept.cached_tokens == 46 and kept.token_ids == tiny_model.generate(rest, **again).token_ids
