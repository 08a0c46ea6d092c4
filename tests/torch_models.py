"""An independent LLaMA-VID in torch, our model with the same weights, and the error between the two.

The vision tower, the text decoder and the language model are transformers' InstructBLIP, CLIP, BERT and LLaMA; the
original's arithmetic between them is written here in torch.  `state_dict()` has the documented checkpoint's names, so
the conversion tables can fill our model.  The parity tests require errors below BAR; `test_parity_has_teeth.py` injects
bugs and requires errors above it.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from flax import nnx
from torch.nn import functional

from llamavid_jax.config.parts import LlamaConfig, LLaMAVIDLlavaQFormerConfig, LLaMAVIDLlavaVisionConfig
from llamavid_jax.config.schema import LLaMAVIDLlavaConfig, projector_depth
from llamavid_jax.models import llama_vid
from llamavid_jax.models.structure import Structure
from llamavid_jax.weights import inventory
from llamavid_jax.weights.files import to_jax, weight_table

BAR = 1e-5  # relative error of one module in float32; each test states the measured one
SCALES = (0.02, 0.2)  # of the weights: small ones reveal wrong epsilons, large ones wrong positions, masks, activations
MEMORY_EPS = 1e-5  # torch.nn.LayerNorm's default, which `vlm_att_ln` uses

CONFIG = LLaMAVIDLlavaConfig(
    vision_tower_config=LLaMAVIDLlavaVisionConfig(
        hidden_size=40, intermediate_size=72, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=2
    ),
    qformer_config=LLaMAVIDLlavaQFormerConfig(
        vocab_size=64,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=80,
        max_position_embeddings=208,
    ),
    text_config=LlamaConfig(
        vocab_size=97,
        hidden_size=56,
        intermediate_size=88,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        rope_factor=4.0,
    ),
    num_query=8,
)
CLIP_TOWER = dataclasses.replace(
    CONFIG.vision_tower_config, kind="clip", hidden_act="quick_gelu", layer_norm_eps=1e-5, feature_layer=-2
)
CLIP = dataclasses.replace(  # its Q-Former reads another width than the tower's
    CONFIG,
    vision_tower_config=CLIP_TOWER,
    qformer_config=dataclasses.replace(CONFIG.qformer_config, encoder_hidden_size=64),
)
BERT = dataclasses.replace(
    CONFIG, bert_type="raw_bert", qformer_config=dataclasses.replace(CONFIG.qformer_config, cross_attention_frequency=1)
)


class TorchLlamaVid(torch.nn.Module):
    """The reference model, with random weights of size `scale`, and norms' weights near 1 but not equal to it."""

    def __init__(self, config: LLaMAVIDLlavaConfig, scale: float):
        super().__init__()
        torch.manual_seed(0)
        vision, qformer, text = config.vision_tower_config, config.qformer_config, config.text_config
        self.vision_tower = clip(config) if vision.kind == "clip" else eva(config)
        self.qformer = bert(config) if config.bert_type == "raw_bert" else qformer_of(config)
        sizes = dataclasses.asdict(text)
        rope = {"rope_theta": sizes.pop("rope_theta"), "rope_type": "linear", "factor": sizes.pop("rope_factor")}
        self.language_model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**sizes, rope_parameters=rope, attn_implementation="eager")
        )
        self.query_tokens = torch.nn.Parameter(torch.zeros(1, config.num_query, qformer.hidden_size))
        if config.projects_memory:
            self.vlm_att_bert_proj = torch.nn.Linear(vision.hidden_size, config.memory_width)
        self.vlm_att_projector = torch.nn.Linear(qformer.hidden_size, vision.hidden_size)
        self.vlm_att_key_projector = torch.nn.Linear(vision.hidden_size, vision.hidden_size)
        self.vlm_att_val_projector = torch.nn.Linear(vision.hidden_size, text.hidden_size)
        depth = projector_depth(config.mm_projector_type)
        inputs = [vision.hidden_size] + [text.hidden_size] * depth
        self.multi_modal_projector = torch.nn.ModuleDict(
            {f"linear_{i + 1}": torch.nn.Linear(inputs[i], text.hidden_size) for i in range(depth)}
        )
        self.config = config
        self.eval().requires_grad_(False)
        for name, weight in self.named_parameters():
            norm = "norm" in name.lower() and name.endswith("weight")
            weight.copy_(1 + 0.2 * torch.randn_like(weight) if norm else scale * torch.randn_like(weight))
            if name.endswith("qkv.bias"):  # EVA has no key bias
                weight[vision.hidden_size : 2 * vision.hidden_size] = 0

    def vision_features(self, pixels: torch.Tensor) -> torch.Tensor:
        """EVA's states after the last block, without InstructBLIP's final norm; or the states of one CLIP layer."""
        vision = self.config.vision_tower_config
        if vision.kind == "eva":
            return self.vision_tower.encoder(inputs_embeds=self.vision_tower.embeddings(pixels)).last_hidden_state
        states = self.vision_tower["vision_model"](pixels, output_hidden_states=True).hidden_states
        return states[vision.feature_layer][:, vision.select_feature == "patch" :]

    def queries(self, memory: torch.Tensor, text_ids: torch.Tensor, text_mask: torch.Tensor) -> torch.Tensor:
        """The final states of the Q-Former's queries, or of BERT's whole text."""
        if self.config.bert_type == "raw_bert":
            return self.qformer(
                input_ids=text_ids, attention_mask=text_mask.long(), encoder_hidden_states=memory, use_cache=False
            ).last_hidden_state
        if self.config.bert_type == "qformer_pretrain":
            norm = self.vision_tower.post_layernorm  # where the documented layout keeps `vlm_att_ln`
            memory = functional.layer_norm(memory, memory.shape[-1:], norm.weight, norm.bias, MEMORY_EPS)
        queries = self.query_tokens.expand(len(memory), -1, -1)
        return self.qformer(
            input_ids=text_ids,
            attention_mask=torch.cat([torch.ones(queries.shape[:2], dtype=torch.long), text_mask.long()], 1),
            query_embeds=queries,
            encoder_hidden_states=memory,
        ).last_hidden_state[:, : queries.shape[1]]

    def visual_tokens(self, patches: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        query, key = self.vlm_att_projector(queries), self.vlm_att_key_projector(patches)
        seen = torch.softmax(query @ key.transpose(1, 2) / key.shape[-1] ** 0.5, dim=-1) @ patches
        context = self.vlm_att_val_projector(seen.mean(1, keepdim=True))
        kind, _, number = self.config.compress_type.partition(":")
        content = patches.mean(1, keepdim=True) if kind == "mean" else patches
        if kind == "grid":
            side = self.config.vision_tower_config.side
            square = patches.transpose(1, 2).unflatten(-1, (side, side))
            content = functional.avg_pool2d(square, side // int(number)).flatten(2).transpose(1, 2)
        for index, linear in enumerate(self.multi_modal_projector.values()):
            content = linear(functional.gelu(content) if index else content)
        return torch.cat([context, content], 1)

    def frame_tokens(
        self, features: torch.Tensor, text_ids: torch.Tensor, text_mask: torch.Tensor, has_cls: bool
    ) -> torch.Tensor:
        keeps_cls = self.config.vision_tower_config.select_feature == "cls_patch"
        patches = features[:, 1:] if has_cls and not keeps_cls else features
        memory = patches if self.config.bert_type == "raw_bert" else features
        memory = self.vlm_att_bert_proj(memory) if self.config.projects_memory else memory
        return self.visual_tokens(patches, self.queries(memory, text_ids, text_mask))

    def logits(self, token_ids: torch.Tensor) -> torch.Tensor:
        return self.language_model(input_ids=token_ids).logits


def eva(config: LLaMAVIDLlavaConfig) -> torch.nn.Module:
    sizes = dataclasses.asdict(config.vision_tower_config)
    return transformers.InstructBlipVisionModel(
        transformers.InstructBlipVisionConfig(**sizes, attn_implementation="eager")
    )


def clip(config: LLaMAVIDLlavaConfig) -> torch.nn.ModuleDict:
    """CLIP, and the norm before the Q-Former."""
    sizes = dataclasses.asdict(config.vision_tower_config)
    tower = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**sizes, attn_implementation="eager"))
    return torch.nn.ModuleDict({"vision_model": tower, "post_layernorm": torch.nn.LayerNorm(config.memory_width)})


