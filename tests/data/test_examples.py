"""Examples of every kind; sizes that agree with what is read; thinning; samples that cannot be used."""

import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
from clips import cut, index_frame, read_index, write_clip
from paths import GOLDEN
from PIL import Image

from llamavid_jax.config.parts import CLIP_MEAN
from llamavid_jax.data.build_shards import read_header
from llamavid_jax.data.examples import ExampleReader, SampleSize, thinned
from llamavid_jax.data.labels import training_example
from llamavid_jax.data.record import Record
from llamavid_jax.data.records import count_frames
from llamavid_jax.data.shards import MediaHeader
from llamavid_jax.errors import InputError
from llamavid_jax.media.images import open_image, pad_to_square, resize_and_crop
from llamavid_jax.media.video import read_video
from llamavid_jax.shapes import IGNORE_LABEL, IMAGE_TOKEN
from llamavid_jax.text.conversation import TEMPLATES
from llamavid_jax.text.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer(GOLDEN / "text")
N = 2  # tokens a frame


def reader(template="imgsp_v1", aspect="pad", fps=1.0, seed=0):
    return ExampleReader(TOKENIZER, template, 56, aspect, N, fps, seed)


def talk(*values):
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


ASKED = talk("<image>\nWhat is it?", "A dog.", "What colour\nhas it?", "Brown.", "Is it big?", "No.")


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "p é.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 90, 3), np.uint8)).save(path)
    return Record("p", ASKED, str(path), "image")


@pytest.fixture
def clip(tmp_path):
    return Record("v", ASKED, str(write_clip(tmp_path / "v.mp4", [index_frame(i) for i in range(50)], 10)), "video")


def features(tmp_path, frames=4, inputs=None, conversations=ASKED, name="f.npz"):
    feats = np.arange(frames, dtype=np.float16)[:, None, None] * np.ones((1, 5, 3), np.float16)
    np.savez(tmp_path / name, feats=feats, **({} if inputs is None else {"inputs": inputs}))
    return Record("f", conversations, str(tmp_path / name), "features")


def expanded(example, movie=False):
    """The number of tokens after expansion, counted from the definition."""
    places = int((example.input_ids == IMAGE_TOKEN).sum())
    if example.frames is None or movie:
        return len(example.input_ids)
    assert places == len(example.questions)
    return len(example.input_ids) - places + places * len(example.frames) * N


def test_a_still_is_padded_or_cropped_and_its_turns_have_their_own_questions(picture):
    example = reader().read(picture, 3, max_frames=8)
    still = open_image(picture.media)
    np.testing.assert_array_equal(example.frames, resize_and_crop(pad_to_square(still, CLIP_MEAN), 56)[None])
    cropped = reader(aspect="crop").read(picture, 3, max_frames=1).frames
    np.testing.assert_array_equal(cropped, resize_and_crop(still, 56)[None])
    assert example.id == "p" and example.frames.dtype == np.uint8
    assert example.questions == ["What is it?", "What colourhas it?", "Is it big?"]
    assert int((example.input_ids == IMAGE_TOKEN).sum()) == 3
    assert reader().size(picture, 3) == SampleSize("pixels", 1, 3, expanded(example))


def test_the_text_is_that_of_the_preprocessing_with_the_drawn_sides(picture):
    text = reader(seed=5).text(picture, 3)
    candidates = [
        training_example("imgsp_v1", ASKED, TOKENIZER, True, [a, b], max_length=10**30) for a in (0, 1) for b in (0, 1)
    ]
    assert [c.input_ids.tolist() == text.input_ids.tolist() for c in candidates].count(True) == 1
    draws = {tuple(reader(seed=s).text(picture, i).input_ids.tolist()) for s in range(3) for i in range(20)}
    assert len(draws) == 4  # all four pairs of sides occur
    again = pickle.loads(pickle.dumps(reader(seed=5))).read(picture, 3, 1)
    assert again.input_ids.tolist() == text.input_ids.tolist() and again.labels.tolist() == text.labels.tolist()


def test_text_alone_has_no_questions():
    record = Record("t", talk("Say hello.", "Hello.", "Again.", "Hello again."), None, "text")
    example = reader().read(record, 0, 0)
    assert example.questions == [] and example.frames is None
    assert reader().size(record, 0) == SampleSize("text", 0, 0, len(example.input_ids))
    long = Record("t", talk("Say.", "words " * 5000 + "end."), None, "text")
    assert len(reader().read(long, 0, 0).input_ids) > 5000  # the reader does not truncate


def test_questions_belong_to_the_turns_with_a_placeholder(picture):
    late = talk("Hello.", "Hello.", "<image> What?", "A dog.", "Why?", "So.")
    record = Record("p", late, picture.media, "image")
    example = reader().read(record, 0, 1)
    assert example.questions == ["What?".replace(" ", ""), "Why?"]
    assert reader().size(record, 0).questions == 2 and reader().size(record, 0).tokens == expanded(example)


