"""FLOPs against numbers by hand, the matmuls of traced programs and 6·N·tokens, for every variant of the model."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params
from paths import CONFIGS

from llamavid_jax.checkpoints.weights import abstract_params
from llamavid_jax.config.schema import LLaMAVIDLlavaConfig
from llamavid_jax.models.flops import PARTS, flops_per_step
from llamavid_jax.models.llama_vid import LlamaVid

TINY = LLaMAVIDLlavaConfig.from_yaml(CONFIGS / "models" / "tiny.yaml")
STEP = {"frames": 3, "pairs": 5, "question_tokens": 7, "rows": 2, "row_tokens": 40}
NOTHING = dict.fromkeys(PARTS, False)


def by_hand() -> dict[str, tuple[int, int]]:
    """Multiply-adds of STEP with configs/models/tiny.yaml: with weights, and between activations."""
    vision = 16 * 588 * 64 + 3 * 17 * (64 * 192 + 64 * 64 + 2 * 64 * 256)
    qformer = 4 * (15 * 4 * 48 * 48 + 15 * 2 * 48 * 96) + 2 * (2 * 8 * 48 * 48 + 2 * 17 * 64 * 48)
    visual = 8 * 48 * 64 + 16 * 64 * 64 + 64 * 64 + (64 * 64 + 64 * 64)
    llama = 40 * (3 * (4 * 64 * 64 + 3 * 64 * 160) + 64 * 1024)
    return {
        "vision": (3 * vision, 3 * 3 * 2 * 17 * 17 * 64),
        "qformer": (5 * qformer, 5 * (4 * 2 * 15 * 15 * 48 + 2 * 2 * 8 * 17 * 48)),
        "visual_tokens": (5 * visual, 5 * (8 * 16 * 64 + 16 * 64)),
        "llama": (2 * llama, 2 * 3 * 40 * 40 * 64),  # causal: half of 2·T·T·C
    }


@pytest.mark.parametrize(
    "trained,factors",  # factors of the matmuls with weights and of those between activations, for each part
    [
        ((), {"vision": (1, 1), "qformer": (1, 1), "visual_tokens": (1, 1), "llama": (1, 1)}),
        (("visual_tokens",), {"vision": (1, 1), "qformer": (1, 1), "visual_tokens": (3, 3), "llama": (2, 3)}),
        (("qformer", "visual_tokens", "llama"), dict.fromkeys(PARTS, (3, 3)) | {"vision": (1, 1)}),
        (PARTS, dict.fromkeys(PARTS, (3, 3))),
    ],
)
def test_flops_by_hand(trained, factors):
    trains = NOTHING | dict.fromkeys(trained, True)
    expected = sum(
        2 * (weighted * factors[part][0] + attention * factors[part][1])
        for part, (weighted, attention) in by_hand().items()
    )
    assert flops_per_step(TINY, trains, **STEP) == expected


def test_seven_billion_parameters():
    """A trained LLaMA costs 6·N·tokens without the embedding, plus attention: 4 % at 2048 tokens."""
    config = LLaMAVIDLlavaConfig.from_yaml(CONFIGS / "models" / "llamavid_7b_224_video.yaml")
    sizes = {path: leaf.size for path, leaf in abstract_params(config).items() if path.startswith("llama.")}
    number = sum(sizes.values()) - sizes["llama.embed.embedding"]
    step = {"frames": 0, "pairs": 0, "question_tokens": 0, "rows": 3, "row_tokens": 2048}
    ratio = flops_per_step(config, NOTHING | {"llama": True}, **step) / (6 * number * 3 * 2048)
    assert ratio == pytest.approx(1 + 32 * 2048 * 4096 / number, rel=1e-4) and 1.03 < ratio < 1.05


def matmul_flops(function, *arrays) -> int:
    """FLOPs of every matmul that a traced function runs; those in loops count for every iteration."""

    def count(jaxpr, times: int) -> int:
        total = 0
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                (summed, _), _ = equation.params["dimension_numbers"]
                inner = math.prod(equation.invars[0].aval.shape[axis] for axis in summed)
                total += 2 * times * math.prod(equation.outvars[0].aval.shape) * inner
            length = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
            total += sum(count(inner, times * length) for inner in jaxprs_in_params(equation.params))
        return total

    return count(jax.make_jaxpr(function)(*arrays).jaxpr, 1)


def matmuls_of_a_pair(config: LLaMAVIDLlavaConfig, has_cls: bool) -> int:
    vision = config.vision_tower_config
    graphdef, state = nnx.split(nnx.eval_shape(lambda: LlamaVid(config, rngs=nnx.Rngs(0))))
    features = jnp.zeros((1, vision.num_patches + has_cls, vision.hidden_size))
    text = jnp.zeros((1, STEP["question_tokens"]), int)

    def tokens(state, *arrays):
        return nnx.merge(graphdef, state).frames_tokens(*arrays, has_cls=has_cls)

    return matmul_flops(tokens, state, features, text, text == 0)


CLIP = dataclasses.replace(TINY.vision_tower_config, kind="clip", feature_layer=-2)
BERT = {
    "bert_type": "raw_bert",
    "qformer_config": dataclasses.replace(TINY.qformer_config, cross_attention_frequency=1),
}
VARIANTS = {
    "mean": {},
    "three layers": {"qformer_config": dataclasses.replace(TINY.qformer_config, num_hidden_layers=3)},
    "a Q-Former that is not pretrained": {"bert_type": "qformer"},
    "context": {"frame_tokens": "context"},
    "CLIP": {"vision_tower_config": CLIP},
    "CLIP with a wider Q-Former": {
        "vision_tower_config": CLIP,
        "qformer_config": dataclasses.replace(TINY.qformer_config, encoder_hidden_size=160),
    },
    "CLIP with CLS": {
        "vision_tower_config": dataclasses.replace(CLIP, select_feature="cls_patch"),
        "compress_type": "none",
    },
    "EVA, CLS among the patches": {
        "vision_tower_config": dataclasses.replace(TINY.vision_tower_config, select_feature="cls_patch")
    },
    "BERT": BERT,
    "a BERT of one layer": BERT | {"qformer_config": dataclasses.replace(BERT["qformer_config"], num_hidden_layers=1)},
    "CLIP and BERT": {"vision_tower_config": CLIP, **BERT},
    "grid": {"compress_type": "grid:2"},
    "linear": {"mm_projector_type": "linear"},
    "three linear layers": {"mm_projector_type": "mlp3x_gelu", "compress_type": "none"},
    "identity": {"mm_projector_type": "identity", "compress_type": "none"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_pair_is_what_runs(variant):
    """With the tower's features and with precomputed ones; the half that BERT's causal mask hides is not counted."""
    config = dataclasses.replace(TINY, **VARIANTS[variant])
    qformer, tokens = config.qformer_config, STEP["question_tokens"]
    hidden = 2 * qformer.num_hidden_layers * tokens**2 * qformer.hidden_size * (config.bert_type == "raw_bert")
    for frames in (0, 1):
        step = {"frames": frames, "question_tokens": tokens, "rows": 0, "row_tokens": 0}
        one, none = (flops_per_step(config, NOTHING, pairs=pairs, **step) for pairs in (1, 0))
        has_cls = frames and config.vision_tower_config.has_cls
        assert one - none + hidden == matmuls_of_a_pair(config, bool(has_cls))


def test_without_a_text_decoder_its_work_is_not_counted():
    """With content tokens alone nothing uses the queries' states (XLA removes unused computations)."""
    config = dataclasses.replace(TINY, frame_tokens="content")
    step = {"frames": 0, "question_tokens": 7, "rows": 0, "row_tokens": 0}
    assert flops_per_step(config, NOTHING, pairs=1, **step) == 2 * (64 * 64 + 64 * 64)


