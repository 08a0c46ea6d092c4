"""Makes the demo's two small tokenizers from its questions and answers: `python -m demo.make_tokenizers`.

demo/tokenizers/tokenizer.model, tokenizer_config.json    sentencepiece BPE with LLaMA's settings
demo/tokenizers/qformer_tokenizer/vocab.txt               WordPiece: the words, and characters for all other words
"""

import io
import json
import re
import string
from pathlib import Path

import sentencepiece

from llamavid_jax.files import write_files
from llamavid_jax.text.conversation import template_named
from llamavid_jax.text.qformer_tokenizer import SPECIAL, QFormerTokenizer

from .questions import corpus

FOLDER = Path(__file__).parent / "tokenizers"
PIECES = 640


def main() -> None:
    """Writes both tokenizers beside this file."""
    lines, template = corpus(), template_named("imgsp_v1")
    model = io.BytesIO()
    turn = "{system} USER: \n{line} ASSISTANT: "
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([turn.format(system=template.system, line=line) for line in lines] + lines),
        model_writer=model,
        vocab_size=PIECES,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        add_dummy_prefix=True,
        # one piece for the text that opens every conversation: 25 tokens less in each
        user_defined_symbols=[template.system.replace(" ", "▁")],
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    config = {"add_bos_token": True, "add_eos_token": False, "legacy": True, "model_max_length": 2048}
    config |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write_files(
        FOLDER,
        {"tokenizer.model": model.getvalue(), "tokenizer_config.json": (json.dumps(config, indent=1) + "\n").encode()},
    )
    words = sorted({word for line in lines for word in re.findall(r"\w+|[^\w\s]", line.lower())})
    characters = string.ascii_lowercase + string.digits + string.punctuation
    pieces = dict.fromkeys([*SPECIAL, *words, *characters, *(f"##{c}" for c in string.ascii_lowercase + string.digits)])
    write_files(FOLDER / QFormerTokenizer.FOLDER, {"vocab.txt": ("\n".join(pieces) + "\n").encode()})


if __name__ == "__main__":
    main()
