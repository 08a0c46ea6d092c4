"""The processor: text, media and chats -> the model's arguments; each malformed call has its own error."""

import contextlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from paths import GOLDEN
from PIL import Image

from llamavid_jax import LLaMAVIDLlavaImageProcessor, LLaMAVIDLlavaProcessor
from llamavid_jax.checkpoints.tokenizers import check_tokenizers, load_tokenizers
from llamavid_jax.config.parts import LlamaConfig, LLaMAVIDLlavaQFormerConfig
from llamavid_jax.config.schema import LLaMAVIDLlavaConfig
from llamavid_jax.errors import ConfigError
from llamavid_jax.media.source import MediaError
from llamavid_jax.shapes import IMAGE_TOKEN
from llamavid_jax.text.conversation import ConversationError
from llamavid_jax.text.tokenizer import encode_with_images

SIZE = 28


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint folder with the files that the processor reads."""
    path = tmp_path_factory.mktemp("checkpoint")
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(GOLDEN / "text" / name, path)
    shutil.copytree(GOLDEN / "short_video_mean" / "qformer_tokenizer", path / "qformer_tokenizer")
    LLaMAVIDLlavaImageProcessor(size=SIZE).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def processor(folder) -> LLaMAVIDLlavaProcessor:
    return LLaMAVIDLlavaProcessor.from_pretrained(folder)


def image(value: int = 0) -> np.ndarray:
    return np.full((40, 30, 3), value, np.uint8)


def video(frames: int, value: int = 0) -> np.ndarray:
    return np.full((frames, 30, 40, 3), value, np.uint8)


def user(*parts) -> dict:
    return {"role": "user", "content": list(parts)}


def words(text: str) -> dict:
    return {"type": "text", "text": text}


def test_one_video(processor):
    inputs = processor("USER: <image>\nWhat\nnow? ASSISTANT:", videos=video(5), fps=2)
    before = processor.tokenizer.encode("USER: ")
    assert inputs["input_ids"].shape[0] == 1 and inputs["input_ids"].dtype == np.int32
    assert inputs["input_ids"][0, : len(before) + 1].tolist() == [*before, IMAGE_TOKEN]
    assert inputs["attention_mask"].all()
    assert inputs["pixel_values"][0].shape == (5, 3, SIZE, SIZE) and inputs["pixel_values"][0].dtype == np.float32
    assert inputs["prompts"] == [["What\nnow?"]]
    assert inputs.timestamps[0][0].tolist() == [0, 0.5, 1, 1.5, 2]


def test_ragged_batch_of_image_video_and_text(processor):
    inputs = processor(
        ["<image>\nWhat is it?", "no picture here", "<image>?"],
        images=[image(), None, None],
        videos=[None, None, video(2)],
    )
    assert [None if p is None else p.shape[0] for p in inputs["pixel_values"]] == [1, None, 2]
    assert inputs["prompts"] == [["What is it?"], [], ["?"]]
    rows = [row[mask].tolist() for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
    assert rows[1] == processor.tokenizer.encode("no picture here")
    longest = max(map(len, rows))
    assert inputs["input_ids"].shape == (3, longest)
    assert (inputs["input_ids"][~inputs["attention_mask"]] == processor.tokenizer.pad_id).all()


def test_one_visual_in_several_turns_keeps_one_array(processor):
    text = "x USER: <image>\nA? ASSISTANT: b</s>USER: C?\n<image> ASSISTANT:"
    inputs = processor(text, videos=video(3))
    assert inputs["pixel_values"][0].shape == (3, 3, SIZE, SIZE)
    assert inputs["prompts"] == [["A?", "C?"]]
    assert processor(text, videos=video(3), prompts="D?")["prompts"] == [["D?", "D?"]]
    assert processor(text, videos=video(3), prompts=["D?", "E?"])["prompts"] == [["D?", "E?"]]


def test_images_and_videos_take_their_places(processor):
    inputs = processor("<image><image>?", images=[None, image(255)], videos=[video(4), None])
    first, second = inputs["pixel_values"][0]
    assert first.shape[0] == 4 and second.shape[0] == 1
    assert first.max() < 0 < second.max()


def test_times_stand_between_the_frames_of_videos(processor):
    """Every visual token then has its own placeholder, also those of images; without a video nothing changes."""
    given = {"images": [image(), None], "videos": [None, video(2)], "fps": 0.5}
    inputs = processor("USER: <image> or <image>\nWhat? ASSISTANT:", timestamps=True, **given)
    text = "USER: <image><image> or Below is a movie. Memorize the content and answer my question after watching this "
    text += "movie.[0:00]<image><image>[0:02]<image><image>Now the movie end.\nWhat? ASSISTANT:"
    assert inputs["input_ids"][0].tolist() == encode_with_images(processor.tokenizer, text)
    assert len(inputs["pixel_values"][0]) == len(inputs["prompts"][0]) == 2
    for given in ({"images": image()}, {}):
        text = "USER: <image> ASSISTANT:" if given else "USER: Who? ASSISTANT:"
        timed, plain = (processor(text, timestamps=times, **given)["input_ids"] for times in ("minute", False))
        np.testing.assert_array_equal(timed, plain)


def test_chat_equals_the_prompt_written_out(processor):
    messages = [
        user({"type": "video", "video": video(2)}, words("Who?")),
        {"role": "assistant", "content": "A man."},
        user(words("Alone?")),
    ]
    chat = processor.chat(messages)
    text = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. "
        "USER: <image>\nWho? ASSISTANT: A man.</s>USER: <image>\nAlone? ASSISTANT:"
    )
    written = processor(text, videos=video(2))
    assert (chat["input_ids"] == written["input_ids"]).all()
    assert chat["prompts"] == written["prompts"] == [["Who?", "Alone?"]]
    assert (chat["pixel_values"][0] == written["pixel_values"][0]).all()


def test_a_later_turn_shows_all_again_with_its_own_question(processor, tmp_path, monkeypatch):
    """Each file is read once."""
    Image.fromarray(image(9)).save(tmp_path / "a.png")
    read, pixels = [], LLaMAVIDLlavaImageProcessor.image_pixels
    monkeypatch.setattr(LLaMAVIDLlavaImageProcessor, "image_pixels", lambda *a: read.append(a[1]) or pixels(*a))
    messages = [
        user({"type": "image", "path": str(tmp_path / "a.png")}, {"type": "video", "video": video(3)}, words("A?")),
        {"role": "assistant", "content": "b"},
        user(words("C?")),
    ]
    inputs = processor.chat(messages)
    assert inputs["prompts"] == [["A?", "A?", "C?", "C?"]] and read == [str(tmp_path / "a.png")]
    still, clip, *again = inputs["pixel_values"][0]
    assert again[0] is still and again[1] is clip
    assert [len(times) for times in inputs.timestamps[0]] == [1, 3]


def test_chat_with_different_visuals_and_system_text(processor):
    messages = [
        {"role": "system", "content": "Be brief."},
        user({"type": "image", "image": image()}, words("A?")),
        {"role": "assistant", "content": "b"},
        user(words("C?"), {"type": "video", "video": video(3)}),
    ]
    inputs = processor.chat(messages)
    assert [p.shape[0] for p in inputs["pixel_values"][0]] == [1, 3]
    assert inputs["prompts"] == [["A?", "C?"]]
    begin = processor.tokenizer.encode("Be brief. USER: ")
    assert inputs["input_ids"][0, : len(begin)].tolist() == begin
    batch = processor.chat([messages, [user(words("Hi"))]])
    assert batch["pixel_values"][1] is None and batch["prompts"][1] == [] and batch["input_ids"].shape[0] == 2


def test_chat_without_generation_prompt(processor):
    messages = [user(words("Hi")), {"role": "assistant", "content": "Ho"}]
    ids = processor.chat(messages, add_generation_prompt=False)["input_ids"][0].tolist()
    assert ids[-1] == processor.tokenizer.eos_id
    asked = processor.chat(messages[:1], template="llava_llama_2")["input_ids"][0].tolist()
    assert processor.tokenizer.decode(asked).endswith("Hi [/INST]")


CHATS = {
    "one question": [user({"type": "video"}, words("Who?"))],
    "words before and a list": [user(words("A"), {"type": "image"}, {"type": "image_url"}, words("B"))],
    "no words": [user({"type": "video_url"})],
    "system": [{"role": "system", "content": "Be brief."}, user(words("Hi"))],
    "system in parts": [
        {"role": "system", "content": [words("Be"), words("brief.")]},
        {"role": "user", "content": "x"},
    ],
    "follow-up": [
        user({"type": "image"}, words("A?")),
        {"role": "assistant", "content": [words("b")]},
        user({"type": "video"}, words("C?\nD?")),
        {"role": "assistant", "content": "e"},
        user(words("F?")),
    ],
}


@pytest.mark.parametrize("name", CHATS)
def test_the_jinja_template_gives_the_same_text(name, processor, tmp_path):
    jinja2 = pytest.importorskip("jinja2")
    processor.save_pretrained(tmp_path)
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((tmp_path / "chat_template.jinja").read_text())
    text = processor.apply_chat_template(CHATS[name], add_generation_prompt=True)
    assert template.render(messages=CHATS[name], add_generation_prompt=True) == text
    answered = [*CHATS[name], {"role": "assistant", "content": "ok"}]
    assert template.render(messages=answered) == processor.apply_chat_template(answered)
    assert processor.apply_chat_template([CHATS[name]] * 2, True) == [text, text]


def test_apply_chat_template_gives_what_chat_gives(processor):
    messages = [user({"type": "video", "video": video(4), "fps": 2}, {"type": "image", "image": image()}, words("?"))]
    chat = processor.chat(messages)
    inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    ids = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
    assert (chat.input_ids == inputs.input_ids).all() and (ids == chat.input_ids).all()
    assert [times.tolist() for times in inputs.timestamps[0]] == [[0, 0.5, 1, 1.5], [0]]
    assert processor.decode(ids[0][ids[0] >= 0]).endswith("ASSISTANT:")
    with pytest.raises(ConversationError, match="names 0 sources"):
        processor.apply_chat_template(CHATS["one question"], True, True, True)


def test_a_number_of_frames_in_place_of_a_rate(processor):
    """As in transformers' processors; giving both is an error."""
    messages = [user({"type": "video", "video": video(8)}, {"type": "image", "image": image()}, words("?"))]
    settings = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    found = processor.apply_chat_template(messages, **settings, num_frames=3)
    assert [about.frames_indices.tolist() for about in found.video_metadata[0]] == [[0, 2, 5], [0]]
    assert len(processor("<image>?", videos=video(8), num_frames=2).pixel_values[0]) == 2
    with pytest.raises(MediaError, match="fps is 1 and num_frames 3; give one of them"):
        processor.chat(messages, fps=1, num_frames=3)


