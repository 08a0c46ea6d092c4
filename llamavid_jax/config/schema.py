"""Model configuration: frozen dataclasses, read strictly (`config/strict.py`).

Field names are those of the documented transformers configuration where it has one.  Every field has an effect.
`config/foreign.py` reads the `config.json` of the original and of the documented layout.

Numerics policy (stated only here).  Parameters are stored in `param_dtype` and matmuls computed in `dtype`, both
float32 or bfloat16.  Softmax, layer and RMS norms and rotary angles are always computed in float32 and cast back.  The
original casts its vision tower to float16 and everything else to bfloat16.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llamavid_jax.config import foreign
from llamavid_jax.config.documented import KINDS, documented, model_fields
from llamavid_jax.config.parts import LlamaConfig, LLaMAVIDLlavaQFormerConfig, LLaMAVIDLlavaVisionConfig
from llamavid_jax.config.recipe import read_recipe
from llamavid_jax.config.strict import check_fields, require_one_of, strict
from llamavid_jax.errors import ConfigError
from llamavid_jax.files import find, read_object, write_files
from llamavid_jax.shapes import END, IMAGE_TOKEN, PATCH, START


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
    mlp = re.fullmatch("mlp([0-9]{1,2})x_gelu", mm_projector_type)
    if mlp and int(mlp[1]) > 0:
        return int(mlp[1])
    raise ConfigError(
        f"mm_projector_type is {mm_projector_type!r}; use 'linear', 'mlpNx_gelu' (such as mlp2x_gelu) or 'identity'"
    )


HEAD = {"model_type": "llamavid_jax", "architectures": ["LLaMAVIDLlavaForConditionalGeneration"]}  # of config.json


def stated_pixels(directory: str | Path, settings: str = "config.json") -> dict[str, tuple[float, ...]]:
    """`image_mean` and `image_std`, where a folder's `preprocessor_config.json` or its `settings` state them.

    Raises ConfigError where the two files disagree.
    """
    found: dict[str, tuple[float, ...]] = {}
    for name in (settings, "preprocessor_config.json"):
        path = Path(directory) / name
        file = find(path)
        try:
            values = read_object(file)
            values = (values.get("vision_tower_config") or {}) if name == settings else values
            stated = {key: tuple(map(float, values[key])) for key in ("image_mean", "image_std") if key in values}
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path} cannot be read ({error}); image_mean and image_std are three numbers") from None
        for key in found.keys() & stated:
            if found[key] != stated[key]:
                raise ConfigError(
                    f"{path}: {key} is {list(stated[key])}, but {settings} beside it says {list(found[key])}; write "
                    "into both what the model was trained with"
                )
        found |= stated
    return found


@documented(model_fields)
@dataclasses.dataclass(frozen=True)
class LLaMAVIDLlavaConfig:
    """The whole model.

    `bert_type` is the text decoder: "qformer_pretrain" (InstructBLIP's, with a norm on what it reads), "qformer" (the
    same without) or "raw_bert" (BERT, whose text states are the queries).  `compress_type` is "none" (all patches),
    "mean" (one content token a frame) or "grid:n" (average pooling with stride side // n).  `mm_projector_type` is
    "linear", "mlpNx_gelu" or "identity".  `image_aspect_ratio` is "pad" (to a square, with the mean colour) or "crop";
    videos are always cropped.  `frame_tokens` is "both" kinds of token, or "context" or "content" alone (the paper's
    ablation).  `image_token_index` is the placeholder id that `input_ids` may hold besides -200: the documented layout
    gives it a row of the vocabulary.  `quantization` is "none", "int8" or "int4": how the kernels of LLaMA's layers are
    stored.  `mm_use_im_start_end`: a token stands before and after every visual; `mm_use_im_patch_token`: the
    vocabulary has one more token, which nothing uses.
    """

    vision_tower_config: LLaMAVIDLlavaVisionConfig = dataclasses.field(default_factory=LLaMAVIDLlavaVisionConfig)
    qformer_config: LLaMAVIDLlavaQFormerConfig = dataclasses.field(default_factory=LLaMAVIDLlavaQFormerConfig)
    text_config: LlamaConfig = dataclasses.field(default_factory=LlamaConfig)
    num_query: int = 32
    compress_type: str = "mean"
    frame_tokens: str = "both"
    mm_projector_type: str = "mlp2x_gelu"
    image_aspect_ratio: str = "pad"
    image_token_index: int = IMAGE_TOKEN
    quantization: str = "none"
    bert_type: str = "qformer_pretrain"
    mm_use_im_start_end: bool = False
    mm_use_im_patch_token: bool = False
    model_type = HEAD["model_type"]  # not a field; transformers reads it

    def __post_init__(self):
        check_fields(self, own_range=["image_token_index"])
        require_one_of("bert_type", self.bert_type, KINDS)
        if self.bert_type == "raw_bert" and self.qformer_config.cross_attention_frequency != 1:
            raise ConfigError(
                f"qformer_config.cross_attention_frequency is {self.qformer_config.cross_attention_frequency}, but "
                "every layer of bert_type 'raw_bert' attends to the frame; set it to 1"
            )
        if self.vision_tower_config.select_feature == "cls_patch" and self.compress_type.startswith("grid"):
            raise ConfigError(
                f"compress_type is {self.compress_type!r}, but the CLS token of select_feature 'cls_patch' has no "
                "place in a grid; use 'patch', or compress_type 'mean' or 'none'"
            )
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
        require_one_of("image_aspect_ratio", self.image_aspect_ratio, ("pad", "crop"))
        require_one_of("frame_tokens", self.frame_tokens, ("both", "context", "content"))
        require_one_of("quantization", self.quantization, ("none", "int8", "int4"))

    def quantized(self, kind: str) -> "LLaMAVIDLlavaConfig":
        """The same model with quantised kernels.  Raises ConfigError where they are of another kind already."""
        if self.quantization not in ("none", kind):
            raise ConfigError(
                f"quantize is {kind!r}, but the weights are {self.quantization} already; "
                f"use {self.quantization!r}, or convert the original ones again with --quantize {kind}"
            )
        return dataclasses.replace(self, quantization=kind)

    def require_whole(self, source: Any) -> "LLaMAVIDLlavaConfig":
        """Returns itself.  Raises ConfigError for quantised weights: `source` must hold full-precision ones."""
        if self.quantization != "none":
            raise ConfigError(
                f"{source} holds {self.quantization} weights, which are for inference alone; "
                "convert the original ones again without --quantize"
            )
        return self

    @property
    def memory_width(self) -> int:
        """Width of the features as the text decoder reads them."""
        if self.bert_type == "raw_bert":
            return self.qformer_config.hidden_size
        return self.qformer_config.encoder_hidden_size * (self.bert_type == "qformer_pretrain") or self.tower_width

    @property
    def projects_memory(self) -> bool:
        """Whether a projection brings the tower's features to `memory_width`."""
        return self.bert_type == "raw_bert" or self.memory_width != self.tower_width

    @property
    def tower_width(self) -> int:
        return self.vision_tower_config.hidden_size

    @property
    def added_tokens(self) -> tuple[str, ...]:
        """Tokens that the language model's tokenizer needs besides its own, in the order of their ids."""
        return (PATCH,) * self.mm_use_im_patch_token + (START, END) * self.mm_use_im_start_end

    @property
    def tokens_per_frame(self) -> int:
        """Context token and content tokens of one frame of pixels: the n+1 of the paper."""
        return self.tokens_of(self.vision_tower_config.has_cls)

    def tokens_of(self, has_cls: bool) -> int:
        """`tokens_per_frame` for given features, which may or may not begin with the CLS token."""
        vision = self.vision_tower_config
        content = (vision.side // (grid_stride(self.compress_type, vision.side) or 1)) ** 2
        content += has_cls and vision.select_feature == "cls_patch" and self.compress_type == "none"
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
        file = find(path)  # outside the `try`: a bucket's errors are not about JSON
        try:
            values = read_object(file)
        except (FileNotFoundError, NotADirectoryError):
            raise ConfigError(f"{path} does not exist; give the folder of a converted checkpoint") from None
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} is not readable JSON: {error}") from None
        try:
            config = cls.from_dict(values)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
        return config.with_pixels_of(path.parent, path.name)

    def with_pixels_of(self, directory: str | Path, settings: str = "config.json") -> "LLaMAVIDLlavaConfig":
        """Itself, with the pixel mean and standard deviation that a checkpoint's files state, if any.

        Training and inference normalise images with them.
        """
        found = stated_pixels(directory, settings)
        return dataclasses.replace(self, vision_tower_config=dataclasses.replace(self.vision_tower_config, **found))

    @classmethod
    def from_dict(cls, values: Any) -> "LLaMAVIDLlavaConfig":
        """Reads a mapping in any of the three forms; `model_type` says which one."""
        if not isinstance(values, Mapping):
            raise ConfigError(f"the configuration is of type {type(values).__name__}; a mapping of fields is needed")

        match values.get("model_type"):
            case "llamavid_jax":
                return strict(cls, {k: v for k, v in values.items() if k not in HEAD}, "")
            case "llamavid":
                return strict(cls, foreign.from_documented(values), "")
            case "llava" | "llava_llama" | None if "mm_hidden_size" in values or "mm_vision_tower" in values:
                return strict(cls, foreign.from_original(values), "")
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
        return {**HEAD, **dataclasses.asdict(self)}

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes `config.json` in the project's own form."""
        write_files(directory, {"config.json": (json.dumps(self.to_dict(), indent=1) + "\n").encode()})


for _field in dataclasses.fields(LLaMAVIDLlavaConfig)[:3]:
    _field.type.WHOLE, _field.type.FIELD = LLaMAVIDLlavaConfig, _field.name
