"""BERT ids for the Q-Former: prompts -> ids [R, T] and mask [R, T], R prompts of one conversation.

Lower-cased WordPiece from `vocab.txt`, `[CLS] text [SEP]`; a prompt of more than 256 ids loses its beginning.
`[DEC]` is the special token after the vocabulary: the embedding table has a row for it, but no prompt contains it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Bool, Int32
from tokenizers import models, normalizers, pre_tokenizers, processors

from llamavid_jax.files import write_files
from llamavid_jax.text.conversation import ConversationError, check_text
from llamavid_jax.text.tokenizer import pad_with_mask
from llamavid_jax.text.tokenizer_files import read_files

MAX_IDS = 256  # with [CLS] and [SEP]
ABSENT = -1  # beyond a sample's longest question, where there is not even padding
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class QFormerTokenizer:
    """The tokenizer in `directory`/vocab.txt, one piece per line; ConversationError if it is missing or incomplete."""

    FOLDER = "qformer_tokenizer"  # in a checkpoint folder

    def __init__(self, directory: str | Path):
        path = Path(directory) / "vocab.txt"
        self._files = read_files(directory, path.name, (), "copy bert-base-uncased's vocab.txt there")
        try:
            lines = self._files[path.name].decode("utf-8").removesuffix("\n").split("\n")
        except UnicodeDecodeError:
            raise ConversationError(f"{path} is no text; copy bert-base-uncased's vocab.txt there again") from None
        vocabulary = {piece.rstrip("\r"): index for index, piece in enumerate(lines)}
        missing = [token for token in SPECIAL if token not in vocabulary]
        if missing:
            raise ConversationError(f"{path} has no {', '.join(missing)}; it is not a BERT vocabulary")
        bert = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
        bert.normalizer = normalizers.BertNormalizer(lowercase=True)
        bert.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        bert.post_processor = processors.BertProcessing(("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"]))
        bert.add_special_tokens([*SPECIAL, "[DEC]"])
        self._bert = bert
        self._pad_id = vocabulary["[PAD]"]
        self.vocab_size = bert.get_vocab_size()  # with [DEC]

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes `directory`/qformer_tokenizer/vocab.txt."""
        write_files(Path(directory) / self.FOLDER, self._files)

    def __call__(
        self, prompts: Sequence[Any], max_ids: int = MAX_IDS
    ) -> tuple[Int32[np.ndarray, "R T"], Bool[np.ndarray, "R T"]]:
        """(ids, mask), padded on the right to the longest prompt; the mask is False at padding.

        `max_ids` of a prompt, at most MAX_IDS, are kept: of a longer one [CLS] and its last ids.
        """
        if isinstance(prompts, str) or not isinstance(prompts, Sequence) or not prompts:
            raise ConversationError(f"prompts is {prompts!r}; a list of one text or more is needed")
        for index, prompt in enumerate(prompts):
            check_text(prompt, f"prompt {index}")
        limit = min(max_ids, MAX_IDS)
        ids = [encoding.ids for encoding in self._bert.encode_batch(list(prompts))]
        ids = [own if len(own) <= limit else [own[0], *own[len(own) - limit + 1 :]] for own in ids]
        return pad_with_mask(ids, self._pad_id)


def pad_questions(
    ids: Int32[np.ndarray, "R T"], mask: Bool[np.ndarray, "R T"], counts: Sequence[int], rows: int, length: int
) -> tuple[Int32[np.ndarray, "U L"], Bool[np.ndarray, "U L"]]:
    """Questions of several samples, `counts` of each, in static shapes; ids are ABSENT beyond a sample's longest.

    The original pads each sample to its longest question; if the text decoder is plain BERT, the states of that padding
    affect the result.
    """
    longest = np.repeat([part.sum(axis=1).max(initial=0) for part in np.split(mask, np.cumsum(counts)[:-1])], counts)
    padded, seen = np.full((rows, length), ABSENT, np.int32), np.zeros((rows, length), bool)
    padded[: len(ids), : ids.shape[1]] = np.where(np.arange(ids.shape[1]) < longest[:, None], ids, ABSENT)
    seen[: len(ids), : ids.shape[1]] = mask
    return padded, seen
