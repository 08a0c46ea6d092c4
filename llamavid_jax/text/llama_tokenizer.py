"""LLaMA token ids from a sentencepiece `tokenizer.model`: text -> list of int, and back.

The ids are those of transformers 4.31's slow tokenizer, which the released checkpoints were trained with.
Special tokens in the text (`</s>` after every answer) are cut out first; each stretch between them goes to
sentencepiece on its own, and two versions of that step exist:
  legacy      every stretch gets sentencepiece's leading blank, also after a special token;
  not legacy  only the beginning of the text gets it, a stretch after a special token loses it again.
`tokenizer_config.json` says which (`legacy`, true where the key is absent).
Tokens that a fine-tune added (`added_tokens.json`, `added_tokens_decoder`) are cut out the same way.

Deviation: ids without a piece (placeholders, rows that pad the vocabulary) decode to nothing instead of an error.
"""

import dataclasses
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import sentencepiece

from llamavid_jax.files import write_files
from llamavid_jax.text.conversation import ConversationError, check_text
from llamavid_jax.text.tokenizer_files import flag, json_object, max_length, read_files

BLANK = "▁"  # how sentencepiece writes a space
ADDED_FILE = "added_tokens.json"


@dataclasses.dataclass(frozen=True)
class SpecialToken:
    """A token cut out of the text as it stands; `lstrip` and `rstrip`: it eats the white space on that side."""

    content: str
    lstrip: bool = False
    rstrip: bool = False


