"""MLVU, Video-MME and LongVideoBench in their official formats: prompts, subtitles, scores."""

import json
from pathlib import Path

import pytest
from clips import index_frame, write_clip
from recorded_evaluation import rows_of
from test_answers import ask

from llamavid_jax.errors import InputError
from llamavid_jax.evaluation.answers import cues_of
from llamavid_jax.evaluation.items import Item
from llamavid_jax.evaluation.sets import SETS
from llamavid_jax.text.subtitles import Cue

LETTER = "Answer with the option's letter from the given choices directly."
SRT = "1\n00:00:00,000 --> 00:00:00,900\nHello.\n\n2\n00:00:01,000 --> 00:00:02,000\nWho goes?\n"


def write(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


def clip(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_clip(path, [index_frame(index) for index in range(60)])


@pytest.fixture
def mlvu(tmp_path):
    entry = {"video": "a.mp4", "duration": 9, "question": "Which?", "candidates": ["cat", "dog"], "answer": "dog"}
    write(tmp_path / "MLVU/json/2_needle.json", [{**entry, "question_type": "findNeedle"}] * 2)
    write(tmp_path / "MLVU/json/4_count.json", [{**entry, "answer": "cat", "question_type": "count"}])
    write(tmp_path / "MLVU/json/9_summary.json", [{"video": "b.mp4", "question": "Tell.", "answer": "All."}])
    return tmp_path


def test_mlvu(mlvu):
    """Open-ended questions are left out; the set's figure is the mean over tasks, not over questions."""
    items, _ = SETS["mlvu"].read(mlvu, False)
    assert [item.text for item in items] == [f"Which?\nA. cat\nB. dog\n{LETTER}"] * 3
    assert items[0].media == mlvu / "MLVU" / "video" / "2_needle" / "a.mp4" and items[0].question == items[0].text
    scores = SETS["mlvu"].score(rows_of(items, ["B", "(B)", "B"]), False)
    mean, accuracy = scores.figures.values()
    assert (mean.value, round(accuracy.value, 2)) == (50, 66.67)
    assert {name: figure.value for name, figure in scores.groups["task"].items()} == {"count": 0, "findNeedle": 100}


def test_answers_that_are_no_candidate_or_two(mlvu):
    """As in MLVU's own files: two questions of "needle" have no right option, and five have an option twice."""
    count = {"video": "a.mp4", "question": "?"}
    twice = {**count, "candidates": ["Six", "Three", "Three", "Two"], "answer": "Three"}
    write(mlvu / "MLVU/json/4_count.json", [{**count, "candidates": ["1", "2"], "answer": "3"}, twice, twice, twice])
    items, _ = SETS["mlvu"].read(mlvu, False)
    scores = SETS["mlvu"].score(rows_of(items, ["B", "B", "A", "B", "C", "D"]), False)
    assert list(scores.items.values()) == [1, 1, 0, 1, 1, 0]
    assert scores.notes == ["1 references are no option of their questions, which count as wrong"]


def test_a_broken_question_about_an_empty_option_is_wrong(mlvu):
    """As two questions of MLVU's "ego", whose right option is empty."""
    write(
        mlvu / "MLVU/json/4_count.json",
        [{"video": "a.mp4", "question": "?", "candidates": ["1", ""], "answer": "", "question_type": "count"}],
    )
    items, _ = SETS["mlvu"].read(mlvu, False)
    told = [SETS["mlvu"].score(rows_of(items, ["B", "B", text]), False).groups["task"] for text in ("", "B")]
    assert [groups["count"].value for groups in told] == [0, 100]


@pytest.fixture
def video_mme(tmp_path):
    question = {"question_id": "001-1", "task_type": "OCR", "question": "Which?", "options": ["A. cat", "B. dog"]}
    video = {"video_id": "001", "videoID": "xyz", "duration": "short", "domain": "Sports", "sub_category": "Football"}
    write(tmp_path / "video_mme.json", [{**video, "questions": [{**question, "answer": "B"}]}])
    clip(tmp_path / "data" / "xyz.mp4")
    write(tmp_path / "subtitle" / "xyz.srt", SRT)
    return tmp_path


def test_video_mme(video_mme):
    (item,), _ = SETS["video_mme"].read(video_mme, False)
    assert item.text == f"Which?\nA. cat\nB. dog\n{LETTER}" and item.subtitles is None
    assert item.media.name == "xyz.mp4"
    scores = SETS["video_mme"].score(rows_of([item], ["B"]), False)
    assert scores.figures["accuracy"].value == 100
    assert set(scores.groups) == {"duration", "domain", "sub_category", "task_type"}


def test_video_mme_as_parquet(video_mme):
    """The format of its repository: one row for each question."""
    import pyarrow
    import pyarrow.parquet

    (video,) = json.loads((video_mme / "video_mme.json").read_text())
    rows = [{**{name: value for name, value in video.items() if name != "questions"}, **video["questions"][0]}]
    before = SETS["video_mme"].read(video_mme, False)
    (video_mme / "videomme").mkdir()
    file = video_mme / "videomme" / "test-00000-of-00001.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    (video_mme / "video_mme.json").unlink()
    assert SETS["video_mme"].read(video_mme, False) == before
    halves = [file.with_name(f"test-0000{number}-of-00002.parquet") for number in (0, 1)]
    file.rename(halves[0])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{**rows[0], "question_id": "001-2"}]), halves[1])
    assert [item.id for item in SETS["video_mme"].read(video_mme, False)[0]] == ["001-1", "001-2"]
    halves[1].unlink()
    halves[0].rename(file)
    file.write_bytes(b"PAR1 nonsense")
    with pytest.raises(InputError, match="no parquet table"):
        SETS["video_mme"].read(video_mme, False)


