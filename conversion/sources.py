"""Where weights come from: one checkpoint, or a language model and the files of the other parts.

Files of parts use other names; here they get those of a complete original checkpoint, which the tables list.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

from llamavid_jax.config.parts import LlamaConfig
from llamavid_jax.config.schema import LLaMAVIDLlavaConfig
from llamavid_jax.errors import CheckpointError

from .read_gguf import GgufTensor, gguf_config, read_gguf
from .read_torch import read_checkpoint, read_json
from .stored_tensor import StoredTensor

VISION = "model.vision_tower.vision_tower."
Tensor = StoredTensor | GgufTensor


@dataclasses.dataclass(frozen=True)
class Source:
    """Tensors of one file or folder under the names of a complete checkpoint."""

    origin: Path
    tensors: Mapping[str, Tensor]
    resizable: bool = False  # its position table may be of another image size


def open_sources(
    checkpoint: Path, vision: Path | None, qformer: Path | None, projectors: Path | None, resizable: bool
) -> list[Source]:
    """All sources, the complete checkpoint first: where two hold a weight, the later one is used."""
    whole = read_gguf(checkpoint) if checkpoint.suffix == ".gguf" else unwrapped(read_checkpoint(checkpoint))
    found = [Source(checkpoint, whole, resizable)]
    parts = ((vision, vision_name), (qformer, qformer_name), (projectors, projector_name))
    for origin, rename in parts:
        if origin is not None:
            found.append(Source(origin, _renamed(origin, rename), rename is vision_name))
    return found


def unwrapped(tensors: Mapping[str, StoredTensor]) -> Mapping[str, StoredTensor]:
    """The tensors without the prefixes that DDP, torch.compile and PEFT put before every name."""
    for prefix in ("module.", "_orig_mod.", "module.", "base_model.model."):
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _renamed(origin: Path, rename: Callable[[str], str]) -> dict[str, StoredTensor]:
    tensors = unwrapped(read_checkpoint(origin))
    renamed = {rename(name): tensor for name, tensor in tensors.items()}
    if len(renamed) != len(tensors):
        raise CheckpointError(f"{origin} holds a weight under two names; give a file with one set of weights")
    return renamed


def vision_name(name: str) -> str:
    """Names of `eva_vit_g.pth` and of CLIP, bare or behind the prefixes of InstructBLIP and LLaMA-VID."""
    for prefix in (VISION, "vision_tower.vision_tower.", "visual_encoder."):
        name = name.removeprefix(prefix)
    return VISION + name


def qformer_name(name: str) -> str:
    """Names of `instruct_blip_*_trimmed.pth`: `Qformer.bert...`, `query_tokens`, `ln_vision`; and of BERT."""
    if name == "query_tokens":
        return "model.vlm_att_query"
    if name.startswith(("Qformer.bert.", "bert.", "embeddings.", "encoder.")):
        bare = name.removeprefix("Qformer.").removeprefix("bert.")
        bare = bare.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        return "model.vlm_att_encoder.bert." + bare
    if name.startswith("ln_vision."):
        return "model.vlm_att_ln." + name.removeprefix("ln_vision.")
    return name


def projector_name(name: str) -> str:
    """Names of stage 1's `mm_projector.bin`, with or without the prefix that PEFT adds."""
    name = name.removeprefix("base_model.model.")
    return f"model.{name}" if name.startswith(("mm_projector.", "vlm_att_")) else name


def model_config(checkpoint: Path, config_file: Path | None, image_size: int | None) -> LLaMAVIDLlavaConfig:
    """The configuration: `config_file`'s if given, else that of the checkpoint's `config.json`.

    A bare language model (GGUF, or a `config.json` of model type llama) states only `text_config`.  The rest is then
    `config_file`'s or that of the released models.
    """
    given = read_config_file(config_file) if config_file else None
    own = checkpoint / "config.json"
    values = read_json(own) if own.is_file() else {}
    if checkpoint.suffix == ".gguf":
        config = _with_text(given or LLaMAVIDLlavaConfig(), gguf_config(checkpoint))
    elif values.get("model_type") == "llama" and "mm_vision_tower" not in values:
        text_config = LlamaConfig.from_transformers(values, str(own))
        config = _with_text(given or LLaMAVIDLlavaConfig(), text_config)
    elif given:
        config = given
    else:
        home = checkpoint if checkpoint.is_dir() else checkpoint.parent
        if not (home / "config.json").is_file():
            raise CheckpointError(
                f"{home / 'config.json'}, which belongs to the weights, does not exist; download it too, or give the "
                "sizes with --config"
            )
        config = LLaMAVIDLlavaConfig.from_pretrained(home)
    if image_size is not None:
        vision = dataclasses.replace(config.vision_tower_config, image_size=image_size)
        config = dataclasses.replace(config, vision_tower_config=vision)
    return config


def _with_text(config: LLaMAVIDLlavaConfig, text: LlamaConfig) -> LLaMAVIDLlavaConfig:
    """`config` with a language model that has no rows yet for the tokens that `config` adds."""
    rows = text.vocab_size + len(config.added_tokens)
    return dataclasses.replace(config, text_config=dataclasses.replace(text, vocab_size=rows))


def read_config_file(file: Path) -> LLaMAVIDLlavaConfig:
    """A `config.json` of any of the three forms, the folder of one, or one of `configs/models/*.yaml`."""
    if file.suffix == ".json" or file.is_dir():
        return LLaMAVIDLlavaConfig.from_pretrained(file)
    return LLaMAVIDLlavaConfig.from_yaml(file)
