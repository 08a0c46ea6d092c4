"""The sharding table against the parameters, and eight devices against one."""

import dataclasses
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from paths import GOLDEN

from llamavid_jax.checkpoints.weights import abstract_params
from llamavid_jax.config.parts import LlamaConfig, LLaMAVIDLlavaQFormerConfig, LLaMAVIDLlavaVisionConfig
from llamavid_jax.config.schema import LLaMAVIDLlavaConfig
from llamavid_jax.errors import CheckpointError
from llamavid_jax.inference.model import LLaMAVIDLlavaForConditionalGeneration
from llamavid_jax.parallel import sharding
from llamavid_jax.parallel.mesh import AXIS_RULES, ShardingError, closed_rings, make_mesh, parse_mesh
from llamavid_jax.parallel.sharding import param_shardings
from llamavid_jax.text.qformer_tokenizer import QFormerTokenizer
from llamavid_jax.weights import inventory

pytestmark = pytest.mark.sharding
BAR = 1e-5  # relative error of logits on eight devices against one

ALL_DIFFERENT = LLaMAVIDLlavaConfig(
    LLaMAVIDLlavaVisionConfig(
        hidden_size=20, intermediate_size=23, num_hidden_layers=2, num_attention_heads=4, image_size=56, patch_size=14
    ),
    LLaMAVIDLlavaQFormerConfig(
        vocab_size=61,
        hidden_size=110,
        num_hidden_layers=12,
        num_attention_heads=11,
        intermediate_size=29,
        max_position_embeddings=37,
        encoder_hidden_size=15,
    ),
    LlamaConfig(
        vocab_size=83,
        hidden_size=52,
        intermediate_size=31,
        num_hidden_layers=7,
        num_attention_heads=26,
        num_key_value_heads=13,
        head_dim=8,
    ),
    num_query=9,
)
SAME_BY_NATURE = {"hidden": "embed", "context": "vision_embed", "patch_column": "patch_row", "channels": "qkv"}
SAME_BY_NATURE |= {"memory_hidden": "memory", "qformer_types": "vision_layers"}

SEVEN_B = LLaMAVIDLlavaConfig()
THIRTEEN_B = dataclasses.replace(
    SEVEN_B,
    text_config=LlamaConfig(
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=40,
        num_attention_heads=40,
        num_key_value_heads=40,
    ),
)


def shapes(config):
    return {path: leaf.shape for path, leaf in abstract_params(config).items()}


@pytest.fixture(scope="module")
def different_shapes():
    return shapes(ALL_DIFFERENT)


def test_sizes_of_the_test_configuration_tell_all_axes_apart():
    sizes = {name: size for name, size in inventory.axis_sizes(ALL_DIFFERENT).items() if name not in SAME_BY_NATURE}
    assert len(set(sizes.values())) == len(sizes)


def test_every_parameter_has_a_row_and_every_row_a_parameter(different_shapes):
    axes = inventory.axes(ALL_DIFFERENT, different_shapes)
    assert set(axes) == set(different_shapes)
    used = {name for names in axes.values() for name in names}
    assert used | {"qformer_types"} == set(inventory.axis_sizes(ALL_DIFFERENT))  # an axis of BERT alone
    assert used <= set(AXIS_RULES)


def test_names_in_another_order_are_refused(different_shapes, monkeypatch):
    """Each row with its first and last axis swapped, one row at a time."""
    exchanged, rows = 0, inventory.rows(ALL_DIFFERENT)
    for number, row in enumerate(rows):
        first, *middle, last = row.axes.split() if " " in row.axes else (row.axes, row.axes)
        if SAME_BY_NATURE.get(last, last) == SAME_BY_NATURE.get(first, first):
            continue
        other = row._replace(axes=" ".join([last, *middle, first]))
        with monkeypatch.context() as patch:
            patch.setattr(inventory, "rows", lambda _, n=number, w=other: (*rows[:n], w, *rows[n + 1 :]))
            with pytest.raises(CheckpointError, match=f"{re.escape(row.path)} is .* by its row, but"):
                inventory.axes(ALL_DIFFERENT, different_shapes)
        exchanged += 1
    assert exchanged > 50


def test_strict_both_ways(different_shapes, monkeypatch):
    with pytest.raises(CheckpointError, match=r"llama\.new \(3,\) has no row"):
        inventory.axes(ALL_DIFFERENT, {**different_shapes, "llama.new": (3,)})
    with pytest.raises(CheckpointError, match=r"llama\.norm\.scale is embed = \(52,\) by its row, but \(53,\) here"):
        inventory.axes(ALL_DIFFERENT, {**different_shapes, "llama.norm.scale": (53,)})
    fewer = {path: shape for path, shape in different_shapes.items() if path != "qformer.query"}
    with pytest.raises(CheckpointError, match=r"row qformer\.query of .* matches no parameter"):
        inventory.axes(ALL_DIFFERENT, fewer)


