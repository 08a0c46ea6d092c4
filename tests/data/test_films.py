"""A video with subtitles in the training set: the film's text, the same from a JSON, from shards and at inference."""

import functools
import json
from types import SimpleNamespace

import numpy as np
import pytest
from clips import index_frame, write_clip
from paths import GOLDEN
from training_cases import qformer_tokenizer

from llamavid_jax.data import examples, records, validate
from llamavid_jax.data.build_shards import build
from llamavid_jax.data.examples import ExampleReader
from llamavid_jax.data.labels import training_example
from llamavid_jax.data.loader import FrameLayout, Loader
from llamavid_jax.data.record import DataError, Record
from llamavid_jax.data.records import read_records
from llamavid_jax.data.sizes import read_sizes
from llamavid_jax.errors import InputError
from llamavid_jax.inference.session import Session
from llamavid_jax.media.feature_file import Description, FeatureWriter
from llamavid_jax.media.image_processor import LLaMAVIDLlavaImageProcessor
from llamavid_jax.shapes import END, IGNORE_LABEL, IMAGE_TOKEN, START, RowShape
from llamavid_jax.text.conversation import movie_inputs
from llamavid_jax.text.subtitles import interleave, read_subtitles
from llamavid_jax.text.tokenizer import load_tokenizer
from llamavid_jax.training.identity import media_files

SRT = """1
00:00:00,500 --> 00:00:01,500
Who goes there...

2
00:00:02,000 --> 00:00:02,900
a <image> man
"""
TURNS = [{"from": "human", "value": "<image>\nWhat is he doing?"}, {"from": "gpt", "value": "He walks."}]
CASES = [
    case
    for case in json.loads((GOLDEN / "movie" / "cases.json").read_text(encoding="utf-8"))
    if case["source"] == "srt" and "training" in case
]


def reader(tokens_per_frame: int = 2, start_end: bool = False) -> ExampleReader:
    tokenizer = load_tokenizer(GOLDEN / "text", (START, END) if start_end else ())
    return ExampleReader(tokenizer, "imgsp_v1", 56, "pad", tokens_per_frame, 1.0, 0, start_end=start_end)


def write_features(path, frames: int, inputs: str | None) -> None:
    """A feature file of one frame a second."""
    writer = FeatureWriter(path, frames, "BF16", inputs or "")
    for frame in np.ones((frames, 17, 8), np.float32):
        writer.add(frame)
    sampling, times = {"fps": 1.0, "rule": "stride", "seconds": float(frames)}, list(map(float, range(frames)))
    writer.commit(Description(True, times, {}, sampling, {}, {"sha256": "ab"}, inputs))


@pytest.fixture
def data(tmp_path):
    """A JSON file of one record: a film of four seconds, its subtitles and a question."""
    (tmp_path / "films").mkdir()
    write_clip(tmp_path / "films" / "movie.mp4", [index_frame(i) for i in range(40)], rate=10)
    (tmp_path / "films" / "movie.srt").write_text(SRT)
    record = {"id": "film", "video": "films/movie.mp4", "subtitles": "films/movie.srt", "conversations": TURNS}
    (tmp_path / "data.json").write_text(json.dumps([record]))
    return tmp_path / "data.json"


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_recorded_films(case, tmp_path, monkeypatch):
    """Ids, labels and the Q-Former's words are those of the original's training on the same subtitles."""
    (tmp_path / "film.srt").write_text(case["srt"], encoding="utf-8")
    (tmp_path / "film.mp4").write_bytes(b"frames")
    times = SimpleNamespace(times=np.array(case["frame_times"]))
    monkeypatch.setattr(examples, "plan_video", lambda *_: times)
    for function in (read_subtitles, interleave):  # reproduces the original's errors, too (docs/original.md)
        monkeypatch.setattr(records, function.__name__, functools.partial(function, as_original=True))
    turns = [{"from": "human", "value": case["human"]}, {"from": "gpt", "value": case["answer"]}]
    record = Record("film", turns, str(tmp_path / "film.mp4"), "video", subtitles=str(tmp_path / "film.srt"))
    text = reader(case["video_token"], case["im_start_end"]).text(record, 0)
    for field in ("input_ids", "labels"):
        assert getattr(text, field).tolist() == case["training"][field]
    assert text.prompts == case["training"]["prompts"]


