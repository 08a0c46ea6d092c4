"""Model configuration: frozen dataclasses, read strictly (`config/strict.py`).

Field names are those of the documented transformers configuration where it has one.  Every field is read by the
program.  `config/foreign.py` reads the `config.json` of the original and of the documented layout.

Numerics policy (the one statement of it).  Parameters are stored in `param_dtype` and matrix products computed in
`dtype`, both float32 or bfloat16.  Softmax, layer and RMS norms and rotary angles are always computed in float32 and
cast back.  The original casts its vision tower to float16 and everything else to bfloat16.
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llamavid_jax.config.recipe import read_recipe
from llamavid_jax.config.strict import check_fields, require_divisible, strict
from llamavid_jax.errors import ConfigError
from llamavid_jax.files import write_files
from llamavid_jax.shapes import IMAGE_TOKEN


def grid_stride(compress_type: str, side: int) -> int:
    """Kernel and stride of the pooling over `side` × `side` patches, 0 for "none"; "grid:N" is rounded down."""
    if compress_type == "none":
        return 0
    if compress_type == "mean":
        return side
    grid = re.fullmatch("grid:([0-9]{1,4})", compress_type)
    if grid and 1 < int(grid[1]) <= side:
        return side // int(grid[1])
    raise ConfigError(f"compress_type is {compress_type!r}; use 'none', 'mean' or 'grid:n' with n from 2 to {side}")


def projector_depth(mm_projector_type: str) -> int:
    """Linear layers of the content projector: 0 for "identity", 1 for "linear", N for "mlpNx_gelu"."""
    if mm_projector_type in ("identity", "linear"):
        return int(mm_projector_type == "linear")
    mlp = re.fullmatch("mlp([0-9]{1,4})x_gelu", mm_projector_type)
    if mlp and int(mlp[1]) > 0:
        return int(mlp[1])
    raise ConfigError(
        f"mm_projector_type is {mm_projector_type!r}; use 'linear', 'mlpNx_gelu' (such as mlp2x_gelu) or 'identity'"
    )


class Part:
    """A part of the configuration that is read and written by itself: a `config.json` in which the rest is default."""

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> Any:
        """This part of a checkpoint's `config.json`, in any of its forms."""
        return getattr(LLaMAVIDLlavaConfig.from_pretrained(directory), cls._field())

    def save_pretrained(self, directory: str | Path) -> None:
        LLaMAVIDLlavaConfig(**{self._field(): self}).save_pretrained(directory)

    @classmethod
    def _field(cls) -> str:
        return next(field.name for field in dataclasses.fields(LLaMAVIDLlavaConfig) if field.type is cls)