@pytest.mark.parametrize("kind", ["identity", "linear", "mlp1x_gelu", "mlp3x_gelu"])
def test_optional_rows(kind):
    text = dataclasses.replace(ALL_DIFFERENT.text_config, hidden_size=20, tie_word_embeddings=True)
    config = dataclasses.replace(ALL_DIFFERENT, text_config=text, mm_projector_type=kind)
    inventory.axes(config, shapes(config))


@pytest.mark.parametrize("mesh", [{"fsdp": 8}, {"tensor": 4, "fsdp": 2}, {"tensor": 8}])
@pytest.mark.parametrize("config", [SEVEN_B, THIRTEEN_B], ids=["7B", "13B"])
def test_no_large_parameter_stays_whole(config, mesh):
    """Nothing above 2 % of all parameters is on every device; a device holds little more than an eighth of all."""
    params = abstract_params(config)
    places = param_shardings(params, config, make_mesh(**mesh))
    placed = [(leaf, places[path]) for path, leaf in params.items()]
    sizes = [(leaf.size, np.prod(where.shard_shape(leaf.shape)), where.is_fully_replicated) for leaf, where in placed]
    total = sum(size for size, _, _ in sizes)
    assert total > 7.9e9
    assert max((size for size, _, whole in sizes if whole), default=0) < 0.02 * total
    assert sum(shard for _, shard, _ in sizes) < 1.15 * total / 8


def test_parse_mesh():
    assert parse_mesh("fsdp=4,tensor=2") == parse_mesh("fsdp=4, tensor=2") == {"fsdp": 4, "tensor": 2}
    assert parse_mesh("") == {}


@pytest.mark.parametrize(
    "text", ["fsdp", "fsdp=", "fsdp=x", "fsdp=0", "fsdp=-1", "model=2", "fsdp=2=2", "8", "fsdp=2,fsdp=4"]
)
def test_parse_mesh_names_the_wrong_part(text):
    with pytest.raises(ShardingError, match="is not AXIS=SIZE with AXIS one of data, fsdp, tensor, sequence"):
        parse_mesh(text)


def test_a_mesh_of_more_devices_than_there_are():
    with pytest.raises(ShardingError, match="a mesh of fsdp=4, tensor=4 needs 16 devices; 8 are attached"):
        make_mesh(fsdp=4, tensor=4)


@pytest.mark.parametrize("size", [0, -1])
def test_a_mesh_without_devices(size):
    with pytest.raises(ShardingError, match=f"mesh axis data has size {size}; use a whole number"):
        make_mesh(data=size)


class Chip:
    """A device as the mesh sees it, with four on each slice or GPU host."""

    platform, device_kind, client = "gpu", "NVIDIA H100", None

    def __init__(self, number: int):
        self.id, self.slice_index = number, number // 4
        self.process_index = self.slice_index


def slices_along(sizes: dict[str, int], chips: int = 8) -> np.ndarray:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda: [Chip(number) for number in range(chips)])
        mesh = make_mesh(**sizes)
    return np.vectorize(lambda chip: chip.slice_index)(mesh.devices).reshape(-1, mesh.devices.shape[-2])