@pytest.mark.parametrize("template", TEMPLATES)
def test_size_is_that_of_the_example(picture, clip, tmp_path, template):
    pair = ASKED[:2]
    for record in (
        Record("p", pair, picture.media, "image"),
        Record("v", pair, clip.media, "video"),
        features(tmp_path, conversations=pair),
        Record("t", talk("Hello.", "Hello."), None, "text"),
    ):
        one = reader(template, fps=2)
        if record.kind == "text" and TEMPLATES[template].masking == "caption":
            continue  # caption templates need an image or video
        size, example = one.size(record, 9), one.read(record, 9, 100)
        assert size.tokens == expanded(example)
        assert size.questions == len(example.questions) and size.frames == len(
            () if record.kind == "text" else example.frames
        )


def test_frames_of_a_video(clip):
    example = reader(fps=2).read(clip, 0, 100)
    assert example.frames.shape == (10, 56, 56, 3)
    exact = [resize_and_crop(index_frame(i), 56) for i in range(0, 50, 5)]
    assert np.abs(example.frames.astype(int) - np.stack(exact)).mean() < 4
    assert reader(fps=2).size(clip, 0).frames == 10
    assert reader(fps=2).size(clip, 0, MediaHeader(50, 10.0)) == reader(fps=2).size(clip, 0)
    assert reader(fps=0.7).size(clip, 0, MediaHeader(50, 10.0)) == reader(fps=0.7).size(clip, 0)


@pytest.mark.parametrize("fps", [0.5, 1, 3])
@pytest.mark.parametrize("times", [[0, 4000, 8000, 12000], [20 * i for i in range(50)] + [1000, 2000, 5000]])
def test_training_samples_a_video_as_inference_does(tmp_path, fps, times):
    path = write_clip(tmp_path / "v.mkv", [index_frame(i) for i in range(len(times))], times_ms=times)
    record = Record("v", ASKED, str(path), "video")
    expected = [read_index(frame) for frame in read_video(path, fps).frames]
    exact = np.stack([resize_and_crop(index_frame(i), 56) for i in expected])
    assert np.abs(reader(fps=fps).read(record, 0, 100).frames.astype(int) - exact).mean() < 4
    for header in (None, read_header(record, path)):
        assert reader(fps=fps).size(record, 0, header).frames == len(expected)
    assert count_frames(path, "video", fps) == len(expected)


@pytest.mark.parametrize("max_frames", [1, 2, 3, 7, 49, 50, 51])
def test_thinning_keeps_evenly_spaced_frames(clip, monkeypatch, max_frames):
    monkeypatch.setattr(ExampleReader, "_transform", lambda _, frame, kind: frame)
    shown = [read_index(frame) for frame in reader(fps=10).read(clip, 0, max_frames).frames]
    expected = np.linspace(0, 49, max_frames).round().astype(int).tolist() if max_frames < 50 else list(range(50))
    assert shown == expected


def test_thinned_keeps_first_and_last_and_no_frame_twice():
    for count in range(1, 60):
        for most in range(1, 60):
            kept = thinned(count, most)
            assert len(kept) == min(count, most) and kept[0] == 0 and kept == sorted(set(kept))
            assert most == 1 or kept[-1] == count - 1


def test_media_from_memory_give_the_same_frames(picture, clip, tmp_path):
    for record in (picture, clip, features(tmp_path)):
        stored = Record(record.id, record.conversations, "name", record.kind, Path(record.media).read_bytes())
        ours, theirs = reader().read(record, 0, 3), reader().read(stored, 0, 3)
        np.testing.assert_array_equal(ours.frames, theirs.frames)
        assert reader().size(record, 0) == reader().size(stored, 0)


def test_features_are_one_block_a_question(tmp_path):
    example = reader().read(features(tmp_path), 0, 3)
    assert example.frames.shape == (3, 4, 3) and example.frames[:, 0, 0].tolist() == [0, 2, 3]
    assert len(example.questions) == 3 == int((example.input_ids == IMAGE_TOKEN).sum())


MOVIE = "<image>one...<image>two<image><image>three\n"
WATCH = talk("Watch: <image> Who is it?", "A man.", "And then?", "He goes.")