def test_arrays_of_jax_and_attributes(processor):
    import jax

    still = image()
    inputs = processor(text="<image><image>?", images=[still, image(3)], return_tensors="jax")
    assert isinstance(inputs.input_ids, jax.Array) and isinstance(inputs.pixel_values[0][1], jax.Array)
    again = [user({"type": "image", "image": still}, {"type": "image", "image": image(3)}, words("a"))]
    again += [{"role": "assistant", "content": "b"}, user(words("c"))]
    pixels = processor.chat(again, return_tensors="jax").pixel_values[0]
    assert pixels[0] is pixels[2] and pixels[1] is pixels[3]
    ((first, second),) = inputs.video_metadata
    assert (
        first.timestamps.tolist() == second.timestamps.tolist() == [0] and inputs.timestamps[0][0] is first.timestamps
    )
    with pytest.raises(AttributeError, match="no 'inputs_ids'; they have input_ids"):
        _ = inputs.inputs_ids
    with pytest.raises(ConversationError, match="return_tensors is 'pt'; use 'np' or 'jax'"):
        processor("a", return_tensors="pt")


def test_batch_decode(processor):
    rows = [processor.tokenizer.encode("a dog</s>"), np.array(processor.tokenizer.encode("walking"), np.int32)]
    assert processor.batch_decode(rows, skip_special_tokens=True) == ["a dog", "walking"]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": "PATH"},
        {"type": "image", "url": "PATH"},
        {"type": "image", "image": "file://PATH"},
        {"type": "image", "image_url": "file://PATH"},
        {"type": "image_url", "image_url": {"url": "file://PATH", "detail": "low"}},
        {"type": "image_url", "image_url": "PATH"},
        {"type": "video", "video": ["file://PATH", "file://PATH"], "fps": 4},
        {"type": "video_url", "video_url": {"url": ["PATH", "PATH"]}, "fps": 4},
    ],
    ids=str,
)
def test_parts_of_other_tools(part, processor, tmp_path):
    Image.fromarray(image(9)).save(tmp_path / "a b.png")
    part = json.loads(json.dumps(part).replace("PATH", str(tmp_path / "a b.png")))
    inputs = processor.chat([user(part, words("?"))])
    video = part["type"].startswith("video")
    assert inputs.timestamps[0][0].tolist() == ([0, 0.25] if video else [0])