def test_the_text_is_that_of_inference(data, tiny_model):
    """Training and inference give the same text for a video and subtitles, and the frames fit it."""
    record = read_records(data)[0]
    images = LLaMAVIDLlavaImageProcessor.of(tiny_model.config)
    session = Session(tiny_model, images, videos=[record.media], subtitles=read_subtitles(record.subtitles))
    session.ask("What is he doing?", max_new_tokens=1)
    header = reader()._header(record)
    assert header.inputs == session.visuals.movie == "<image><image>Who goes there...<image>a   man<image>"
    example = reader().read(record, 0, max_frames=8)
    assert example.questions == ["What is he doing?"] and len(example.frames) == 4
    assert (example.input_ids == IMAGE_TOKEN).sum() == 2 * 4


def test_shards_hold_the_subtitles(data, tmp_path):
    """Samples and sizes equal those from the files, token for token, even if frames are left out."""
    build(data, tmp_path / "shards")
    own, packed = read_records(data), read_records(tmp_path / "shards")
    sizes = [read_sizes(data_set, reader()) for data_set in (own, packed)]
    assert not sizes[0].broken and not sizes[1].broken and sizes[0].fingerprint() == sizes[1].fingerprint()
    assert (sizes[0].frames[0], sizes[0].questions[0]) == (4, 1)
    for most in (8, 2):
        first, second = (reader().read(data_set[0], 0, most) for data_set in (own, packed))
        np.testing.assert_array_equal(first.input_ids, second.input_ids)
        np.testing.assert_array_equal(first.frames, second.frames)
        assert (first.input_ids == IMAGE_TOKEN).sum() == 2 * len(first.frames) == 2 * min(most, 4)
    assert len(reader().read(own[0], 0, 8).input_ids) == sizes[0].tokens[0]


def test_validate(data, capsys):
    assert validate.main([str(data)]) == 0
    (data.parent / "films" / "movie.srt").write_text("no times")
    assert validate.main([str(data)]) == 1
    assert "holds no subtitles" in " ".join(capsys.readouterr().out.split())


def test_changed_subtitles_are_another_medium(data):
    """A resumed run checks subtitle files as it checks films."""
    before = media_files(read_records(data), 1)
    (data.parent / "films" / "movie.srt").write_text(SRT + "\n")
    assert (media_files(read_records(data), 1) != before).any()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"subtitles": "films/gone.srt"}, "gone.srt' cannot be read"),
        ({"subtitles": 3}, "record 'film': subtitles is '3'; give the path of one file"),
        ({"video": None}, "record 'film' has subtitles, but no video"),
        ({"video": None, "image": "a.png"}, "record 'film' has subtitles, but no video"),
        ({"video": "films/movie.npz"}, "has subtitles, but films/movie.npz holds its own in `inputs`"),
    ],
)
def test_subtitles_that_cannot_be_used(data, changes, said):
    (record,) = json.loads(data.read_text())
    data.write_text(json.dumps([record | changes]))
    with pytest.raises(InputError, match=said.replace("'", "['\"]+")):
        reader().text(read_records(data)[0], 0)
    assert issubclass(DataError, InputError)


