"""A LLaMA in llama.cpp's GGUF file: weights under transformers' names, configuration and tokenizer from its metadata.

Quantised tensors are dequantised one by one to float32.  llama.cpp interleaves the rotary pairs of q and k (row 2i and
2i+1 of a head rotate together); here they go back to halves (row i and i + h/2).  Needs the `gguf` package
(the extra `convert`).
"""

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange

from llamavid_jax.config.schema import LlamaConfig
from llamavid_jax.errors import CheckpointError

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
FLOAT32 = np.dtype(np.float32)
_CONTROL = 3  # token types of GGUF: never part of text, such as <|im_end|>
_BYTE_LEVEL = ("default", "gpt-2", "smollm")  # pre-tokenizers that are GPT-2's, smollm with single digits
_SINGLE_DIGITS = ("smollm",)


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """A quantised tensor; `heads` is set where rotary pairs are interleaved."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    stored: np.dtype
    stored_shape: tuple[int, ...]
    kind: Any  # gguf.GGMLQuantizationType
    heads: int | None
    dtype: np.dtype = FLOAT32

    @property
    def nbytes(self) -> int:
        return math.prod(self.stored_shape) * self.stored.itemsize

    def read(self) -> np.ndarray:
        """float32 values of `shape`."""
        import gguf

        values = np.empty(self.stored_shape, self.stored)
        with self.file.open("rb") as stream:
            stream.seek(self.offset)
            if stream.readinto(values.view(np.uint8).reshape(-1)) != values.nbytes:
                raise CheckpointError(f"{self.file} ends inside a tensor; it is truncated: download it again")
        try:
            values = gguf.dequantize(values, self.kind).reshape(self.shape)
        except NotImplementedError:
            raise CheckpointError(
                f"{self.file} is quantised as {self.kind.name}, which gguf cannot read; use Q4_1 or Q8_0"
            ) from None
        if self.heads:
            values = rearrange(values, "(n h two) d -> (n two h) d", n=self.heads, two=2)
        return values


@functools.lru_cache(maxsize=1)
def _open(file: Path):
    try:
        import gguf
    except ModuleNotFoundError:
        raise CheckpointError("reading .gguf needs the gguf package: pip install gguf") from None
    try:
        reader = gguf.GGUFReader(file)
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise CheckpointError(f"{file} is not a readable GGUF file ({error}); download it again") from None
    architecture = _value(reader, "general.architecture", "unknown")
    if architecture != "llama":
        raise CheckpointError(f"{file} holds the architecture {architecture!r}; only 'llama' is known")
    return reader


def _value(reader, key: str, default: Any = None) -> Any:
    field = reader.get_field(key)
    return default if field is None else field.contents()


def read_gguf(file: Path) -> dict[str, GgufTensor]:
    """Every tensor under transformers' name.  Raises CheckpointError for a damaged file or another architecture."""
    reader = _open(file)
    text = gguf_config(file)
    heads = {"attn_q": text.num_attention_heads, "attn_k": text.num_key_value_heads}
    found = {}
    for tensor in reader.tensors:
        kind = tensor.name.removesuffix(".weight").split(".")[-1]
        if kind not in _NAMES or not tensor.name.endswith(".weight"):
            raise CheckpointError(f"{file} holds {tensor.name}, which LLaMA as known here does not have")
        layer = f"model.layers.{tensor.name.split('.')[1]}." if tensor.name.startswith("blk.") else ""
        found[f"{layer}{_NAMES[kind]}.weight"] = GgufTensor(
            file,
            int(tensor.data_offset),
            tuple(int(size) for size in reversed(tensor.shape)),
            tensor.data.dtype,
            tuple(tensor.data.shape),
            tensor.tensor_type,
            heads.get(kind),
        )
    return found


def gguf_config(file: Path) -> LlamaConfig:
    """The LLaMA configuration that the metadata states."""
    reader = _open(file)
    names = {tensor.name: tensor for tensor in reader.tensors}
    if "token_embd.weight" not in names:
        raise CheckpointError(f"{file} holds no token_embd.weight; give the GGUF file of a complete model")
    heads = _value(reader, "llama.attention.head_count")
    values = {
        "vocab_size": int(names["token_embd.weight"].shape[-1]),
        "hidden_size": _value(reader, "llama.embedding_length"),
        "intermediate_size": _value(reader, "llama.feed_forward_length"),
        "num_hidden_layers": _value(reader, "llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _value(reader, "llama.attention.head_count_kv", heads),
        "head_dim": _value(reader, "llama.attention.key_length") or _value(reader, "llama.rope.dimension_count"),
        "max_position_embeddings": _value(reader, "llama.context_length"),
        "rms_norm_eps": _value(reader, "llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": _value(reader, "llama.rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in names,
        "eos_token_id": _value(reader, "tokenizer.ggml.eos_token_id"),
    }
    scaling = _value(reader, "llama.rope.scaling.type", "none")
    if scaling != "none":
        values["rope_scaling"] = {"type": scaling, "factor": _value(reader, "llama.rope.scaling.factor", 1.0)}
    missing = [name for name in ("hidden_size", "num_hidden_layers", "num_attention_heads") if not values[name]]
    if missing:
        raise CheckpointError(
            f"{file} does not state {', '.join(missing)}; its metadata is incomplete: download it again"
        )
    return LlamaConfig.from_transformers(values, str(file))


def write_tokenizer(file: Path, out: Path) -> bool:
    """Writes `tokenizer.json` and `tokenizer_config.json` of a byte-level BPE; False if the file has another kind."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    reader = _open(file)
    pre = _value(reader, "tokenizer.ggml.pre", "default")
    if _value(reader, "tokenizer.ggml.model") != "gpt2" or pre not in _BYTE_LEVEL:
        return False
    tokens = _value(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in _value(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    digits = [pre_tokenizers.Digits(individual_digits=True)] if pre in _SINGLE_DIGITS else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    kinds = _value(reader, "tokenizer.ggml.token_type", [])
    control = [token for token, kind in zip(tokens, kinds, strict=False) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token = _value(reader, f"tokenizer.ggml.{key}_token_id")
        if token is not None:
            settings[f"{role}_token"] = tokens[token]
    settings["add_bos_token"] = bool(_value(reader, "tokenizer.ggml.add_bos_token", False))
    template = _value(reader, "tokenizer.chat_template")
    if template:
        settings["chat_template"] = template
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    return True
