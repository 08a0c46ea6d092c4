"""A LLaMA in llama.cpp's GGUF file: weights under transformers' names, configuration and tokenizer from its metadata.

Quantised tensors are dequantised one by one to float32.  llama.cpp interleaves the rotary pairs of q and k (rows 2i and
2i+1 of a head rotate together); reading restores the halves (rows i and i + h/2).  Needs the `gguf` package (the extra
`convert`).
"""

import dataclasses
import functools
import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from einops import rearrange

from llamavid_jax.config.parts import LlamaConfig
from llamavid_jax.errors import CheckpointError

from .stored_tensor import MAX_AXES

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
_TEXT, _LIST = 8, 9  # kinds of metadata; the others are numbers
_NUMBERS = dict(enumerate(["<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?"])) | {10: "<u8", 11: "<i8", 12: "<f8"}
MAX_HEADER_BYTES = 32 << 20  # 128,000 tokens and their merges take 8 MB
FLOAT32 = np.dtype(np.float32)
_CONTROL = 3  # token types of GGUF: never part of text, such as <|im_end|>
_BYTE_LEVEL = ("default", "gpt-2", "smollm")  # GPT-2's pre-tokenizer; smollm's also splits numbers into digits
_SINGLE_DIGITS = ("smollm",)


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """A quantised tensor; `heads` is set where rotary pairs are interleaved."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    stored_shape: tuple[int, ...]  # the last axis in bytes
    kind: Any  # gguf.GGMLQuantizationType
    heads: int | None = None
    dtype: np.dtype = FLOAT32

    @property
    def nbytes(self) -> int:
        return math.prod(self.stored_shape)

    def read(self) -> np.ndarray:
        """float32 values of `shape`."""
        import gguf

        values = np.empty(self.stored_shape, np.uint8)
        with self.file.open("rb") as stream:
            stream.seek(self.offset)
            if stream.readinto(values.reshape(-1)) != values.nbytes:
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


class Header(NamedTuple):
    """What precedes the tensor data of a GGUF file."""

    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


class _Cursor:
    """Reads the beginning of a file, value by value; ValueError where a length goes beyond it."""

    def __init__(self, content: bytes):
        self._content, self._at = content, 0

    @property
    def at(self) -> int:
        return self._at

    @property
    def left(self) -> int:
        return len(self._content) - self._at

    def take(self, count: int) -> bytes:
        if count > self.left:
            raise ValueError(f"a length of {count} goes beyond its header")
        self._at += count
        return self._content[self._at - count : self._at]

    def number(self, kind: str = "<u8") -> Any:
        return self.numbers(kind, 1)[0]

    def numbers(self, kind: str, count: int) -> list[Any]:
        return np.frombuffer(self.take(count * np.dtype(kind).itemsize), kind).tolist()

    def text(self) -> str:
        return self.take(self.number()).decode("utf-8")

    def value(self) -> Any:
        """A number, a text or a list of either, preceded by its kind."""
        kind = self.number("<u4")
        if kind == _TEXT:
            return self.text()
        if kind != _LIST:
            return self.number(_NUMBERS[kind])
        kind, count = self.number("<u4"), self.number()
        if kind != _TEXT:
            return self.numbers(_NUMBERS[kind], count)
        if 8 * count > self.left:  # each text has a length before it
            raise ValueError(f"a list of {count} texts goes beyond its header")
        return [self.text() for _ in range(count)]


@functools.lru_cache(maxsize=1)
def read_header(file: Path) -> Header:
    """A file's Header.  Raises CheckpointError for a damaged file, and for another architecture than LLaMA's."""
    try:
        with file.open("rb") as stream:
            header = _parse(file, _Cursor(stream.read(min(file.stat().st_size, MAX_HEADER_BYTES))))
    except ModuleNotFoundError:
        raise CheckpointError("reading .gguf needs the gguf package: pip install gguf") from None
    except (ValueError, KeyError, OSError) as error:
        raise CheckpointError(f"{file} is not a readable GGUF file ({error}); download it again") from None
    architecture = header.metadata.get("general.architecture", "unknown")
    if architecture != "llama":
        raise CheckpointError(f"{file} holds the architecture {architecture!r}; only 'llama' is known")
    return header


def _parse(file: Path, cursor: _Cursor) -> Header:
    """Counts need no limit: every field and every tensor takes bytes of the header, whose size is limited."""
    import gguf

    magic, version = cursor.take(4), cursor.number("<u4")
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError(f"it begins with {magic!r} and the version {version}")
    count, fields = cursor.number(), cursor.number()
    metadata = {}
    for _ in range(fields):
        key = cursor.text()
        metadata[key] = cursor.value()
    stated = []
    for _ in range(count):
        name, shape = cursor.text(), cursor.numbers("<u8", cursor.number("<u4"))
        stated.append((name, shape, cursor.number("<u4"), cursor.number()))
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment <= 1 << 20:
        raise ValueError(f"general.alignment is {alignment!r}")
    begin, size, tensors = -(-cursor.at // alignment) * alignment, file.stat().st_size, {}
    for name, shape, kind, offset in stated:
        kind = gguf.GGMLQuantizationType(kind)
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        if not 1 <= len(shape) <= MAX_AXES or shape[0] % block or name in tensors:
            raise ValueError(f"{name!r} has no valid shape or stands there twice")
        stored = (*reversed(shape[1:]), shape[0] // block * block_bytes)
        if begin + offset + math.prod(stored) > size:
            raise ValueError(f"{name!r} goes beyond its end")
        tensors[name] = GgufTensor(file, begin + offset, tuple(reversed(shape)), stored, kind)
    return Header(metadata, tensors)


def read_gguf(file: Path) -> dict[str, GgufTensor]:
    """Every tensor under transformers' name.  Raises CheckpointError for a damaged file or another architecture."""
    text = gguf_config(file)
    heads = {"attn_q": text.num_attention_heads, "attn_k": text.num_key_value_heads}
    found = {}
    for name, tensor in read_header(file).tensors.items():
        parts = re.fullmatch(r"(?:blk\.([0-9]+)\.)?([a-z_]+)\.weight", name)
        layer, kind = parts.groups() if parts else (None, None)
        if kind not in _NAMES:
            raise CheckpointError(f"{file} holds {name!r}, which LLaMA as known here does not have")
        if kind in heads and (len(tensor.shape) != 2 or tensor.shape[0] % (2 * heads[kind])):
            raise CheckpointError(f"{file}: {name} of shape {tensor.shape} does not hold {heads[kind]} heads")
        prefix = "model.layers." + layer + "." if layer else ""
        found[f"{prefix}{_NAMES[kind]}.weight"] = dataclasses.replace(tensor, heads=heads.get(kind))
    return found