@pytest.mark.parametrize("times", ["frame", "minute"])
def test_times(data, tmp_path, tiny_model, times):
    """Times are the same as at inference, and from files and shards; frames that are left out have none."""
    (record,) = json.loads(data.read_text())
    films = [record | {"times": times}, {**record, "subtitles": None, "times": times}]
    data.write_text(json.dumps(films))
    build(data, tmp_path / "shards")
    own, packed = read_records(data), read_records(tmp_path / "shards")
    assert read_sizes(own, reader()).fingerprint() == read_sizes(packed, reader()).fingerprint()
    images, marks = LLaMAVIDLlavaImageProcessor.of(tiny_model.config), "[0:03]" if times == "frame" else ""
    for number, cues in enumerate((read_subtitles(own[0].subtitles), None)):
        session = Session(tiny_model, images, videos=[own[0].media], subtitles=cues, times=times)
        session.ask("What?", max_new_tokens=1)
        for most, film in ((8, session.visuals.movie), (2, f"[0:00]<image>{marks}<image>")):
            movie = movie_inputs(film, 2, training=True)
            expected = training_example("imgsp_v1", TURNS, reader().tokenizer, True, movie=movie, max_length=2048)
            for record in (own[number], packed[number]):
                example = reader().read(record, number, most)
                assert len(example.frames) == min(most, 4)
                if cues is None or most == 8:
                    np.testing.assert_array_equal(example.input_ids, expected.input_ids)


def test_times_of_features(data):
    """A feature file contains the times of its frames and the subtitles between them."""
    for inputs in (None, "<image><image>Hi.<image>"):
        write_features(data.parent / "film.safetensors", 3, inputs)
        row = {"id": "film", "features": "film.safetensors", "times": "frame", "conversations": TURNS}
        data.write_text(json.dumps([row]))
        film = "[0:00]<image>[0:01]<image>Hi.[0:02]<image>" if inputs else "[0:00]<image>[0:01]<image>[0:02]<image>"
        expected = training_example(
            "imgsp_v1", TURNS, reader().tokenizer, True, movie=movie_inputs(film, 2), max_length=2048
        )
        found = reader().read(read_records(data)[0], 0, 8)
        np.testing.assert_array_equal(found.input_ids, expected.input_ids)


@pytest.mark.parametrize("times", [None, "frame", "minute"])
def test_a_film_without_room_for_all_frames_keeps_its_answer(tmp_path, times):
    """As many frames go as must: with each goes its time, and the texts around it become one, of other tokens."""
    random = np.random.default_rng(0)
    for number in range(12):
        said = [" ".join(random.choice(["does", "then", "man"], random.integers(3))) for _ in range(30)]
        write_features(tmp_path / f"{number}.safetensors", 30, "".join(f"<image>{text}" for text in said))
    rows = [
        {"id": f"{number}", "features": f"{number}.safetensors", "times": times, "conversations": TURNS}
        for number in range(12)
    ]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    films, shape = read_records(tmp_path / "data.json"), RowShape(30, 30, 1, 160)
    sizes = read_sizes(films, reader())
    layout = {"pixels": FrameLayout((8, 8, 3), np.uint8), "features": FrameLayout((16, 8), np.float32)}
    settings = {"batch_size": 1, "question_tokens": 16, "seed": 0, "packing": False, "shuffle": False}
    loader = Loader(films, sizes, reader(), qformer_tokenizer(), [shape], layout, **settings)
    for number, loaded in enumerate(loader):
        whole = reader().read(films[number], number, 30)
        labels = loaded.batch.labels[loaded.batch.labels != IGNORE_LABEL]
        assert labels.tolist() == whole.labels[whole.labels != IGNORE_LABEL].tolist()
        assert loaded.truncated == (loaded.frames < 30) and loaded.tokens <= 160
        assert loaded.tokens > 130 or loaded.frames == 30  # no more frames went than had to
    assert sizes.tokens.max() > 160


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"times": "hour"}, "times is 'hour'; use one of frame, minute"),
        ({"times": ["frame"]}, "times is .*; use one of frame, minute"),
        ({"times": "frame", "video": None, "subtitles": None}, "has times, but no video or features"),
        ({"times": "frame", "video": None, "subtitles": None, "image": "a.png"}, "has times, but no video or features"),
        ({"times": "frame", "video": None, "subtitles": None, "features": "f.npz"}, "does not say when its frames are"),
    ],
)
def test_times_that_cannot_be_told(data, changes, said):
    (record,) = json.loads(data.read_text())
    np.savez(data.parent / "f.npz", feats=np.zeros((2, 16, 8), np.float16))
    data.write_text(json.dumps([record | changes]))
    with pytest.raises(InputError, match=said.replace("'", "['\"]+")):
        reader().text(read_records(data)[0], 0)