@pytest.mark.parametrize(
    ("sides", "ways"), [((8, 8), 8), ((4, 8), 4), ((2, 4), 8), ((4, 2), 8), ((8, 2), 4), ((4, 3), 6)]
)
def test_rings_on_a_flat_slice_are_closed(sides, ways):
    """Each chip is one link from the next one, and the last from the first."""
    chips = [SimpleNamespace(platform="tpu", coords=[x, y, 0]) for y in range(sides[1]) for x in range(sides[0])]
    rings = closed_rings(chips, ways)
    places = np.array([[chip.coords for chip in ring] for ring in rings])
    assert places.shape == (len(chips) // ways, ways, 3)
    assert np.all(np.abs(places - np.roll(places, 1, axis=1)).sum(-1) == 1)
    assert len(np.unique(places.reshape(-1, 3), axis=0)) == len(chips)


def test_other_devices_have_no_rings_to_close():
    chips = [SimpleNamespace(platform="tpu", coords=[x, y, z]) for z in range(2) for y in range(2) for x in range(2)]
    flat = [SimpleNamespace(platform="tpu", coords=[x, y, 0]) for y in range(3) for x in range(4)]
    for devices, ways in ((chips, 4), (jax.devices(), 4), (flat, 2), (flat, 3), (flat, 8), (flat * 2, 4)):
        assert closed_rings(devices, ways) is None


def test_meshes_over_several_slices():
    """`data` crosses slices, otherwise `fsdp`; `tensor` stays within one if it can."""
    np.testing.assert_array_equal(slices_along({"data": 2, "tensor": 4}), [[0] * 4, [1] * 4])
    np.testing.assert_array_equal(slices_along({"data": 2, "fsdp": 2, "tensor": 2}), [[0, 0]] * 2 + [[1, 1]] * 2)
    np.testing.assert_array_equal(slices_along({"fsdp": 12}, chips=12)[:, 0], [0] * 4 + [1] * 4 + [2] * 4)
    np.testing.assert_array_equal(slices_along({"fsdp": 4}), [[0]] * 4)
    with pytest.raises(ShardingError, match=r"a mesh of fsdp=6 takes \[2, 4\] devices of the slices; use whole slices"):
        slices_along({"fsdp": 6})


def test_constrain_is_nothing_without_a_mesh():
    x = jax.numpy.ones((2, 3))
    assert sharding.constrain(x, "batch", None) is x


# ---- eight devices against one

SMALL = LLaMAVIDLlavaConfig(
    LLaMAVIDLlavaVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=8, patch_size=2
    ),
    LLaMAVIDLlavaQFormerConfig(
        vocab_size=126, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40
    ),
    LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=8,
        max_position_embeddings=256,
    ),
    num_query=4,
)
MESHES = [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"sequence": 2, "tensor": 4}]


@pytest.fixture(scope="module")
def params():
    """Weights of scale 0.1, so that greedy choices are clear and all parts matter."""
    generator = np.random.default_rng(0)
    leaves = sorted(abstract_params(SMALL).items())
    return {path: jnp.asarray(generator.normal(size=leaf.shape, scale=0.1), jnp.float32) for path, leaf in leaves}


@pytest.fixture(scope="module")
def inputs():
    """A short video and a longer one: rows of different lengths."""
    generator = np.random.default_rng(1)
    return {
        "input_ids": [[1, 5, -200, 7, 8, 9], [1, -200, 4]],
        "pixel_values": [generator.normal(size=(frames, 3, 8, 8)).astype(np.float32) for frames in (3, 9)],
        "prompts": [["a man walks"], ["what happens?"]],
    }


def results(params, inputs, mesh=None):
    tokenizer = QFormerTokenizer(GOLDEN / "short_video_mean" / "qformer_tokenizer")
    model = LLaMAVIDLlavaForConditionalGeneration(SMALL, params, mesh=mesh, qformer_tokenizer=tokenizer)
    return {
        "tokens": np.asarray(model.visual_tokens(inputs["pixel_values"][1], inputs["prompts"][1])),
        "logits": [
            np.asarray(row[:n]) for row, n in zip(*(lambda o: (o.logits, o.lengths))(model(**inputs)), strict=True)
        ],
        "ids": model.generate(**inputs, max_new_tokens=12, ignore_eos=True).token_ids,
    }


@pytest.fixture(scope="module")
def one_device(params, inputs):
    return results(params, inputs)


@pytest.mark.parametrize("sizes", MESHES, ids=lambda sizes: ",".join(f"{axis}={size}" for axis, size in sizes.items()))
def test_eight_devices_equal_one(sizes, params, inputs, one_device):
    mesh = make_mesh(**sizes)
    placed = jax.device_put(params, param_shardings(params, SMALL, mesh))
    kernel = placed["llama.layers.mlp.gate.kernel"]
    ways = sizes.get("fsdp", 1) * sizes.get("tensor", 1) * sizes.get("sequence", 1)
    assert kernel.addressable_shards[0].data.size * ways == kernel.size
    got = results(placed, inputs, mesh)
    assert relative_error(got["tokens"], one_device["tokens"]) < BAR
    for row, wanted in zip(got["logits"], one_device["logits"], strict=True):
        assert relative_error(row, wanted) < BAR
    assert got["ids"] == one_device["ids"]
    assert len({tuple(ids) for ids in got["ids"]}) == 2 and all(len(ids) == 12 for ids in got["ids"])


def test_random_weights_are_made_on_the_mesh():
    model = LLaMAVIDLlavaForConditionalGeneration(SMALL, mesh=make_mesh(fsdp=8))
    head = model.params["llama.lm_head.kernel"]
    assert head.sharding.shard_shape(head.shape) == (4, 96)
    assert 0 < np.std(head) < 1


def relative_error(got, wanted) -> float:
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))