def test_files_on_disk_and_times(processor, tmp_path):
    Image.fromarray(image(9)).save(tmp_path / "a.png")
    inputs = processor.chat([user({"type": "image", "path": str(tmp_path / "a.png")}, words("?"))])
    assert inputs["pixel_values"][0].shape == (1, 3, SIZE, SIZE)
    assert [times.tolist() for times in inputs.timestamps[0]] == [[0.0]]


def test_qformer_ids_of_the_recorded_prompts(processor):
    with np.load(GOLDEN / "short_video_mean" / "expected.npz") as arrays:
        prompts = json.loads(str(arrays["video.prompts"]))[1]
        ids, mask = processor.qformer_tokenizer(prompts)
        assert (ids == arrays["video.qformer_input_ids.1"]).all() and mask.all()


def test_save_and_load(processor, folder, tmp_path):
    processor.save_pretrained(tmp_path / "copy")
    saved = {str(p.relative_to(tmp_path / "copy")) for p in (tmp_path / "copy").rglob("*") if p.is_file()}
    assert saved == {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} | {"chat_template.jinja"}
    again = LLaMAVIDLlavaProcessor.from_pretrained(tmp_path / "copy")
    assert again.image_processor == processor.image_processor
    assert again.tokenizer.encode("a </s> b") == processor.tokenizer.encode("a </s> b")
    assert (again.qformer_tokenizer(["what is it"])[0] == processor.qformer_tokenizer(["what is it"])[0]).all()