class LlamaTokenizer:
    """The sentencepiece tokenizer of a LLaMA or Vicuna folder; padding is `<unk>`, id 0, as in the original.

    Raises ConversationError when a file is missing or broken.
    """

    FILE = "tokenizer.model"

    def __init__(self, directory: str | Path, added: Sequence[str] = ()):
        """Those of `added` that the files do not know get the next ids."""
        path = Path(directory) / self.FILE
        remedy = "copy the language model's tokenizer.model there"
        optional = ("tokenizer_config.json", "special_tokens_map.json", ADDED_FILE)
        self._files = read_files(directory, path.name, optional, remedy)
        config = json_object(self._files, "tokenizer_config.json", directory)
        try:
            if not self._files[path.name]:  # sentencepiece takes no bytes for no model
                raise ValueError
            self._model = sentencepiece.SentencePieceProcessor(model_proto=self._files[path.name])
            self.vocab_size = self._model.vocab_size()
            self._model.id_to_piece(list(range(self.vocab_size)))  # raises where one is no UTF-8
        except (RuntimeError, ValueError):
            raise ConversationError(f"{path} is not a sentencepiece model; {remedy} again") from None
        config_path = path.with_name("tokenizer_config.json")
        if flag(config, "add_eos_token", False, config_path):
            raise ConversationError(
                f"{config_path} sets add_eos_token, which would end prompts before the answer; set it to false"
            )
        self.legacy = flag(config, "legacy", True, config_path)
        self.max_length = max_length(config, config_path)
        self._adds_bos = flag(config, "add_bos_token", True, config_path)

        tokens = _special_tokens(config, json_object(self._files, "special_tokens_map.json", directory))
        self._added = _added_tokens(config, json_object(self._files, ADDED_FILE, directory), self.vocab_size, directory)
        for content in added:
            self._add(content)
        self._special = {token.content: token for token in [*self._added.values(), *tokens]}
        self._ids = {token.content: number for number, token in self._added.items()}
        self.vocab_size = max([self.vocab_size - 1, *self._added]) + 1
        longest_first = sorted(self._special, key=len, reverse=True)
        self._cut = re.compile("(" + "|".join(re.escape(text) for text in longest_first) + ")")
        self.bos_id, self.eos_id, self.pad_id = (self._model.piece_to_id(token.content) for token in tokens)
        if len({self.bos_id, self.eos_id, self.pad_id}) < 3 or self.pad_id != self._model.unk_id():
            raise ConversationError(f"{path} lacks one of the pieces {', '.join(self._special)}; {remedy} again")

    def _add(self, content: str) -> None:
        if content not in {token.content for token in self._added.values()}:
            number = max([self.vocab_size - 1, *self._added]) + 1
            self._added[number] = SpecialToken(content, lstrip=True, rstrip=True)
            ids = {token.content: number for number, token in self._added.items()}
            self._files[ADDED_FILE] = (json.dumps(ids, indent=1) + "\n").encode()

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes tokenizer.model and the JSON files beside it."""
        write_files(directory, self._files)

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        """Token ids; `add_bos` is without effect where tokenizer_config.json has add_bos_token false."""
        check_text(text)
        ids = [self.bos_id] if add_bos and self._adds_bos else []
        if not self.legacy:
            text = BLANK + text.replace(BLANK, " ")
        parts = self._cut.split(text)  # stretch, special token, stretch, ...
        for index, part in enumerate(parts):
            if index % 2:
                ids.append(self._ids[part] if part in self._ids else self._model.piece_to_id(part))
                continue
            if index > 0 and self._special[parts[index - 1]].rstrip:
                part = part.lstrip()
            if index + 1 < len(parts) and self._special[parts[index + 1]].lstrip:
                part = part.rstrip()
            if part:
                ids += self._encode_stretch(part)
        return ids

    def _encode_stretch(self, text: str) -> list[int]:
        if self.legacy:
            return self._model.encode(text)
        begins_text = text.startswith(BLANK)
        text = text.removeprefix(BLANK)
        pieces = self._model.encode(text, out_type=str)
        if pieces and not begins_text and not text.startswith(" ") and pieces[0].startswith(BLANK):
            # What is left of the first piece may be no piece itself; its id is then that of <unk>, as in the original.
            pieces = ([pieces[0][1:]] if len(pieces[0]) > 1 else []) + pieces[1:]
        return [self._model.piece_to_id(piece) for piece in pieces]

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """Text without special tokens, blanks around added ones; bytes that are no UTF-8 become U+FFFD."""
        skipped, texts = (self.bos_id, self.eos_id, self.pad_id), []
        for is_added, run in itertools.groupby(map(int, ids), self._added.__contains__):
            pieces = [i for i in run if is_added or (0 <= i < self._model.vocab_size() and i not in skipped)]
            texts += (
                [self._added[i].content for i in pieces] if is_added else [self._model.decode(pieces)] * bool(pieces)
            )
        return " ".join(texts)


def _special_tokens(config: dict[str, Any], overrides: dict[str, Any]) -> list[SpecialToken]:
    """bos, eos, unk.  A bare string in special_tokens_map.json eats white space on both sides, one elsewhere none."""
    tokens = []
    for name, default in (("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>")):
        value = overrides.get(name) or config.get(name) or default
        strips = bool(overrides.get(name))
        if isinstance(value, dict):
            value, lstrip, rstrip = value.get("content"), value.get("lstrip", False), value.get("rstrip", False)
            tokens.append(SpecialToken(str(value), lstrip, rstrip))
        else:
            tokens.append(SpecialToken(str(value), strips, strips))
    return tokens


def _added_tokens(
    config: Mapping[str, Any], ids: Mapping[str, Any], pieces: int, directory: str | Path
) -> dict[int, SpecialToken]:
    """Id -> token, of those behind the model's `pieces`.  One in added_tokens.json alone eats white space."""
    found = [(number, SpecialToken(content, lstrip=True, rstrip=True)) for content, number in ids.items()]
    decoder = config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, Mapping) or not all(
        str(number).isdecimal() and isinstance(token, Mapping) and isinstance(token.get("content"), str)
        for number, token in decoder.items()
    ):
        raise ConversationError(
            f"{Path(directory) / 'tokenizer_config.json'}: added_tokens_decoder is no table of tokens"
        )
    for number, token in decoder.items():
        strips = [bool(token.get(name, False)) for name in ("lstrip", "rstrip")]
        found.append((int(number), SpecialToken(token["content"], *strips)))
    if not all(type(number) is int and 0 <= number < 2**31 and token.content for number, token in found):
        raise ConversationError(f"{Path(directory) / ADDED_FILE}: {dict(ids)!r} is no table of tokens and their ids")
    return {number: token for number, token in sorted(found, key=lambda pair: pair[0]) if number >= pieces}
