"""LLaMA token ids from a sentencepiece `tokenizer.model`: text -> list of int, and back.

The ids are those of transformers 4.31's slow tokenizer, which the released checkpoints were trained with.  Special
tokens in the text (`</s>` after every answer) and tokens that a fine-tune added are cut out first; each stretch between
them is tokenised by sentencepiece separately.  Two versions of that step exist:
  legacy      every stretch gets sentencepiece's leading space, also after a special token;
  not legacy  only the beginning of the text gets it; a stretch after a special token loses it again.
`tokenizer_config.json` selects one (`legacy`, true if the key is absent).

Deviation: ids without a piece (placeholders, rows that pad the vocabulary) decode to nothing instead of an error.
"""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import sentencepiece

from llamavid_jax.files import write_files
from llamavid_jax.text.conversation import ConversationError, check_text
from llamavid_jax.text.tokenizer_files import (
    SETTINGS,
    AddedToken,
    added_tokens,
    flag,
    json_object,
    max_length,
    read_files,
)

BLANK = "▁"  # how sentencepiece writes a space


class LlamaTokenizer:
    """The sentencepiece tokenizer of a LLaMA or Vicuna folder; padding is `<unk>`, id 0, as in the original.

    Raises ConversationError when a file is missing or broken.
    """

    FILE = "tokenizer.model"

    def __init__(self, directory: str | Path, added: Sequence[str] = ()):
        """`added` are tokens that the model needs; those that the files lack get the next ids."""
        path = Path(directory) / self.FILE
        remedy = "copy the language model's tokenizer.model there"
        self._files = read_files(directory, path.name, SETTINGS, remedy)
        config = json_object(self._files, "tokenizer_config.json", directory)
        try:
            if not self._files[path.name]:  # sentencepiece treats no bytes as no argument
                raise ValueError
            self._model = sentencepiece.SentencePieceProcessor(model_proto=self._files[path.name])
            self._model.id_to_piece(list(range(self._model.vocab_size())))  # raises if one is not UTF-8
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

        names = json_object(self._files, "special_tokens_map.json", directory)
        known = added_tokens(self._files, directory)
        self._add(known, added)
        tokens = _special_tokens(config, names, {token.content: token for token in known.values()})
        self.bos_id, self.eos_id, self.pad_id = (self._model.piece_to_id(token.content) for token in tokens)
        if len({self.bos_id, self.eos_id, self.pad_id}) < 3 or self.pad_id != self._model.unk_id():
            pieces = ", ".join(token.content for token in tokens)
            raise ConversationError(f"{path} lacks one of the pieces {pieces}; {remedy} again")

        for number, token in known.items():  # transformers would give the piece's id
            if (piece := self._model.piece_to_id(token.content)) not in (number, self._model.unk_id()):
                raise ConversationError(
                    f"{path} has the id {piece} for the added token {token.content!r}, the files beside it {number}; "
                    "copy the files of one tokenizer"
                )
        ids = {token.content: self._model.piece_to_id(token.content) for token in tokens}
        self._added = {number: token for number, token in known.items() if token.content not in ids}
        # A fine-tune's tokens are read as today's transformers does, the model's own as the original's version did.
        self._foreign = {number for number, token in self._added.items() if token.content not in added}
        self._ids = ids | {token.content: number for number, token in self._added.items()}
        self._cut_tokens = {token.content: token for token in (*tokens, *self._added.values())}
        longest_first = sorted(self._cut_tokens.values(), key=lambda token: -len(token.content))
        self._cut = re.compile("(" + "|".join(map(_pattern, longest_first)) + ")")
        self._skipped = {*ids.values(), *(number for number, token in self._added.items() if token.special)}
        # Older folders give padding an id without an embedding; no text contains it.
        padding = names.get("pad_token") or config.get("pad_token")
        padding = padding.get("content") if isinstance(padding, dict) else padding
        rows = [number + 1 for number, token in self._added.items() if token.content != padding]
        self.vocab_size = max(self._model.vocab_size(), *rows, 0)

    def _add(self, known: dict[int, AddedToken], contents: Sequence[str]) -> None:
        """Adds tokens after the known ones.  They absorb the white space around them, as in the original."""
        ids = {token.content: number for number, token in known.items()}
        for content in contents:
            number = ids.setdefault(content, max([self._model.vocab_size() - 1, *known]) + 1)
            known[number] = AddedToken(content, lstrip=True, rstrip=True)
        if contents:
            self._files["added_tokens.json"] = (json.dumps(ids, indent=1) + "\n").encode()

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes tokenizer.model and the JSON files beside it."""
        write_files(directory, self._files)

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        """Token ids; `add_bos` has no effect if tokenizer_config.json has add_bos_token false."""
        check_text(text)
        ids = [self.bos_id] if add_bos and self._adds_bos else []
        if not self.legacy:
            text = BLANK + text.replace(BLANK, " ")
        parts = self._cut.split(text)  # stretch, special token, stretch, ...
        for index, part in enumerate(parts):
            if index % 2:
                ids.append(self._ids[part])
                continue
            if index > 0 and self._cut_tokens[parts[index - 1]].rstrip:
                part = part.lstrip()
            if index + 1 < len(parts) and self._cut_tokens[parts[index + 1]].lstrip:
                part = part.rstrip()
            if part:
                ids += (
                    self._encode_behind_added(part) if ids and ids[-1] in self._foreign else self._encode_stretch(part)
                )
        return ids

    def _encode_stretch(self, text: str) -> list[int]:
        if self.legacy:
            return self._model.encode(text)
        begins_text = text.startswith(BLANK)
        text = text.removeprefix(BLANK)
        pieces = self._model.encode(text, out_type=str)
        if pieces and not begins_text and not text.startswith(" ") and pieces[0].startswith(BLANK):
            # The rest of the first piece may not be a piece itself; its id is then that of <unk>, as in the original.
            pieces = ([pieces[0][1:]] if len(pieces[0]) > 1 else []) + pieces[1:]
        return [self._model.piece_to_id(piece) for piece in pieces]

    def _encode_behind_added(self, text: str) -> list[int]:
        """Like transformers' fast tokenizer: no leading space is added if the text already has one."""
        if self.legacy and not text.startswith((" ", BLANK)):
            return self._model.encode(text)
        newline = len(self._model.encode("\n"))  # of bytes, which merge with nothing: gets the leading space
        return self._model.encode("\n" + text)[newline:]

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """Text without special tokens; bytes that are not valid UTF-8 become U+FFFD."""
        kept = [i for i in map(int, ids) if i not in self._skipped]
        text, pieces = "", []
        for i in kept:
            if i in self._added:
                text += self._decode_stretch(pieces, first=not text) + self._added[i].content
                pieces = []
            elif 0 <= i < self._model.vocab_size():
                pieces.append(i)
        return text + self._decode_stretch(pieces, first=not text)

    def _decode_stretch(self, pieces: list[int], first: bool) -> str:
        """sentencepiece drops the space before its first piece, which is right only at the beginning of a text."""
        blank = [] if first else [self._model.piece_to_id(BLANK)]
        return self._model.decode(blank + pieces) if pieces else ""


def _pattern(token: AddedToken) -> str:
    text = re.escape(token.content)
    return rf"(?<!\w){text}(?!\w)" if token.single_word else text


def _special_tokens(
    config: dict[str, Any], overrides: dict[str, Any], added: dict[str, AddedToken]
) -> list[AddedToken]:
    """bos, eos, unk.  A plain string in special_tokens_map.json absorbs white space on both sides, others none.

    An entry for one of them in added_tokens_decoder takes precedence.
    """
    tokens = []
    for name, default in (("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>")):
        value = overrides.get(name) or config.get(name) or default
        strips = bool(overrides.get(name))
        if isinstance(value, dict):
            value, lstrip, rstrip = value.get("content"), value.get("lstrip", False), value.get("rstrip", False)
            token = AddedToken(str(value), lstrip, rstrip)
        else:
            token = AddedToken(str(value), strips, strips)
        tokens.append(added.get(token.content, token))
    return tokens
