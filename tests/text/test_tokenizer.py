"""Ids, labels and streaming: the original tokenizer's recorded ids, hand-checked masks.

Recorded conversations and Q-Former prompts: tests/golden/test_golden.py.
"""

import json
import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from paths import GOLDEN
from tokenizers import decoders, models, pre_tokenizers

from llamavid_jax.data.labels import training_example
from llamavid_jax.errors import InputError
from llamavid_jax.files import write_files
from llamavid_jax.shapes import IGNORE_LABEL, IMAGE_TOKEN
from llamavid_jax.text.conversation import ConversationError
from llamavid_jax.text.qformer_tokenizer import QFormerTokenizer
from llamavid_jax.text.tokenizer import TextStream, encode_with_images, load_tokenizer, pad_with_mask

HERE = Path(__file__).parent
TEXT = GOLDEN / "text"
RECORDED = json.loads((HERE / "recorded_llama_ids.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def llama():
    return load_tokenizer(TEXT)


@pytest.mark.parity
@pytest.mark.parametrize("case", RECORDED["cases"], ids=["not-legacy", "legacy", "flags"])
def test_ids_of_the_original_tokenizer(case, tmp_path):
    shutil.copy(TEXT / "tokenizer.model", tmp_path)
    for name, values in case["files"].items():
        (tmp_path / name).write_text(json.dumps(values), encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path)
    for text, ids in zip(RECORDED["texts"], case["encoded"], strict=True):
        assert tokenizer.encode(text) == ids, repr(text)


@pytest.mark.parity
def test_texts_of_the_original_tokenizer(llama):
    for ids, text in zip(RECORDED["ids"], RECORDED["decoded"], strict=True):
        assert llama.decode(ids) == text
        stream = TextStream(llama)
        assert "".join([stream.push(i) for i in ids]) + stream.finish() == text


def test_recorded_settings_differ():
    """The recorded texts distinguish the three settings; otherwise the test above would prove nothing."""
    first, second, third = (case["encoded"] for case in RECORDED["cases"])
    assert first != second and first != third and second != third


def test_stream_gives_whole_characters(llama):
    ids = llama.encode("走る 🎬 ok", add_bos=False)
    stream = TextStream(llama)
    pieces = [stream.push(i) for i in ids]
    assert len(ids) > 10 and pieces.count("") >= 6
    assert [piece for piece in pieces if "\ufffd" in piece] == []
    assert "".join(pieces) + stream.finish() == "走る 🎬 ok"


def test_stream_shows_broken_bytes_at_the_end(llama):
    lead = llama.encode("🎬", add_bos=False)[1]
    stream = TextStream(llama)
    assert stream.push(lead) == ""
    assert stream.finish() == "\ufffd" == llama.decode([lead])


def test_stream_takes_linear_time(llama, monkeypatch):
    """Each id is decoded a few times, however long the text has become."""
    ids, decoded, decode = llama.encode("a man walks his dog in the park. " * 100, add_bos=False), [], llama.decode
    monkeypatch.setattr(llama, "decode", lambda part: decoded.append(len(part)) or decode(part))
    stream = TextStream(llama)
    for i in ids:
        stream.push(i)
    assert len(ids) > 1000 and sum(decoded) < 6 * len(ids)


def test_ids_without_a_piece_have_no_text(llama):
    ids = llama.encode("a dog")
    assert llama.decode([*ids, IMAGE_TOKEN, llama.vocab_size, 10**6, llama.eos_id]) == "a dog"


def test_placeholders_split_the_text(llama):
    ids = encode_with_images(llama, "<image><image>a<image>\nb")
    first, second = llama.encode("a", add_bos=False), llama.encode("\nb", add_bos=False)
    assert ids == [llama.bos_id, IMAGE_TOKEN, IMAGE_TOKEN, *first, IMAGE_TOKEN, *second]


def test_padding():
    ids, mask = pad_with_mask([[5, 0], [7, -200, 9]], pad_id=0)
    assert ids.tolist() == [[5, 0, 0], [7, -200, 9]] and ids.dtype == np.int32
    assert mask.tolist() == [[True, True, False], [True, True, True]]


def record(*values: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


def kept_texts(template: str, folder: Path) -> list[str]:
    """The labelled stretches of a two-round conversation, as text without spaces."""
    # Vicuna's configuration: special tokens do not strip the spaces beside them
    llama = load_tokenizer(write(folder, tokenizer__model=MODEL, tokenizer_config__json=b'{"legacy": false}'))
    example = training_example(template, record("<image>\nWhat?", "A dog.", "Which colour?", "Red."), llama, True, [1])
    kept = example.labels != IGNORE_LABEL
    assert (example.labels[kept] == example.input_ids[kept]).all()
    starts = np.flatnonzero(kept & ~np.roll(kept, 1))
    ends = np.flatnonzero(kept & ~np.roll(kept, -1)) + 1
    stretches = [example.input_ids[start:end] for start, end in zip(starts, ends, strict=True)]
    return [(llama.decode(ids) + "</s>" * int(llama.eos_id in ids)).replace(" ", "") for ids in stretches]


@pytest.mark.parametrize("template", ["vicuna_v1", "imgsp_v1", "llava_v1", "llava_llama_2"])
def test_labels_keep_the_answers(template, tmp_path):
    assert kept_texts(template, tmp_path) == ["Adog.</s>", "Red.</s>"]


def test_labels_of_v0_keep_the_answers_and_some_of_the_frame(tmp_path):
    text = "|".join(kept_texts("llava_v0", tmp_path))  # its masks count one BOS per turn, so they drift
    assert "Adog." in text and "Red." in text and "What?" not in text and "Whichcolour" not in text


def test_mismatched_rounds_ignore_the_sample(llama):
    with pytest.warns(UserWarning, match="the sample is ignored: its rounds have"):
        example = training_example("vicuna_v1", record("a", "b ASSISTANT: c"), llama, False)
    assert (example.labels == IGNORE_LABEL).all() and len(example.input_ids) > 60


def test_text_only_is_cut_at_the_maximum_length(llama):
    conversations = record("word " * 100, "answer")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cut = training_example("imgsp_v1", conversations, llama, False, max_length=70)
        whole = training_example("imgsp_v1", conversations, llama, False)
    assert len(cut.input_ids) == 70 and (cut.input_ids == whole.input_ids[:70]).all()
    assert len(whole.input_ids) > 160 and (whole.labels != IGNORE_LABEL).any()


def qformer_folder(folder: Path, *extra: str) -> Path:
    lines = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "##blue", "blue", "?", "cafe", *extra]
    (folder / "vocab.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def test_qformer_ids(tmp_path):
    tokenizer = QFormerTokenizer(qformer_folder(tmp_path))
    ids, mask = tokenizer(["Red\nBLUE?", "redblue", "Café nothere"])
    assert ids.tolist() == [[2, 5, 7, 8, 3], [2, 5, 6, 3, 0], [2, 9, 1, 3, 0]]
    assert mask.sum(axis=1).tolist() == [5, 4, 4] and ids.dtype == np.int32
    assert tokenizer.vocab_size == 11  # [DEC] has its own row


def test_long_prompts_lose_their_beginning(tmp_path):
    ids, mask = QFormerTokenizer(qformer_folder(tmp_path))(["cafe " + "red " * 250 + "blue " * 4])
    assert ids.shape == (1, 256) and mask.all()
    assert ids[0].tolist() == [2, *[5] * 250, *[7] * 4, 3]
    ids, mask = QFormerTokenizer(qformer_folder(tmp_path))(["red blue cafe", "red"], max_ids=4)
    assert ids.tolist() == [[2, 7, 9, 3], [2, 5, 3, 0]] and mask.sum() == 7


def test_files_that_cannot_be_written_leave_nothing_behind(tmp_path):
    (tmp_path / "b").mkdir()
    with pytest.raises(InputError, match="cannot be written to"):
        write_files(tmp_path, {"a": b"1", "b": b"2"})
    assert sorted(os.listdir(tmp_path)) == ["a", "b"] and (tmp_path / "a").read_bytes() == b"1"


@pytest.fixture
def byte_level(tmp_path) -> Path:
    """A byte-level BPE folder without merges, the kind newer language models ship."""
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = tokenizers.Tokenizer(models.BPE(letters, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return tmp_path


def test_byte_level_tokenizer(byte_level):
    tokenizer = load_tokenizer(byte_level)
    text = "Walk 走る 🎬"
    ids = tokenizer.encode(text + "<|im_end|>")
    assert ids[-1] == tokenizer.eos_id == tokenizer.pad_id == 257 and tokenizer.bos_id == 256
    assert len(ids) == len(text.encode()) + 1
    assert tokenizer.decode([*ids, 9999]) == text
    stream = TextStream(tokenizer)
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("kind", ["llama", "byte_level"])
def test_save_and_load(kind, byte_level, tmp_path_factory):
    source = TEXT if kind == "llama" else byte_level
    target = tmp_path_factory.mktemp("saved")
    tokenizer = load_tokenizer(source)
    tokenizer.save_pretrained(target)
    assert load_tokenizer(target).encode("a</s> b 走") == tokenizer.encode("a</s> b 走")
    assert sorted(os.listdir(target)) == [
        name
        for name in ("special_tokens_map.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json")
        if (source / name).exists()
    ]


def write(folder: Path, **files: bytes) -> Path:
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_bytes(content)
    return folder


MODEL = (TEXT / "tokenizer.model").read_bytes()
BROKEN_FOLDERS = {
    "has no tokenizer.model and no tokenizer.json": {},
    "tokenizer.model is not a sentencepiece model; copy": {"tokenizer__model": MODEL[:300]},
    "tokenizer.model is not a sentencepiece": {"tokenizer__model": b""},
    "tokenizer_config.json is not readable JSON": {"tokenizer__model": MODEL, "tokenizer_config__json": b"{"},
    "tokenizer_config.json is not readable": {"tokenizer__model": MODEL, "tokenizer_config__json": b"\xff\xfe"},
    "special_tokens_map.json .* JSON list": {
        "tokenizer__model": MODEL,
        "special_tokens_map__json": b"[]",
    },
    "sets add_eos_token": {"tokenizer__model": MODEL, "tokenizer_config__json": b'{"add_eos_token": true}'},
    "json: model_max_length is 'abc'": {
        "tokenizer__model": MODEL,
        "tokenizer_config__json": b'{"model_max_length": "abc"}',
    },
    "json: model_max_length is inf": {
        "tokenizer__model": MODEL,
        "tokenizer_config__json": b'{"model_max_length": Infinity}',
    },
    "json: legacy is 'no'; use true or false": {
        "tokenizer__model": MODEL,
        "tokenizer_config__json": b'{"legacy": "no"}',
    },
    "json: add_bos_token is 'x'": {"tokenizer__model": MODEL, "tokenizer_config__json": b'{"add_bos_token": "x"}'},
    "special_tokens_map.json is not readable": {
        "tokenizer__model": MODEL,
        "special_tokens_map__json": b"[" * 10**5,
    },
    "lacks one of the pieces <s>, <end>, <unk>": {
        "tokenizer__model": MODEL,
        "tokenizer_config__json": b'{"eos_token": "<end>"}',
    },
    "tokenizer.json is not a tokenizer": {"tokenizer__json": b'{"model": 3}'},
}


@pytest.mark.parametrize("message", BROKEN_FOLDERS)
def test_broken_tokenizer_folder(message, tmp_path):
    with pytest.raises(ConversationError, match=message):
        load_tokenizer(write(tmp_path, **BROKEN_FOLDERS[message]))


def test_json_tokenizer_with_broken_settings(byte_level):
    write(byte_level, tokenizer_config__json=b'{"eos_token": "<|im_end|>", "model_max_length": "abc"}')
    with pytest.raises(ConversationError, match=r"tokenizer_config\.json: model_max_length is 'abc'"):
        load_tokenizer(byte_level)
    write(byte_level, tokenizer_config__json=b'{"eos_token": {"text": 1}}')
    with pytest.raises(ConversationError, match="names no eos_token"):
        load_tokenizer(byte_level)


def test_json_tokenizer_without_end_token(byte_level):
    (byte_level / "tokenizer_config.json").unlink()
    with pytest.raises(ConversationError, match=r"names no eos_token that tokenizer\.json knows"):
        load_tokenizer(byte_level)


def test_broken_qformer_vocabulary(tmp_path):
    with pytest.raises(ConversationError, match=r"vocab.txt does not exist; copy bert-base-uncased's"):
        QFormerTokenizer(tmp_path)
    write(tmp_path, vocab__txt=b"[PAD]\n[UNK]\n[SEP]\n[MASK]\nred\n")
    with pytest.raises(ConversationError, match=r"has no \[CLS\]; it is not a BERT vocabulary"):
        QFormerTokenizer(tmp_path)
    write(tmp_path, vocab__txt=b"\xff\xfe\x00")
    with pytest.raises(ConversationError, match="is no text"):
        QFormerTokenizer(tmp_path)


def test_malformed_text(llama, tmp_path):
    tokenizer = QFormerTokenizer(qformer_folder(tmp_path))
    for prompts, message in (([], "a list of one text"), (["a", 3], "prompt 1 is 3"), (["\udc00"], "half a surrogate")):
        with pytest.raises(ConversationError, match=message):
            tokenizer(prompts)
    with pytest.raises(ConversationError, match="half a surrogate pair at character 2"):
        llama.encode("ab\ud800")


def added(content: str, **flags: bool) -> dict:
    return {"content": content, "normalized": False} | {
        name: flags.get(name, False) for name in ("lstrip", "rstrip", "single_word", "special")
    }


NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
CONTROL = {str(i): added(token, special=True) for i, token in enumerate(("<unk>", "<s>", "</s>"))}
DETAILED = CONTROL | {
    "1024": added("<tag>", lstrip=True),
    "1025": added("qux", single_word=True),
    "1026": added("<end>", rstrip=True, special=True),
    "1027": added("<tag>s"),
}
FINE_TUNES = {
    "added_tokens.json": {
        "added_tokens.json": {"<tag>": 1024, "qux": 1025, "[PAD]": 1026, "走る": 1027},
        "special_tokens_map.json": {name: added(token) for name, token in NAMES.items()} | {"pad_token": "[PAD]"},
        "tokenizer_config.json": {"legacy": False},
    },
    "decoder": {"tokenizer_config.json": {"legacy": False, "added_tokens_decoder": DETAILED}},
    "decoder, legacy": {"tokenizer_config.json": {"legacy": True, "added_tokens_decoder": DETAILED}},
}
TAGGED = [
    *("a <tag> b", "<tag>", "<tag> ", "<tag><tag> walking", "x<tag>s <tag>y", "a qux, quxs keyqux qux", "<end>  c"),
    *("qux", "a</s><tag>b", "What[PAD] is 走る?", "<tag>\n走る<end>\n<tag>", "no tag at all", "a<tag> <tag>  b"),
]


@pytest.mark.parametrize("kind", FINE_TUNES)
def test_added_tokens_are_those_of_transformers(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    files = {name.replace(".", "__"): json.dumps(value).encode() for name, value in FINE_TUNES[kind].items()}
    write(tmp_path, tokenizer__model=MODEL, **files)
    load_tokenizer(tmp_path).save_pretrained(tmp_path / "saved")
    reference = transformers.LlamaTokenizer.from_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path / "saved")
    assert tokenizer.vocab_size == 1028
    for text in TAGGED:
        ids = reference.encode(text, add_special_tokens=False)
        assert tokenizer.encode(text, add_bos=False) == ids, text
        shown = reference.decode(ids, skip_special_tokens=True)
        assert tokenizer.decode(ids) == shown, text
        stream = TextStream(tokenizer)
        assert "".join([stream.push(i) for i in ids]) + stream.finish() == shown


def test_padding_may_lack_an_embedding(tmp_path):
    """LLaMA 2's first folders give `<pad>` the id after the last row."""
    write(tmp_path, tokenizer__model=MODEL, added_tokens__json=b'{"<pad>": 1024}')
    assert load_tokenizer(tmp_path).vocab_size == 1025
    write(tmp_path, special_tokens_map__json=b'{"pad_token": "<pad>"}')
    assert load_tokenizer(tmp_path).vocab_size == 1024


def test_an_added_token_that_is_a_piece_has_its_id(tmp_path):
    write(tmp_path, tokenizer__model=MODEL, added_tokens__json=b'{"ing": 297}')
    assert load_tokenizer(tmp_path).encode("walking", add_bos=False)[-1] == 297
    write(tmp_path, added_tokens__json=b'{"ing": 1024}')
    with pytest.raises(ConversationError, match="the id 297 for the added token 'ing', the files beside it 1024"):
        load_tokenizer(tmp_path)


def test_added_tokens_of_a_json_tokenizer(byte_level):
    write(byte_level, added_tokens__json=b'{"<tag>": 258}')
    tokenizer = load_tokenizer(byte_level)
    assert tokenizer.encode("a<tag>")[1:] == [258] and tokenizer.decode([258]) == "<tag>"
    assert tokenizer.vocab_size == 259
    write(byte_level, added_tokens__json=b'{"<tag>": 300}')
    with pytest.raises(ConversationError, match="the id 258 for the added token '<tag>', the files beside it 300"):
        load_tokenizer(byte_level)


@pytest.mark.parametrize("value", [{"<a>": "x"}, {"<a>": -1}, {"": 1024}, {"<a>": True}, {"<a>": 10**12}])
def test_broken_added_tokens(value, tmp_path):
    write(tmp_path, tokenizer__model=MODEL, added_tokens__json=json.dumps(value).encode())
    with pytest.raises(ConversationError, match=r"added_tokens\.json are not as transformers writes them"):
        load_tokenizer(tmp_path)
    config = {"added_tokens_decoder": {str(number): {"content": text} for text, number in value.items()}}
    config["added_tokens_decoder"]["x"] = 3
    write(tmp_path, added_tokens__json=b"{}", tokenizer_config__json=json.dumps(config).encode())
    with pytest.raises(ConversationError, match=r"tokenizer_config\.json are not as"):
        load_tokenizer(tmp_path)


def test_ids_with_gaps_are_counted_to_the_last(tmp_path):
    """A vocabulary with an id beyond the model's rows is refused, however few pieces it has."""
    model = {"type": "BPE", "vocab": {"a": 999, "</s>": 1}, "merges": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model, "added_tokens": []}))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.decode([999])) == (1000, "a")