def test_a_movie_has_a_place_for_every_visual_token_and_one_question(tmp_path):
    record = features(tmp_path, inputs=MOVIE, conversations=WATCH)
    example = reader().read(record, 0, 100)
    filled = MOVIE.replace("...", "").replace("<image>", "<image><image>")
    turns = talk(f"Watch: {filled} Who is it?", *(turn["value"] for turn in WATCH[1:]))
    text = training_example("vicuna_v1", turns, TOKENIZER, False, max_length=10**30)
    words = [i for i in example.input_ids if i != IMAGE_TOKEN]
    assert int((example.input_ids == IMAGE_TOKEN).sum()) == 8 and example.questions == ["Watch:  Who is it?"]
    assert "<image>" not in TOKENIZER.decode(words) and "two" in TOKENIZER.decode(words)
    assert (example.labels != IGNORE_LABEL).sum() == (text.labels != IGNORE_LABEL).sum() > 0
    assert reader().size(record, 0) == SampleSize("features", 4, 1, len(example.input_ids))
    assert reader().size(record, 0, MediaHeader(4, 0.0, MOVIE)) == reader().size(record, 0)


def test_a_thinned_movie_keeps_all_its_subtitles(tmp_path):
    record = features(tmp_path, inputs=MOVIE, conversations=WATCH)
    example = reader().read(record, 0, 3)
    assert example.frames[:, 0, 0].tolist() == [0, 2, 3]
    assert int((example.input_ids == IMAGE_TOKEN).sum()) == 6
    shown = TOKENIZER.decode([i for i in example.input_ids if i != IMAGE_TOKEN])
    assert all(word in shown for word in ("one", "two", "three"))


BROKEN = {
    "placeholder without media": (lambda p, d: Record("x", ASKED, None, "text"), "names no image"),
    "media without a placeholder": (lambda p, d: Record("x", talk("What?", "It."), p.media, "image"), "no turn holds"),
    "placeholder in the answer": (
        lambda p, d: Record("x", talk("<image>?", "<image>."), p.media, "image"),
        "an answer",
    ),
    "no turns": (lambda p, d: Record("x", [], None, "text"), "conversations is"),
    "a turn without a speaker": (lambda p, d: Record("x", [{"value": "<image>"}], p.media, "image"), "'from'"),
    "a value that is no text": (lambda p, d: Record("x", talk("<image>", 3), p.media, "image"), "is 3"),
    "half a character": (lambda p, d: Record("x", talk("<image>\ud83d", "a"), p.media, "image"), "surrogate"),
    "two questions in a row": (lambda p, d: Record("x", [ASKED[0]] * 2, p.media, "image"), "alternate"),
    "a missing picture": (lambda p, d: Record("x", ASKED, str(d / "no.png"), "image"), r"no\.png does not exist"),
    "a folder": (lambda p, d: Record("x", ASKED, str(d), "image"), "is a folder"),
    "half a picture": (lambda p, d: Record("x", ASKED, str(cut(Path(p.media), 0.5)), "image"), "cut short"),
    "a picture as a video": (lambda p, d: Record("x", ASKED, p.media, "video"), "still picture"),
    "a picture as features": (lambda p, d: Record("x", ASKED, p.media, "features"), "no file of features"),
    "a movie with too few places": (
        lambda p, d: features(d, inputs="<image>a<image>", conversations=WATCH),
        "2 <image> for 4 frames",
    ),
    "a movie in two turns": (
        lambda p, d: features(d, inputs=MOVIE, conversations=talk("<image>a", "b", "<image>c", "d")),
        "in one turn, once",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_sample_that_cannot_be_used_says_why(picture, tmp_path, name):
    make, message = BROKEN[name]
    with pytest.raises(InputError, match=message):
        reader().read(make(picture, tmp_path), 0, 8)


@pytest.mark.parametrize(
    "name", sorted(set(BROKEN) - {"a missing picture", "a folder", "half a picture"})
)  # seen when decoded
def test_its_size_says_so_too(picture, tmp_path, name):
    make, message = BROKEN[name]
    with pytest.raises(InputError, match=message):
        reader().size(make(picture, tmp_path), 0)


def test_a_video_that_is_cut_short(tmp_path):
    whole = write_clip(tmp_path / "v.mp4", [index_frame(i) for i in range(90)], 10, container={"movflags": "faststart"})
    for max_frames in (2, 100):
        with pytest.raises(InputError, match=r"cut-0\.6-v\.mp4 is cut short"):
            reader().read(Record("x", ASKED, str(cut(whole, 0.6)), "video"), 0, max_frames)
    with pytest.raises(InputError, match="room for 0"):
        reader().read(Record("x", ASKED, str(whole), "video"), 0, 0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"aspect": "square"}, "'pad' or 'crop'"), ({"fps": 0.0}, "0.0 frames"), ({"seed": -1}, "-1"),
     ({"template": "v9"}, "no conversation template")],
)  # fmt: skip
def test_settings_that_cannot_be_used(wrong, message):
    with pytest.raises(InputError, match=message):
        reader(**wrong)


def test_a_sample_whose_rounds_do_not_add_up_has_no_labels_and_the_same_size(picture):
    record = Record("x", talk("<image>\na </s> ASSISTANT: b", "c"), picture.media, "image")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        example = reader().read(record, 0, 1)
    assert reader().size(record, 0).tokens == expanded(example)