def text_sizes(config: LLaMAVIDLlavaConfig) -> dict:
    sizes = dataclasses.asdict(config.qformer_config) | {"encoder_hidden_size": config.memory_width}
    return sizes | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "attn_implementation": "eager"}


def qformer_of(config: LLaMAVIDLlavaConfig) -> torch.nn.Module:
    return transformers.InstructBlipQFormerModel(transformers.InstructBlipQFormerConfig(**text_sizes(config)))


def bert(config: LLaMAVIDLlavaConfig) -> torch.nn.Module:
    """BERT as a decoder, with cross-attention in every layer."""
    sizes = text_sizes(config) | {"is_decoder": True, "add_cross_attention": True}
    return transformers.BertModel(transformers.BertConfig(**sizes), add_pooling_layer=False)


@functools.cache
def reference(config: LLaMAVIDLlavaConfig, scale: float) -> TorchLlamaVid:
    return TorchLlamaVid(config, scale)


@functools.cache
def parameters(config: LLaMAVIDLlavaConfig, scale: float) -> dict:
    """The reference's weights as our parameters, by path."""
    return parameters_of(reference(config, scale), config)


def parameters_of(model: TorchLlamaVid, config: LLaMAVIDLlavaConfig) -> dict:
    """The weights that `config` needs; the reference may have more."""
    state, shapes = {documented(name): value for name, value in model.state_dict().items()}, inventory.shapes(config)
    flat = {path: np.full(shape, np.nan, np.float32) for path, shape in shapes.items()}
    for weight in weight_table(config, "documented"):
        value = to_jax(state[weight.name].numpy(), weight)
        flat[weight.path][... if weight.index is None else weight.index] = value
    return flat


