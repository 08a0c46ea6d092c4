"""The parts of a model's configuration: vision tower, text decoder, language model."""

import dataclasses
import math
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from llamavid_jax.config import foreign
from llamavid_jax.config.documented import documented, qformer_fields, vision_fields
from llamavid_jax.config.strict import check_fields, require_divisible, require_one_of, strict
from llamavid_jax.errors import ConfigError


class Part:
    """A part of the configuration that can be loaded and saved alone: in a `config.json` with defaults for the rest."""

    WHOLE: ClassVar[Any]  # LLaMAVIDLlavaConfig, in which this is the field FIELD
    FIELD: ClassVar[str]

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> Any:
        """This part of a checkpoint's `config.json`, in any of its forms."""
        return getattr(cls.WHOLE.from_pretrained(directory), cls.FIELD)

    def save_pretrained(self, directory: str | Path) -> None:
        self.WHOLE(**{self.FIELD: self}).save_pretrained(directory)


CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of pixels from 0 to 1, as CLIP and EVA were trained
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class Tower(NamedTuple):
    """How towers of one kind are built."""

    patch_bias: bool
    pre_norm: bool  # a norm before the first block
    key_bias: bool  # separate query, key and value with a bias each; else one kernel, no bias for the key
    post_norm: bool  # held for the way back to PyTorch; the features come from before it
    cls_in_patches: bool  # whether the features of select_feature "patch" begin with the CLS token


TOWERS = {
    "eva": Tower(patch_bias=True, pre_norm=False, key_bias=False, post_norm=False, cls_in_patches=True),
    "clip": Tower(patch_bias=False, pre_norm=True, key_bias=True, post_norm=True, cls_in_patches=False),
}


@documented(vision_fields)
@dataclasses.dataclass(frozen=True)
class LLaMAVIDLlavaVisionConfig(Part):
    """A vision tower.  By default EVA ViT-g/14 as LLaMA-VID runs it: 39 of EVA's 40 blocks, no final norm.

    `kind` is one of TOWERS.  `feature_layer` is the index of the hidden state that gives the features: 0 before the
    first block, -1 after the last.  `select_feature` "patch" keeps the CLS token out of the visual tokens; with
    "cls_patch" it is one of the patches.  `image_mean` and `image_std` normalise the pixels, red, green and blue.
    """

    hidden_size: int = 1408
    intermediate_size: int = 6144
    num_hidden_layers: int = 39
    num_attention_heads: int = 16
    image_size: int = 224
    patch_size: int = 14
    layer_norm_eps: float = 1e-6
    kind: str = "eva"
    hidden_act: str = "gelu"
    feature_layer: int = -1
    select_feature: str = "patch"
    image_mean: tuple = CLIP_MEAN
    image_std: tuple = CLIP_STD

    def __post_init__(self):
        section = "vision_tower_config"
        check_fields(self, f"{section}.", own_range=["feature_layer"])
        require_divisible(section, "hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads)
        require_divisible(section, "image_size", self.image_size, "patch_size", self.patch_size)
        require_one_of(f"{section}.kind", self.kind, TOWERS)
        require_one_of(f"{section}.hidden_act", self.hidden_act, ("gelu", "quick_gelu"))
        require_one_of(f"{section}.select_feature", self.select_feature, ("patch", "cls_patch"))
        layers = self.num_hidden_layers
        if not -layers - 1 <= self.feature_layer <= layers or (self.kind == "eva" and self.feature_layer != -1):
            known = "-1, its last block" if self.kind == "eva" else f"{-layers - 1} to {layers}"
            raise ConfigError(f"{section}.feature_layer is {self.feature_layer}; this tower has {known}")
        for name in ("image_mean", "image_std"):
            values = getattr(self, name)
            if len(values) != 3 or not all(type(value) is float and math.isfinite(value) for value in values):
                raise ConfigError(f"{section}.{name} is {values!r}; three numbers are needed, for red, green and blue")
        if min(self.image_std) <= 0:
            raise ConfigError(
                f"{section}.image_std is {self.image_std!r}; pixels are divided by it, so use numbers above 0"
            )

    @property
    def tower(self) -> Tower:
        return TOWERS[self.kind]

    @property
    def side(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of one frame, without the CLS token."""
        return self.side**2

    @property
    def blocks_used(self) -> int:
        """How many blocks lead to the features; later ones are kept but not run."""
        return self.feature_layer % (self.num_hidden_layers + 1)

    @property
    def has_cls(self) -> bool:
        """Whether the tower's features begin with the CLS token."""
        return self.tower.cls_in_patches or self.select_feature == "cls_patch"


@documented(qformer_fields)
@dataclasses.dataclass(frozen=True)
class LLaMAVIDLlavaQFormerConfig(Part):
    """The text decoder: BERT-base with cross-attention in every nth layer, by default InstructBLIP's Q-Former.

    `encoder_hidden_size` is the width of the features that a pretrained Q-Former reads, 0 for the tower's.
    """

    vocab_size: int = 30523  # bert-base-uncased and [DEC]
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512
    layer_norm_eps: float = 1e-12
    cross_attention_frequency: int = 2
    dropout: float = 0.1  # in training only
    encoder_hidden_size: int = 0

    def __post_init__(self):
        check_fields(self, "qformer_config.", from_zero=["encoder_hidden_size"], own_range=["dropout"])
        require_divisible(
            "qformer_config", "hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads
        )
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"qformer_config.dropout is {self.dropout}; use a number from 0 to below 1")

    @property
    def num_cross_attention_layers(self) -> int:
        """Layers 0, n, 2n, ... attend to the frame."""
        return math.ceil(self.num_hidden_layers / self.cross_attention_frequency)


@dataclasses.dataclass(frozen=True)
class LlamaConfig(Part):
    """A LLaMA decoder: Vicuna-1.5 by default, grouped-query heads and tied embeddings for newer bases."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int = 128
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_factor: float = 1.0  # linear scaling: positions are divided by it, however short the prompt
    tie_word_embeddings: bool = False
    eos_token_id: int = 2

    def __post_init__(self):
        check_fields(self, "text_config.", own_range=["eos_token_id"])
        require_divisible(
            "text_config",
            "num_attention_heads",
            self.num_attention_heads,
            "num_key_value_heads",
            self.num_key_value_heads,
        )
        require_divisible("text_config", "head_dim", self.head_dim, "the halves that rotary positions turn", 2)
        if not 0 <= self.eos_token_id < self.vocab_size:
            raise ConfigError(
                f"text_config.eos_token_id is {self.eos_token_id}; vocab_size allows 0 to {self.vocab_size - 1}"
            )
        if self.rope_factor < 1:
            raise ConfigError(
                f"text_config.rope_factor is {self.rope_factor}; linear scaling needs a factor of 1 or more"
            )

    @classmethod
    def from_transformers(cls, values: Any, section: str = "text_config") -> "LlamaConfig":
        """Reads transformers' fields; `section` names them in errors."""
        return strict(cls, foreign.llama_config(values, section), f"{section}.")

    @property
    def max_length(self) -> int:
        """The longest sequence, in tokens, that the rotary positions were made for."""
        return int(self.max_position_embeddings * self.rope_factor)