@pytest.mark.parametrize("layers, layer", [(1, -1), (3, -1), (3, -2), (3, 1), (2, 0)])
def test_the_tower_is_what_runs(layers, layer):
    """Blocks after the feature layer are held in memory but not run."""
    vision = dataclasses.replace(CLIP, num_hidden_layers=layers, feature_layer=layer)
    config = dataclasses.replace(TINY, vision_tower_config=vision)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: LlamaVid(config, rngs=nnx.Rngs(0)).vision))
    frames = jnp.zeros((2, 3, vision.image_size, vision.image_size))
    seen = matmul_flops(lambda state, frames: nnx.merge(graphdef, state)(frames), state, frames)
    assert flops_per_step(config, NOTHING, **dict.fromkeys(STEP, 0) | {"frames": 2}) == seen


def test_the_gradient_of_a_projection_in_front_of_a_frozen_text_decoder():
    """CLIP's stage 1: it passes through the frozen Q-Former, which without the projection runs forward only."""
    wide = dataclasses.replace(TINY, **VARIANTS["CLIP with a wider Q-Former"])
    equal = dataclasses.replace(TINY, **VARIANTS["CLIP"])
    step = {"frames": 0, "question_tokens": 7, "rows": 0, "row_tokens": 0, "pairs": 1}
    queries, layers = 8, 4
    tokens, memory = queries + 7, 16
    for config, width, times in ((wide, 160, 2), (equal, 64, 1)):
        weighted = layers * tokens * (4 * 48 * 48 + 2 * 48 * 96) + 2 * (2 * queries * 48 * 48 + 2 * memory * width * 48)
        between = layers * 2 * tokens * tokens * 48 + 2 * 2 * queries * memory * 48
        decoder = 2 * (weighted * times + between * (2 * times - 1))
        behind = 3 * 2 * (queries * 48 * 64 + 16 * 64 * 64 + 64 * 64 + 2 * 64 * 64 + (queries + 1) * 16 * 64)
        projection = 3 * 2 * memory * 64 * 160 if width == 160 else 0
        found = flops_per_step(config, NOTHING | {"visual_tokens": True}, **step)
        assert found == decoder + behind + projection


def test_flops_of_low_rank_updates():
    """Kernels under updates pass the gradient on but get none; an update's parameter is one multiply-add a token."""
    weighted, attention = by_hand()["llama"]
    more = flops_per_step(TINY, NOTHING, **STEP, updates=1000) - flops_per_step(TINY, NOTHING, **STEP)
    assert more == 2 * (weighted + 2 * attention) + 2 * 3 * 1000 * 2 * 40
