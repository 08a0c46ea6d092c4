"""Text <-> ids: one small interface over the two kinds of tokenizer files, placeholders, padding, and streaming.

`load_tokenizer(folder)` gives the sentencepiece tokenizer of LLaMA and Vicuna (`tokenizer.model`) or, for bases with
byte-level BPE, the one in `tokenizer.json`.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import SupportsIndex

import numpy as np
import tokenizers
from jaxtyping import Bool, Int32

from llamavid_jax.files import find, write_files
from llamavid_jax.shapes import IMAGE_TOKEN, pad_rows
from llamavid_jax.text.conversation import IMAGE, ConversationError, check_text
from llamavid_jax.text.llama_tokenizer import LlamaTokenizer
from llamavid_jax.text.tokenizer_files import SETTINGS, added_tokens, json_object, max_length, read_files


class JsonTokenizer:
    """A `tokenizer.json`, for language models other than LLaMA 1 and 2; ids are those of the tokenizers library.

    `add_bos` adds whatever the file puts around a text; in some models that is nothing, so `bos_id` may be unused.
    """

    FILE = "tokenizer.json"

    def __init__(self, directory: str | Path, added: Sequence[str] = ()):
        """Tokens of `added` that the file lacks get the next ids."""
        path = Path(directory) / self.FILE
        remedy = "copy the language model's tokenizer.json there"
        self._files = read_files(directory, path.name, SETTINGS, remedy)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(self._files[path.name])
        except Exception as error:  # the library raises bare Exception
            raise ConversationError(f"{path} is not a tokenizer ({error}); {remedy} again") from None
        if self._tokenizer.add_tokens(list(added)):
            self._files[path.name] = self._tokenizer.to_str().encode()
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        for number, token in sorted(added_tokens(self._files, directory).items()):
            if self._tokenizer.token_to_id(token.content) is None:
                add = self._tokenizer.add_special_tokens if token.special else self._tokenizer.add_tokens
                add([tokenizers.AddedToken(**dataclasses.asdict(token))])
            if (found := self._tokenizer.token_to_id(token.content)) != number:
                raise ConversationError(
                    f"{path} has the id {found} for the added token {token.content!r}, the files beside it {number}; "
                    "copy the files of one tokenizer"
                )
        config_path = path.with_name("tokenizer_config.json")
        config = json_object(self._files, config_path.name, directory)
        config |= json_object(self._files, "special_tokens_map.json", directory)
        self.bos_id, eos_id, pad_id = (self._id(config.get(name)) for name in ("bos_token", "eos_token", "pad_token"))
        if eos_id is None:
            raise ConversationError(f"{config_path} names no eos_token that {path.name} knows; add it")
        self.eos_id = eos_id
        self.pad_id = eos_id if pad_id is None else pad_id
        self.vocab_size = 1 + max(self._tokenizer.get_vocab().values())  # ids may have gaps
        self.max_length = max_length(config, config_path)

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes tokenizer.json and the JSON files beside it."""
        write_files(directory, self._files)

    def _id(self, token) -> int | None:
        token = token.get("content") if isinstance(token, dict) else token
        return self._tokenizer.token_to_id(token) if isinstance(token, str) else None

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        check_text(text)
        return self._tokenizer.encode(text, add_special_tokens=add_bos).ids

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """Text without special tokens; ids outside the vocabulary decode to nothing."""
        return self._tokenizer.decode([int(i) for i in ids if 0 <= i < self.vocab_size], skip_special_tokens=True)


# FILE, encode(text, add_bos), decode(ids), save_pretrained(directory), bos_id, eos_id, pad_id, vocab_size, max_length
Tokenizer = LlamaTokenizer | JsonTokenizer


def load_tokenizer(directory: str | Path, added: Sequence[str] = ()) -> Tokenizer:
    """The tokenizer of a checkpoint folder, with the tokens `added`; ConversationError if it has neither file."""
    directory = find(directory)
    for kind in (LlamaTokenizer, JsonTokenizer):
        if (directory / kind.FILE).exists():
            return kind(directory, added)
    raise ConversationError(
        f"{directory} has no tokenizer.model and no tokenizer.json; copy the language model's tokenizer there"
    )


def encode_with_images(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids with -200 for every `<image>` (the original's `tokenizer_image_token`).

    Each chunk of text around a placeholder is tokenised separately; only the first keeps its BOS.
    """
    first, *others = text.split(IMAGE)
    ids = tokenizer.encode(first)
    for chunk in others:
        ids += [IMAGE_TOKEN, *tokenizer.encode(chunk, add_bos=False)]
    return ids


def pad_with_mask(
    rows: Sequence[Sequence[int]], pad_id: int
) -> tuple[Int32[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]:
    """Rows of ids -> (ids, mask), padded on the right to the longest; the mask is False at padding."""
    lengths = np.array([len(row) for row in rows])
    return pad_rows(rows, len(rows), int(lengths.max()), pad_id), np.arange(lengths.max()) < lengths[:, None]


class TextStream:
    """Turns ids into text as they arrive: `push(id)` returns the new text, `finish()` what was held back.

    In both kinds of tokenizer a character may take several byte tokens, so text that ends in U+FFFD is held back until
    it is complete.  All returned strings joined equal `tokenizer.decode` of all ids; each push decodes only the last
    few.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # ids since the text was complete for the last but one time
        self._shown = 0  # how many of them are in text already returned

    def push(self, token: int) -> str:
        self._ids.append(int(token))
        text = self._new_text()
        if not text or text.endswith("\ufffd"):
            return ""
        self._ids, self._shown = self._ids[self._shown :], len(self._ids) - self._shown
        return text

    def finish(self) -> str:
        text = self._new_text()
        self._ids, self._shown = [], 0
        return text

    def _new_text(self) -> str:
        before = self._tokenizer.decode(self._ids[: self._shown])
        return self._tokenizer.decode(self._ids)[len(before) :]