def gguf_config(file: Path) -> LlamaConfig:
    """The LLaMA configuration that the metadata states."""
    metadata, names = read_header(file)
    if "token_embd.weight" not in names:
        raise CheckpointError(f"{file} holds no token_embd.weight; give the GGUF file of a complete model")
    heads = metadata.get("llama.attention.head_count")
    values = {
        "vocab_size": names["token_embd.weight"].shape[0],
        "hidden_size": metadata.get("llama.embedding_length"),
        "intermediate_size": metadata.get("llama.feed_forward_length"),
        "num_hidden_layers": metadata.get("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.get("llama.attention.head_count_kv", heads),
        "head_dim": metadata.get("llama.attention.key_length") or metadata.get("llama.rope.dimension_count"),
        "max_position_embeddings": metadata.get("llama.context_length"),
        "rms_norm_eps": metadata.get("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": metadata.get("llama.rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in names,
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
    }
    scaling = metadata.get("llama.rope.scaling.type", "none")
    if scaling != "none":
        values["rope_scaling"] = {"type": scaling, "factor": metadata.get("llama.rope.scaling.factor", 1.0)}
    missing = [name for name in ("hidden_size", "num_hidden_layers", "num_attention_heads") if not values[name]]
    if missing:
        raise CheckpointError(
            f"{file} does not state {', '.join(missing)}; its metadata is incomplete: download it again"
        )
    return LlamaConfig.from_transformers(values, str(file))


def write_tokenizer(file: Path, out: Path) -> bool:
    """Writes `tokenizer.json` and `tokenizer_config.json` of a byte-level BPE; False if the file has another kind."""
    try:
        return _write_tokenizer(read_header(file).metadata, out)
    except Exception as error:  # the library raises bare Exception for merges without tokens
        raise CheckpointError(f"{file} has an incomplete tokenizer ({error!r}); give one with --tokenizer") from None


def _write_tokenizer(metadata: dict[str, Any], out: Path) -> bool:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    pre = metadata.get("tokenizer.ggml.pre", "default")
    if metadata.get("tokenizer.ggml.model") != "gpt2" or pre not in _BYTE_LEVEL:
        return False
    tokens = metadata.get("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    digits = [pre_tokenizers.Digits(individual_digits=True)] if pre in _SINGLE_DIGITS else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    kinds = metadata.get("tokenizer.ggml.token_type", [])
    control = [token for token, kind in zip(tokens, kinds, strict=False) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if token is not None:
            settings[f"{role}_token"] = tokens[token]
    settings["add_bos_token"] = bool(metadata.get("tokenizer.ggml.add_bos_token", False))
    template = metadata.get("tokenizer.chat_template")
    if template:
        settings["chat_template"] = template
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    return True