@dataclasses.dataclass(frozen=True)
class LLaMAVIDLlavaVisionConfig(Part):
    """EVA ViT-g/14 as LLaMA-VID runs it: 39 of EVA's 40 blocks, no final norm (`eva_vit.py` in the original)."""

    hidden_size: int = 1408
    intermediate_size: int = 6144
    num_hidden_layers: int = 39
    num_attention_heads: int = 16
    image_size: int = 224
    patch_size: int = 14
    layer_norm_eps: float = 1e-6

    def __post_init__(self):
        check_fields(self, "vision_tower_config.")
        require_divisible(
            "vision_tower_config", "hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads
        )
        require_divisible("vision_tower_config", "image_size", self.image_size, "patch_size", self.patch_size)

    @property
    def side(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of one frame, without the CLS token."""
        return self.side**2


@dataclasses.dataclass(frozen=True)
class LLaMAVIDLlavaQFormerConfig(Part):
    """InstructBLIP's Q-Former: BERT-base with learned queries and cross-attention in every nth layer."""

    vocab_size: int = 30523  # bert-base-uncased and [DEC]
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512
    layer_norm_eps: float = 1e-12
    cross_attention_frequency: int = 2
    dropout: float = 0.1  # in training only

    def __post_init__(self):
        check_fields(self, "qformer_config.", own_range=["dropout"])
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

    @property
    def max_length(self) -> int:
        """The longest sequence, in tokens, that the rotary positions were made for."""
        return int(self.max_position_embeddings * self.rope_factor)


@dataclasses.dataclass(frozen=True)
class LLaMAVIDLlavaConfig:
    """The whole model.

    `compress_type` is "none" (all patches), "mean" (one content token a frame) or "grid:n" (average pooling with
    stride side // n).  `mm_projector_type` is "linear", "mlpNx_gelu" or "identity".  `image_aspect_ratio` is "pad"
    (to a square, with the mean colour) or "crop"; videos are always cropped.  `frame_tokens` is "both" kinds of
    token, or "context" or "content" alone (the paper's ablation).  `image_token_index` is the
    placeholder id that `input_ids` may hold besides -200: the documented layout gives it a row of the vocabulary.
    `quantization` is "none", or "int8" or "int4" where the kernels of LLaMA's layers are held so.
    """

    vision_tower_config: LLaMAVIDLlavaVisionConfig = LLaMAVIDLlavaVisionConfig()
    qformer_config: LLaMAVIDLlavaQFormerConfig = LLaMAVIDLlavaQFormerConfig()
    text_config: LlamaConfig = LlamaConfig()
    num_query: int = 32
    compress_type: str = "mean"
    frame_tokens: str = "both"
    mm_projector_type: str = "mlp2x_gelu"
    image_aspect_ratio: str = "pad"
    image_token_index: int = IMAGE_TOKEN
    quantization: str = "none"

    def __post_init__(self):
        check_fields(self, own_range=["image_token_index"])
        grid_stride(self.compress_type, self.vision_tower_config.side)  # raises on a wrong value
        projector_depth(self.mm_projector_type)
        if (
            self.mm_projector_type == "identity"
            and self.vision_tower_config.hidden_size != self.text_config.hidden_size
        ):
            raise ConfigError(
                f"mm_projector_type 'identity' needs vision and text of one width, but they are "
                f"{self.vision_tower_config.hidden_size} and {self.text_config.hidden_size}; use 'mlp2x_gelu'"
            )
        if self.image_aspect_ratio not in ("pad", "crop"):
            raise ConfigError(f"image_aspect_ratio is {self.image_aspect_ratio!r}; use 'pad' or 'crop'")
        if self.frame_tokens not in ("both", "context", "content"):
            raise ConfigError(f"frame_tokens is {self.frame_tokens!r}; use 'both', 'context' or 'content'")
        if self.quantization not in ("none", "int8", "int4"):
            raise ConfigError(f"quantization is {self.quantization!r}; use 'none', 'int8' or 'int4'")

    def quantized(self, kind: str) -> "LLaMAVIDLlavaConfig":
        """The same model with quantised kernels.  Raises ConfigError where they have lost what `kind` would need."""
        if self.quantization not in ("none", kind):
            raise ConfigError(
                f"quantize is {kind!r}, but the weights are {self.quantization} already; "
                f"use {self.quantization!r}, or convert the original ones again with --quantize {kind}"
            )
        return dataclasses.replace(self, quantization=kind)

    def require_whole(self, source: Any) -> "LLaMAVIDLlavaConfig":
        """Itself.  Raises ConfigError for quantised weights, where `source` is read for whole ones."""
        if self.quantization != "none":
            raise ConfigError(
                f"{source} holds {self.quantization} weights, which are for inference alone; "
                "convert the original ones again without --quantize"
            )
        return self

    @property
    def tokens_per_frame(self) -> int:
        """Context token and content tokens of one frame: the n+1 of the paper."""
        side = self.vision_tower_config.side
        content = (side // (grid_stride(self.compress_type, side) or 1)) ** 2
        return {"both": 1 + content, "context": 1, "content": content}[self.frame_tokens]

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> "LLaMAVIDLlavaConfig":
        """Reads `config.json` of a converted checkpoint, an original one or a documented one.

        Raises ConfigError when the file is missing, is not JSON, or describes something this model does not do.
        """
        try:
            path = Path(directory) if Path(directory).suffix == ".json" else Path(directory) / "config.json"
        except TypeError:
            raise ConfigError(f"the checkpoint is {directory!r}; give the path of its folder") from None
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise ConfigError(f"{path} does not exist; give the folder of a converted checkpoint") from None
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"{str(path)!r} is not readable JSON: {error}") from None
        try:
            return cls.from_dict(values)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, values: Any) -> "LLaMAVIDLlavaConfig":
        """Reads a mapping in any of the three forms; which one is told by `model_type`."""
        from llamavid_jax.config import foreign

        if not isinstance(values, Mapping):
            raise ConfigError(f"the configuration is of type {type(values).__name__}; a mapping of fields is needed")

        match values.get("model_type"):
            case "llamavid_jax":
                return strict(cls, {k: v for k, v in values.items() if k != "model_type"}, "")
            case "llamavid":
                return foreign.from_documented(values)
            case "llava" | "llava_llama" | None if "mm_hidden_size" in values or "mm_vision_tower" in values:
                return foreign.from_original(values)
            case "llama":
                raise ConfigError(
                    "model_type is 'llama': a language model alone, without vision tower, Q-Former and projectors"
                )
            case other:
                raise ConfigError(
                    f"model_type is {other!r}; known are 'llamavid_jax', 'llamavid' (documented) and 'llava' (original)"
                )

    @classmethod
    def from_yaml(cls, path: str | Path) -> "LLaMAVIDLlavaConfig":
        """Reads one of `configs/models/*.yaml`: this class's own field names, every unknown key an error."""
        values = read_recipe(path, home="configs/models/")
        try:
            return strict(cls, values, "")
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        return {"model_type": "llamavid_jax", **dataclasses.asdict(self)}

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes `config.json` in the project's own form."""
        write_files(directory, {"config.json": (json.dumps(self.to_dict(), indent=1) + "\n").encode()})