def test_subtitles_of_no_video(video_mme, capsys):
    """If none is found (say, unpacked one folder too deep), an error; some videos have no subtitles."""
    (spoken,) = (video_mme / "subtitle").iterdir()
    (video,) = json.loads((video_mme / "video_mme.json").read_text())
    write(video_mme / "video_mme.json", [video, {**video, "video_id": "002", "videoID": "silent"}])
    items, _ = SETS["video_mme_subtitles"].read(video_mme, False)
    assert [item.subtitles for item in items] == [spoken, None]
    assert "1 of 2 videos have no subtitles" in capsys.readouterr().err
    spoken.rename(video_mme / spoken.name)
    with pytest.raises(InputError, match="the subtitles of none of the 2 videos"):
        SETS["video_mme_subtitles"].read(video_mme, False)
    assert len(SETS["video_mme"].read(video_mme, False)[0]) == 2


def test_subtitles_stand_between_the_frames(video_mme, tiny_model, monkeypatch):
    items, _ = SETS["video_mme_subtitles"].read(video_mme, False)
    seen = []
    encode = type(tiny_model.tokenizer).encode

    def noted(self, text, *more, **named):
        seen.append(text)
        return encode(self, text, *more, **named)

    monkeypatch.setattr(type(tiny_model.tokenizer), "encode", noted)
    (row,) = ask(tiny_model, items, 1)
    assert "error" not in row and row["frames"] == 3
    text = "<image>".join(seen)
    start = text.index("Below is a movie")
    assert text[start:].count("<image>") == 6  # two tokens a frame
    movie = text[start : text.index("Now the movie end.")]
    assert movie.endswith("<image><image>Hello.<image><image>Who goes?<image><image>")


def test_longvideobench(tmp_path):
    entry = {"id": "v_0", "video_path": "v.mp4", "question": "Who?", "candidates": ["cat", "dog", "fox"]}
    entry |= {"correct_choice": 2, "duration_group": 60, "question_category": "TOS", "subtitle_path": "v_en.json"}
    write(tmp_path / "lvb_val.json", [{**entry, "starting_timestamp_for_subtitles": 10.0}])
    clip(tmp_path / "videos" / "v.mp4")
    spoken = [{"start": "00:00:10.000", "end": "00:00:11.500", "line": "Hello <image>"}]
    write(tmp_path / "subtitles" / "v_en.json", [*spoken, {"timestamp": [12.0, None], "text": "Bye"}])
    (item,), _ = SETS["longvideobench"].read(tmp_path, False)
    assert item.reference["answer"] == "C" and item.subtitles is None
    (item,), _ = SETS["longvideobench_subtitles"].read(tmp_path, False)
    assert cues_of(item) == [Cue(1.5, "Hello"), Cue(2.0, "Bye")]
    for broken in (
        [{"timestamp": [None, None], "text": "?"}],
        [{"end": "12", "line": "?"}],
        [{"start": "0"}],
        ["?"],
        {},
    ):
        write(item.subtitles, broken)
        with pytest.raises(InputError, match=r"v_en\.json"):
            cues_of(item)


def test_what_is_said_before_and_after_a_clip_is_left_out(tmp_path):
    """LongVideoBench's clips have the whole video's subtitles; the official loader too drops those outside the clip."""
    entry = {"id": "v_0", "video_path": "v.mp4", "question": "Who?", "candidates": ["cat", "dog"], "correct_choice": 0}
    entry |= {"subtitle_path": "v_en.json", "starting_timestamp_for_subtitles": 60, "duration": 10.0}
    write(tmp_path / "lvb_val.json", [entry])
    (tmp_path / "videos").mkdir()
    clock = "00:{:02}:{:02}.500".format
    spoken = [(clock(0, 10), clock(0, 12), "long ago"), (clock(0, 58), clock(1, 0), "begun before")]
    spoken += [(clock(1, 8), clock(1, 12), "ends after"), (clock(1, 11), clock(1, 13), "later")]
    lines = [{"start": start, "end": end, "line": line} for start, end, line in spoken]
    write(tmp_path / "subtitles" / "v_en.json", [*lines, {"timestamp": [90.0, 95.0], "text": "much later"}])
    (item,), _ = SETS["longvideobench_subtitles"].read(tmp_path, False)
    assert cues_of(item) == [Cue(0.5, "begun before"), Cue(12.5, "ends after")]


@pytest.mark.parametrize(
    "bad",
    [5, {"line": "no end"}, {"end": "1:2", "line": ""}, {"timestamp": [None, None], "text": ""}, {"timestamp": [1]}],
)
def test_subtitles_of_another_form(tmp_path, bad):
    """An error of one line, which fails the questions about their video."""
    write(tmp_path / "a.json", [bad])
    item = Item("1", "?", "?", "?", tmp_path / "a.mp4", True, {}, tmp_path / "a.json")
    with pytest.raises(InputError, match="not in the form of LongVideoBench's subtitles"):
        cues_of(item)


def test_answers_that_are_not_public(tmp_path):
    entry = {"id": "v_0", "video_path": "v.mp4", "question": "Who?", "candidates": ["cat", "dog"]}
    write(tmp_path / "lvb_test_wo_gt.json", [entry])
    clip(tmp_path / "videos" / "v.mp4")
    items, _ = SETS["longvideobench"].read(tmp_path, False)
    scores = SETS["longvideobench"].score(rows_of(items, ["B"]), False)
    assert not scores.figures and json.loads(scores.files["answers.json"]) == [{"id": "v_0", "answer": "B"}]
