"""Converters of known data sets, each through its command, and rows that cannot be converted."""

import json
from collections import Counter

import pytest

from llamavid_jax.data.records import read_records
from llamavid_jax.data.to_llava import REQUESTS, find_videos, main, split_chat, write_records


def talk(*values):
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


CSV = """videoid,contentUrl,duration,page_dir,name
12,http://x,PT1S,000_1,"A dog, running"
13,http://x,PT1S,000_1,Été
14,http://x,PT1S,,No folder
15,http://x,PT1S,000_1,
12a,http://x,PT1S,000_2,Not there
"""


def test_webvid(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    (tmp_path / "w.csv").write_text(CSV, encoding="utf-8-sig")
    assert main(["webvid", str(tmp_path / "w.csv"), str(tmp_path / "out.json")]) == 0
    assert "4 records" in capsys.readouterr().out
    records = read_records(tmp_path / "out.json", "m")
    assert [r.media for r in records] == ["m/000_1/12.mp4", "m/000_1/13.mp4", "m/14.mp4", "m/000_2/12a.mp4"]
    question, answer = records[1].conversations
    assert answer == {"from": "gpt", "value": "Été"} and question["value"].removesuffix("\n<image>") in REQUESTS
    media = touch(tmp_path / "media", "000_1/12.mp4", "13.webm", "x/14.txt")
    assert main(["webvid", str(tmp_path / "w.csv"), str(tmp_path / "out.jsonl"), "--media", str(media)]) == 0
    out = capsys.readouterr().out
    assert "2 records" in out and "2 without a file" in out and "1 without videoid or name" in out
    assert [r.media for r in read_records(tmp_path / "out.jsonl", "m")] == ["m/000_1/12.mp4", "m/13.webm"]


def test_video_chatgpt(tmp_path, capsys):
    rows = [
        {"q": "What?", "a": "This.", "video_id": "v_a.b"},
        {"q": "Who?", "a": "He.", "video_id": "v_a.b"},
        {"q": "Who?", "a": "", "video_id": "v_c"},
        {"q": "Who?", "a": "She.", "video_id": "v_gone"},
        {"q": 3, "a": "x", "video_id": "v_c"},
        "no row",
        {"q": "Where?", "a": "Here.", "video_id": "v_c"},
    ]
    (tmp_path / "q.json").write_text(json.dumps(rows))
    media = touch(tmp_path / "media", "v_a.b.mkv", "sub/v_c.MP4", "v_c.txt")
    assert main(["video_chatgpt", str(tmp_path / "q.json"), str(tmp_path / "o.json"), "--media", str(media)]) == 0
    out = capsys.readouterr().out
    assert (
        "3 records" in out
        and "1 without a file" in out
        and "3 without q, a and video_id, or video and conversations" in out
    )
    records = read_records(tmp_path / "o.json", media)
    assert [(r.id, r.media) for r in records] == [
        ("v_a.b_0", str(media / "v_a.b.mkv")),
        ("v_a.b_1", str(media / "v_a.b.mkv")),
        ("v_c_6", str(media / "sub/v_c.MP4")),
    ]
    assert records[1].conversations == talk("<image>\nWho?", "He.")


def test_video_chatgpts_own_training_file(tmp_path, capsys):
    """It names feature files that users lack; the videos are found in `--media`, and `<video>` becomes `<image>`."""
    rows = [
        {"id": "v_a", "video": "v_a.pkl", "conversations": talk("What is this?\n<video>", "A dog.")},
        {"id": "v_a", "video": "v_a.pkl", "conversations": talk("<video>\nWho?", "He.", "Where?", "There.")},
        {"id": "v_b", "video": "v_b.pkl", "conversations": talk("No place for it", "Yes.")},
        {"id": "v_c", "video": "v_c.pkl", "conversations": talk("<video>", "Gone.")},
        {"id": "v_a", "video": "v_a.pkl", "conversations": "none"},
        {"id": "v_a", "video": 3, "conversations": talk("<video>", "x")},
    ]
    (tmp_path / "q.json").write_text(json.dumps(rows))
    media = touch(tmp_path / "media", "v_a.mp4", "x/v_b.avi")
    assert main(["video_chatgpt", str(tmp_path / "q.json"), str(tmp_path / "o.json"), "--media", str(media)]) == 0
    assert "1 without a file, 2 without q, a" in capsys.readouterr().out
    records = list(read_records(tmp_path / "o.json", media))
    assert [(r.id, r.media) for r in records] == [
        ("v_a_0", str(media / "v_a.mp4")),
        ("v_a_1", str(media / "v_a.mp4")),
        ("v_b_2", str(media / "x/v_b.avi")),
    ]
    assert records[0].conversations == talk("What is this?\n<image>", "A dog.")
    assert records[1].conversations == talk("<image>\nWho?", "He.", "Where?", "There.")
    assert records[2].conversations == talk("<image>\nNo place for it", "Yes.")


def test_of_several_files_of_one_name_the_likeliest_is_taken(tmp_path):
    touch(tmp_path, "a.webm", "a.mp4", "b.mkv", "z/b.mkv", "z/b.webm", "a.srt")
    assert find_videos(tmp_path) == {"a": "a.mp4", "b": "b.mkv"}


def test_split_chat_keeps_the_image_in_the_first_turn_of_each_piece():
    long = talk("<image>\nq0", "a0", "q1", "a1", "q2", "a2", "q3", "a3", "q4", "a4", "open")
    rows = [
        {"id": "x", "image": "i.jpg", "conversations": long, "source": "s"},
        {"id": "x_1", "image": "i.jpg", "conversations": long[:4]},
        {"id": "t", "conversations": talk(*"abcdefgh")},
        {"id": "f", "video": "film.npz", "conversations": long},
        {"id": "late", "video": "v.mp4", "conversations": talk(*"abcd", "<image> q2", "a2", *"efgh")},
        {"id": "gpt", "image": "i.jpg", "conversations": [{"from": "gpt", "value": "hi"}, *long[:6]]},
        {"id": "bad", "image": "i.jpg", "conversations": [*long[:5], long[4], *long[5:]]},
        {"id": "worse", "image": "i.jpg", "conversations": "no list"},
    ]  # fmt: skip
    out = list(split_chat(rows, 2, Counter()))
    pieces = [(row["id"], [turn["value"] for turn in row["conversations"]]) for row in out[:3]]
    assert pieces == [
        ("x_0", ["<image>\nq0", "a0", "q1", "a1"]),
        ("x_1", ["<image>\nq2", "a2", "q3", "a3"]),
        ("x_2", ["<image>\nq4", "a4"]),
    ]
    assert all(row["source"] == "s" and row["image"] == "i.jpg" for row in out[:3])
    assert [row["id"] for row in out[3:]] == [
        "x_1_",
        "t",
        "f",
        "late_0",
        "late_1",
        "late_2",
        "gpt_0",
        "gpt_1",
        "bad",
        "worse",
    ]
    assert out[3]["conversations"] == rows[1]["conversations"] and out[4] == rows[2] and out[5] == rows[3]
    starts = {row["id"]: row["conversations"][0]["value"] for row in out[:-1]}
    assert starts["late_0"] == "a" and starts["late_1"] == "<image> q2" and starts["late_2"] == "<image>\ng"
    assert [row.get("video") for row in out if row["id"].startswith("late")] == [None, "v.mp4", "v.mp4"]
    assert starts["gpt_0"] == "<image>\nq0" and starts["gpt_1"] == "<image>\nq2"
    assert out[-2]["conversations"] == rows[6]["conversations"] and out[-1] == rows[7]
    assert rows[0]["conversations"] == long  # the input is not changed in place


def test_a_record_of_as_many_rounds_as_allowed_stays_whole():
    row = {"id": 5, "image": "i.jpg", "conversations": talk("<image>", "a", "b", "c")}
    assert list(split_chat([row], 2, Counter())) == [row | {"id": "5"}]
    film = {"id": "s", "video": "v.mp4", "subtitles": "v.srt", "conversations": talk("<image>", *"abcdefg")}
    assert list(split_chat([film], 2, Counter())) == [film], "its frames stand in one turn, for all of its rounds"


def test_an_id_of_null_is_no_id():
    rows = [{"id": None, "image": "i.jpg", "conversations": talk("<image>", "a")}] * 2
    assert [row["id"] for row in split_chat(rows, 2, Counter())] == ["0", "1"]


def test_split_chat_command(tmp_path, capsys):
    source = tmp_path / "in.jsonl"
    rows = [{"id": "x", "image": "i.jpg", "conversations": talk("<image>q", "a", "b", "c")}] * 2
    write_records(source, rows, Counter())
    assert main(["split_chat", str(source), str(tmp_path / "new" / "out.json"), "--rounds", "1"]) == 0
    records = read_records(tmp_path / "new" / "out.json")
    assert [record.id for record in records] == ["x_0", "x_1", "x_0_", "x_1_"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out.json"]


@pytest.mark.parametrize("name", ["o.json", "o.jsonl"])
@pytest.mark.parametrize("count", [1, 3])
def test_written_files_are_json(tmp_path, name, count):
    assert write_records(tmp_path / name, [{"id": "é\n"}] * count, Counter()) == count
    text = (tmp_path / name).read_text()
    rows = json.loads(text) if name == "o.json" else [json.loads(line) for line in text.splitlines() if line]
    assert rows == [{"id": "é\n"}] * count


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["webvid", "no.csv", "o.json"], "no.csv cannot be read as CSV"),
        (["webvid", "in.json", "o.json"], "videoid and name are needed"),
        (["webvid", "latin.csv", "o.json"], "cannot be read as CSV"),
        (["webvid", "good.csv", "o.txt"], "neither .json nor .jsonl"),
        (["webvid", "good.csv", "/proc/x/o.json"], "cannot be written"),
        (["webvid", "good.csv", "o.json", "--media", "no"], "no is not a folder"),
        (
            ["webvid", "good.csv", "o.json", "--media", "."],
            "o.json would hold no record: 4 without a file, 1 without v",
        ),
        (["video_chatgpt", "in.json", "o.json", "--media", "."], "would hold no record: 1 without q, a and video_id"),
        (["video_chatgpt", "good.csv", "o.json", "--media", "."], "not a readable list"),
        (["split_chat", "no.json", "o.json", "--rounds", "3"], "does not exist"),
        (["split_chat", "in.json", "o.json", "--rounds", "0"], "--rounds is 0"),
        (["split_chat", "in.json", "o.json"], "arguments are required: --rounds"),
        (["webvit", "in.json", "o.json"], "invalid choice: 'webvit'"),
    ],
)
def test_what_cannot_be_converted_is_one_line_and_leaves_no_file(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.json").write_text('[{"id": 1}]')
    (tmp_path / "good.csv").write_text(CSV, encoding="utf-8")
    (tmp_path / "latin.csv").write_bytes(b"videoid,name\n1,\xe9t\xe9\n")
    before = sorted(tmp_path.iterdir())
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before
