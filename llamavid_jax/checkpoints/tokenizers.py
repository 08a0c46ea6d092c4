"""The two tokenizers of a checkpoint folder, and the check that they fit its model."""

from pathlib import Path

from llamavid_jax.config.schema import LLaMAVIDLlavaConfig
from llamavid_jax.errors import ConfigError
from llamavid_jax.files import find
from llamavid_jax.text.qformer_tokenizer import QFormerTokenizer
from llamavid_jax.text.tokenizer import Tokenizer, load_tokenizer


def check_tokenizers(
    config: LLaMAVIDLlavaConfig,
    tokenizer: Tokenizer | None,
    qformer_tokenizer: QFormerTokenizer | None,
    directory: str | Path,
) -> None:
    """Raises ConfigError for a tokenizer of `directory` with ids that the model has no embeddings for.

    Embedding tables may have more rows (padding).  The Q-Former's may lack a row for [DEC], which no prompt contains.
    """
    rows = config.text_config.vocab_size
    if tokenizer is not None and tokenizer.vocab_size > rows:
        raise ConfigError(
            f"{Path(directory) / tokenizer.FILE} has {tokenizer.vocab_size} pieces, but text_config.vocab_size is "
            f"{rows}; give the tokenizer that the model was trained with"
        )
    rows = config.qformer_config.vocab_size
    if qformer_tokenizer is not None and qformer_tokenizer.vocab_size - 1 > rows:
        raise ConfigError(
            f"the Q-Former's vocab.txt in {directory} has {qformer_tokenizer.vocab_size - 1} pieces, but "
            f"qformer_config.vocab_size is {rows}; give the vocabulary that the model was trained with"
        )


def load_tokenizers(
    directory: str | Path, config: LLaMAVIDLlavaConfig | None = None
) -> tuple[Tokenizer | None, QFormerTokenizer | None]:
    """Both tokenizers of a checkpoint folder, None for the one whose files are missing.

    Tokens that `config` adds and the files lack get the next ids, as in the original.
    """
    directory = find(directory)
    has_text = (directory / "tokenizer.model").exists() or (directory / "tokenizer.json").exists()
    qformer = find(directory / QFormerTokenizer.FOLDER)
    return (
        load_tokenizer(directory, config.added_tokens if config else ()) if has_text else None,
        QFormerTokenizer(qformer) if (qformer / "vocab.txt").exists() else None,
    )
