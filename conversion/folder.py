"""The output folder: built beside its final path and renamed once complete; its tokenizers and image settings."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from llamavid_jax import buckets, copies, uploads
from llamavid_jax.checkpoints.tokenizers import check_tokenizers, load_tokenizers
from llamavid_jax.config.schema import LLaMAVIDLlavaConfig
from llamavid_jax.errors import CheckpointError
from llamavid_jax.files import locked
from llamavid_jax.media.image_processor import VIDEO_FILE
from llamavid_jax.media.processor_settings import read_settings
from llamavid_jax.text.chat_template import save_chat_template
from llamavid_jax.text.qformer_tokenizer import QFormerTokenizer

TEXT_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


@contextlib.contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A new folder beside `out` that is renamed to `out` if the block succeeds, and deleted if it raises.

    Only one process makes it at a time.  A killed one leaves `OUT.partial`, never half of `out`; the next starts anew.
    """
    place, in_bucket = out.absolute(), buckets.url(out) is not None
    partial = place.with_name(f"{place.name}.partial")
    if in_bucket:  # which cannot rename; arrays written there would be uploaded at once
        partial = buckets.root() / "partial" / place.relative_to(buckets.root())
        for parent in (place.parent, partial.parent):
            parent.mkdir(parents=True, exist_ok=True)
        uploads.discard_unfinished(place)
        copies.fetch(place)
    if not place.parent.is_dir():
        raise CheckpointError(f"{place.parent} does not exist; make it first")
    with locked(place.with_name(f".{place.name}.lock"), f"{out}"):
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise CheckpointError(f"{out} exists and is not empty; remove it or give another OUT")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir()
        except OSError as error:
            raise CheckpointError(f"{out} cannot be made ({error.strerror}); give a folder that can") from None
        try:
            yield partial
            os.rename(partial, place)
            uploads.send_folder(place, last="config.json")
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            if in_bucket:
                shutil.rmtree(place, ignore_errors=True)
            raise


def text_files(source: Path, tokenizer: Path | None, bert_tokenizer: Path | None) -> list[Path]:
    """The files of both tokenizers that `copy_tokenizers` copies, as far as they exist."""
    files = [(tokenizer or source) / name for name in TEXT_FILES]
    files.append((bert_tokenizer or source / "qformer_tokenizer") / "vocab.txt")
    return [file for file in files if file.is_file()]


def copy_tokenizers(
    source: Path, tokenizer: Path | None, bert_tokenizer: Path | None, out: Path, config: LLaMAVIDLlavaConfig
) -> list[str]:
    """Copies both tokenizers; returns one note for each that is missing."""
    notes = []
    for option, given in (("--tokenizer", tokenizer), ("--bert-tokenizer", bert_tokenizer)):
        if given is not None and not given.is_dir():
            raise CheckpointError(f"{option} {given} is not a folder; give the folder that holds the tokenizer")
    text = tokenizer or source
    for name in TEXT_FILES:
        if (text / name).is_file():
            shutil.copy(text / name, out / name)
    save_chat_template(out)
    check_tokenizers(config, load_tokenizers(text, config)[0], None, text)
    if not any((out / name).is_file() for name in ("tokenizer.model", "tokenizer.json")):
        if tokenizer is not None:
            raise CheckpointError(f"--tokenizer {tokenizer} holds neither tokenizer.model nor tokenizer.json")
        notes.append("no LLaMA tokenizer in OUT: convert with --tokenizer DIR, or copy tokenizer.model into OUT")
    vocabulary = (bert_tokenizer or source / "qformer_tokenizer") / "vocab.txt"
    if not vocabulary.is_file():
        if bert_tokenizer is not None:
            raise CheckpointError(
                f"--bert-tokenizer {bert_tokenizer} holds no vocab.txt; give a bert-base-uncased folder"
            )
        notes.append("no Q-Former tokenizer in OUT: convert with --bert-tokenizer DIR, or copy bert's vocab.txt there")
        return notes
    check_tokenizers(config, None, QFormerTokenizer(vocabulary.parent), vocabulary.parent)
    (out / "qformer_tokenizer").mkdir()
    shutil.copy(vocabulary, out / "qformer_tokenizer" / "vocab.txt")
    return notes


def video_rate(source: Path) -> dict[str, float]:
    """`fps`, where a folder's video_preprocessor_config.json states it; `jax_to_torch` copies that file."""
    file = source / VIDEO_FILE
    rate = read_settings(file).get("fps") if file.is_file() else None
    return {} if rate is None else {"fps": rate}