def test_missing_files(folder, tmp_path):
    assert load_tokenizers(tmp_path) == (None, None)
    copy = shutil.copytree(folder, tmp_path / "copy")
    os.remove(copy / "tokenizer.model")
    assert load_tokenizers(copy)[0] is None and load_tokenizers(copy)[1] is not None
    with pytest.raises(ConversationError, match=r"has no tokenizer\.model and no tokenizer\.json; copy"):
        LLaMAVIDLlavaProcessor.from_pretrained(copy)
    shutil.copy(folder / "tokenizer.model", copy)
    os.remove(copy / "qformer_tokenizer" / "vocab.txt")
    with pytest.raises(ConversationError, match=r"vocab\.txt does not exist"):
        LLaMAVIDLlavaProcessor.from_pretrained(copy)


@pytest.mark.parametrize(
    "text, qformer, message",
    [
        (1024, 126, None),
        (2048, 200, None),  # padded tables
        (1023, 126, r"tokenizer\.model has 1024 pieces, but text_config\.vocab_size is 1023; give"),
        (1024, 125, None),  # [DEC] needs no row
        (1024, 124, r"vocab\.txt in .* has 125 pieces, but qformer_config\.vocab_size is 124; give"),
    ],
)
def test_tokenizers_fit_the_tables(folder, text, qformer, message):
    config = LLaMAVIDLlavaConfig(
        text_config=LlamaConfig(vocab_size=text), qformer_config=LLaMAVIDLlavaQFormerConfig(vocab_size=qformer)
    )
    with pytest.raises(ConfigError, match=message) if message else contextlib.nullcontext():
        check_tokenizers(config, *load_tokenizers(folder), folder)


MALFORMED_CALLS = {
    "has 2 <image> placeholders, but 3 images and videos": {
        "text": "<image> <image>",
        "images": [image(), image(), image()],
    },
    "has 1 <image> placeholders, but 0 images and videos": {"text": "<image>?"},
    "has 0 <image> placeholders, but 1 images and videos": {"text": "what?", "images": image()},
    "has 1 <image> placeholders, but 2 prompts": {"text": "<image>", "images": image(), "prompts": ["a", "b"]},
    "prompts is 5; give a string": {"text": "<image>", "images": image(), "prompts": 5},
    "prompt 0 is 7, of type int": {"text": "<image>", "images": image(), "prompts": [7]},
    r"text is \[\]; give a string": {"text": []},
    "the text is 5, of type int": {"text": [5]},
    "text is a list of 2; give images as a list of that length": {"text": ["<image>", "b"], "images": [image()]},
    "text is a list of 1; give videos as a list": {"text": ["<image>"], "videos": "clip.mp4"},
    "must be lists of one length": {"text": "<image>", "images": [image()], "videos": []},
    "visual 0 is an image and a video": {"text": "<image>", "images": [image()], "videos": [video(1)]},
    "visual 0 is neither an image nor a video": {"text": "<image>", "images": [None], "videos": [None]},
    "no conversation template 'nope'": {"text": "<image>", "images": image(), "template": "nope"},
    "timestamps is 'hour'; use True or one of frame, minute": {"text": "a", "timestamps": "hour"},
    "half a surrogate pair": {"text": "\udfff"},
}


@pytest.mark.parametrize("message", MALFORMED_CALLS)
def test_malformed_call(processor, message):
    with pytest.raises(ConversationError, match=message):
        processor(**MALFORMED_CALLS[message])


def test_malformed_chat(processor):
    for messages, message in (
        ([], "messages is"),
        ([[]], "messages is"),
        ([user(words("a")), {"role": "assistant", "content": "b"}], "conversation 0 ends with the assistant's message"),
        (["hi"], "message 0 is 'hi'"),
    ):
        with pytest.raises(ConversationError, match=message):
            processor.chat(messages)
    with pytest.raises(ConversationError, match="no conversation template 'x'"):
        processor.chat([user(words("a"))], template="x")