def documented(name: str) -> str:
    """BERT's names changed to those of InstructBLIP's Q-Former."""
    return name.replace("attention.self.", "attention.attention.").replace(
        "embeddings.LayerNorm", "embeddings.layernorm"
    )


@functools.cache
def structure(config: LLaMAVIDLlavaConfig, dtype) -> Structure:
    """Our model without its parameters."""
    return Structure(nnx.eval_shape(lambda: llama_vid.LlamaVid(config, rngs=nnx.Rngs(0), dtype=dtype)))


def ours(config: LLaMAVIDLlavaConfig, scale: float, dtype=np.float32) -> nnx.Module:
    """Our model with the reference's weights."""
    return structure(config, dtype).model(jax.tree.map(jnp.asarray, parameters(config, scale)))


def relative_error(got, wanted) -> float:
    """‖got - wanted‖ / ‖wanted‖; infinite if the shapes differ."""
    got, wanted = (np.asarray(value, np.float64) for value in (got, wanted))
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted)) if got.shape == wanted.shape else np.inf


def features_of(config: LLaMAVIDLlavaConfig, scale: float, has_cls: bool = True, width: int = 0) -> np.ndarray:
    """Random features of two frames, scaled like the weights, so that the memory norm's epsilon matters."""
    vision = config.vision_tower_config
    shape = (2, vision.num_patches + has_cls, width or vision.hidden_size)
    return (scale * np.random.default_rng(1).normal(size=shape)).astype(np.float32)


def questions(config: LLaMAVIDLlavaConfig, length: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Ids and masks `[2, length]` of two questions, the second one padded."""
    ids = np.random.default_rng(2).integers(1, config.qformer_config.vocab_size, (2, length)).astype(np.int32)
    return ids, np.arange(length) < np.array([[length], [length // 2]])


def token_ids(config: LLaMAVIDLlavaConfig, length: int = 512) -> np.ndarray:
    return np.random.default_rng(3).integers(0, config.text_config.vocab_size, (2, length)).astype(np.int32)


def vision_error(scale: float, config: LLaMAVIDLlavaConfig = CONFIG) -> float:
    size = config.vision_tower_config.image_size
    pixels = np.random.default_rng(4).normal(size=(2, 3, size, size)).astype(np.float32)
    got = ours(config, scale).vision(jnp.asarray(pixels))
    return relative_error(got, reference(config, scale).vision_features(torch.tensor(pixels)))


def qformer_error(scale: float, config: LLaMAVIDLlavaConfig = CONFIG) -> float:
    """The error of the text decoder alone, on memory of its own width."""
    arrays = (features_of(config, scale, width=config.memory_width), *questions(config))
    got = jax.vmap(ours(config, scale).qformer)(*arrays)
    return relative_error(got, reference(config, scale).queries(*map(torch.tensor, arrays)))


def frame_error(scale: float, config: LLaMAVIDLlavaConfig = CONFIG, has_cls: bool = True) -> float:
    """The error of text decoder and token generator together, from features to visual tokens."""
    arrays = (features_of(config, scale, has_cls), *questions(config))
    got = jax.jit(functools.partial(ours(config, scale).frames_tokens, has_cls=has_cls))(*map(jnp.asarray, arrays))
    return relative_error(got, reference(config, scale).frame_tokens(*map(torch.tensor, arrays), has_cls))


def tokens_error(scale: float, config: LLaMAVIDLlavaConfig = CONFIG) -> float:
    """The error of the token generator alone; its queries have size 1, so that its attention is not uniform."""
    vision, random = config.vision_tower_config, np.random.default_rng(5)
    patches = random.normal(size=(2, vision.num_patches, vision.hidden_size)).astype(np.float32)
    queries = random.normal(size=(2, config.num_query, config.qformer_config.hidden_size)).astype(np.float32)
    got = jax.vmap(ours(config, scale).visual_tokens)(patches, queries)
    return relative_error(got, reference(config, scale).visual_tokens(torch.tensor(patches), torch.tensor(queries)))


def llama_error(scale: float, config: LLaMAVIDLlavaConfig = CONFIG) -> float:
    ids, llama = token_ids(config), ours(config, scale).llama
    got = llama.logits(llama(llama.embed(ids)))
    return relative_error(got, reference(config, scale).logits(torch.tensor(ids)))
