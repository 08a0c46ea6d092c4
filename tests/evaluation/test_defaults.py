"""The default mode, where the original's rules would count a right answer as wrong or a wrong one as right."""

import base64
import io
import json
import math
import shutil
import sys
from pathlib import Path

import openpyxl
import pytest
from PIL import Image
from recorded_evaluation import rows_of

from llamavid_jax.errors import InputError
from llamavid_jax.evaluation import mmbench, video_chatgpt, video_qa, vqa
from llamavid_jax.evaluation.judge import ModelJudge, OfflineJudge, Reply
from llamavid_jax.evaluation.replies import read_leniently
from llamavid_jax.evaluation.sets import SETS
from llamavid_jax.media.image_processor import LLaMAVIDLlavaImageProcessor


@pytest.mark.parametrize("original", [False, True])
@pytest.mark.parametrize("name", ["pope", "vqav2", "vizwiz", "textvqa", "msvd", "video_chatgpt"])
def test_a_broken_question_is_wrong(name, original):
    """Even where the rules accept an empty text, as "yes" (POPE) or as what is left of "the"; no judge is asked."""
    people = {"people": ["a", *["the"] * 9]} if name != "textvqa" else {"people": ["the"] * 10}
    entry = {"Q": "?", "A": "a", "video_name": "v"}
    reference = {"question_id": 1, "image": "1", "key": "v_0", "question": "?", "answer": "a", **people}
    reference |= {"category": "random", "label": "yes", "file": "generic", "place": 0, "field": "Q", "entry": entry}
    rows = [{"id": "1", "index": 0, "prompt": "?", "text": "", "reference": reference, "error": "it is gone"}]

    class Judge(ModelJudge):
        def _call(self, sent):
            return Reply("{'pred': 'yes', 'score': 5}")

    judge = [Judge("http://127.0.0.1:9/v1", "")] if SETS[name].is_judged else []
    assert set(SETS[name].score(rows, original, *judge).items.values()) == {0.0}
    counted = {key: value for key, value in rows[0].items() if key != "error"}
    if (name, original) != ("pope", False):
        assert set(SETS[name].score([counted], original, *judge).items.values()) != {0.0}


@pytest.mark.parametrize("name", ["pope", "mme", "seed", "scienceqa"])
def test_a_clear_answer_counts_by_default(official, name):
    """Words around an answer make no difference, but do under the original's rules."""
    items, _ = SETS[name].read(official(name), False)
    letters = "ABCDE"

    def right(item) -> str:
        reference = item.reference
        if "label" in reference:
            return f"The answer: {reference['label'].upper()}"
        answer = reference["answer"]
        return f"The answer is {answer if isinstance(answer, str) else letters[answer]}"

    rows = rows_of(
        items, [right(item) if "answer" in item.reference or "label" in item.reference else "" for item in items]
    )
    default, original = (SETS[name].score(rows, mode) for mode in (False, True))
    assert all(value == 1 for value in default.items.values()) and default.items
    assert sum(original.items.values()) < len(rows)


@pytest.mark.parametrize("name", ["gqa", "seed", "scienceqa", "vqav2"])
def test_answers_that_are_counted_nowhere_are_said(official, name):
    """As happens with annotations of another version of the set."""
    items, _ = SETS[name].read(official(name), False)
    rows = rows_of(items, ["a"] * len(items))
    assert not any("no reference" in note for note in SETS[name].score(rows, False).notes)
    rows[0]["reference"] = {"question_id": rows[0]["reference"]["question_id"]}
    assert any(note.startswith("1 answers have no reference") for note in SETS[name].score(rows, False).notes)


def test_vqav2_ids_as_numbers_and_as_text(official):
    """Number or text in the question files, the annotations and the split: the question is the same."""
    folder = official("vqav2")
    before = SETS["vqav2"].read(folder, False)
    file = folder / "llava_vqav2_mscoco_test-dev2015.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps({**line, "question_id": str(line["question_id"])}) + "\n" for line in lines))
    items, rest = SETS["vqav2"].read(folder, False)
    told = [[{**item.reference, "question_id": 0} for item in some] for some in (before[0], items)]
    assert told[0] == told[1] and rest == before[1] and any("people" in one for one in told[0])


def test_the_training_split_s_annotations_are_others(official):
    folder = official("vqav2")
    before, _ = SETS["vqav2"].read(folder, False)
    (folder / "v2_mscoco_train2014_annotations.json").write_text('{"annotations": []}')
    items, _ = SETS["vqav2"].read(folder, False)
    assert [item.reference for item in items] == [item.reference for item in before]
    assert any("people" in item.reference for item in items)


def test_uploads_keep_possessives(official):
    items, _ = SETS["vizwiz"].read(official("vizwiz"), False)
    rows = rows_of(items, ["Bob's, 2 dogs?"] * len(items))
    (default,), (original,) = (vqa.score_vizwiz(rows, mode).files.values() for mode in (False, True))
    assert json.loads(default)[0]["answer"] == "bob's 2 dogs" and json.loads(original)[0]["answer"] == "bob 's 2 dogs"


def picture(mode: str) -> str:
    content = io.BytesIO()
    Image.new(mode, (8, 5)).save(content, "PNG")
    return base64.b64encode(content.getvalue()).decode()


def mmbench_table(folder, *rows: str):
    folder.mkdir(exist_ok=True)
    header = "index\tquestion\thint\tA\tB\tC\tD\tanswer\tcategory\timage\tsource\tl2-category\tcomment\tsplit"
    (folder / "mmbench_dev_20230712.tsv").write_text("\n".join([header, *rows]) + "\n")
    return folder


def test_mmbench_keeps_every_option(tmp_path):
    """ "NA" is an option, a gap does not end the list, and a greyscale image is read."""
    row = f"7\tWhich?\tnan\tNA\t\tnone\tx\tD\tocr\t{picture('L')}\tmade up\tperception\t\tdev"
    folder = mmbench_table(tmp_path / "mmbench", row)
    (item,), _ = SETS["mmbench"].read(folder, False)
    assert item.question == "Which?\nA. NA\nC. none\nD. x"
    assert LLaMAVIDLlavaImageProcessor(28).image_pixels(item.media).shape == (1, 3, 28, 28)
    (like_original,), _ = SETS["mmbench"].read(folder, True)
    assert like_original.question == "Which?"
    scores = SETS["mmbench"].score(rows_of([item], ["D"]), False)
    assert scores.figures["accuracy"].value == 100


def test_the_upload_s_package_is_looked_for_before_any_question(official, monkeypatch):
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(ModuleNotFoundError):
        SETS["mmbench"].read(official("mmbench"), False)


def test_another_table(tmp_path):
    (tmp_path / "mmbench_dev_20230712.tsv").write_text("name\tvalue\na\tb\n")
    with pytest.raises(InputError, match="has no column 'index'"):
        SETS["mmbench"].read(tmp_path, False)


def test_mmbench_rounds(tmp_path):
    """Circular accuracy counts a question as right if every round is right, whatever its letter."""
    folder = mmbench_table(
        tmp_path / "mmbench",
        f"7\tWhich?\t\tcat\tdog\tfox\t\tB\tanimal\t{picture('RGB')}\tmade up\tperception\t\tdev",
        f"8\tWhich?\t\tcat\tdog\t\t\tA\tanimal\t{picture('RGB')}\tmade up\tperception\t\tdev",
    )
    items, _ = SETS["mmbench_rounds"].read(folder, False)
    assert [item.id for item in items] == ["7", "7, round 1", "7, round 2", "8", "8, round 1"]
    texts = ["B", "A", "C", "A", "A"]
    scores = SETS["mmbench_rounds"].score(rows_of(items, texts), False)
    assert (scores.figures["accuracy"].value, scores.figures["circular accuracy"].value) == (80, 50)


def test_mmbench_rounds_hand_in_the_letters_of_the_sheet(tmp_path):
    """The first round's: other rounds reorder the options. The original hands in the last round's."""
    row = f"7\tWhich?\t\tcat\tdog\tfox\t\tB\tanimal\t{picture('RGB')}\tmade up\tperception\t\tdev"
    items, _ = SETS["mmbench_rounds"].read(mmbench_table(tmp_path / "mmbench", row), False)
    for original, letter in ((False, "B"), (True, "C")):
        sheet = SETS["mmbench_rounds"].score(rows_of(items, ["B", "A", "C"]), original).files["mmbench.xlsx"]
        header, line = openpyxl.load_workbook(io.BytesIO(sheet)).active.values
        assert line[header.index("prediction")] == letter


def test_mmbench_questions_about_one_picture_are_one(tmp_path):
    rows = [
        f"{number}\tWhich?\t\tcat\tdog\tfox\t\tB\tanimal\t{image}\tmade up\tperception\t\tdev"
        for number, image in ((1, picture("RGB")), (2, "1"), (3, picture("L")), (4, "3"))
    ]
    items, _ = SETS["mmbench"].read(mmbench_table(tmp_path / "mmbench", *rows), False)
    figures = SETS["mmbench"].score(rows_of(items, ["B", "B", "C", "C"]), False).figures
    assert [round(figure.error, 2) for figure in figures.values()] == [35.36] * 2


def test_circular_accuracy_is_of_questions_with_all_their_copies(tmp_path):
    """With --limit the copies, which follow all questions, are not asked: one right answer makes no circle."""
    rows = [
        f"{number}\tWhich?\t\tcat\tdog\tfox\t\tB\tanimal\t{picture('RGB')}\tmade up\tperception\t\tdev"
        for number in (1, 2, 3, 1_000_001, 1_000_002)
    ]
    items, _ = SETS["mmbench"].read(mmbench_table(tmp_path / "mmbench", *rows), False)
    rows = rows_of(items, ["B"] * 4 + ["C"])
    for asked, value, count in ((5, 100 * 2 / 3, 3), (4, 100, 2), (2, None, 0)):
        scores = SETS["mmbench"].score(rows[:asked], False)
        figure = scores.figures["circular accuracy"]
        assert figure.count == count and (not count or math.isclose(figure.value, value))
        assert any("not in the circular accuracy" in note for note in scores.notes) == (asked < 5)


def test_mmbench_hands_in_every_line(tmp_path):
    """Also one that comes twice: as in the original, both rows have the last answer."""
    row = f"7\tWhich?\t\tcat\tdog\tfox\t\tB\tanimal\t{picture('RGB')}\tmade up\tperception\t\tdev"
    items, _ = SETS["mmbench"].read(mmbench_table(tmp_path / "mmbench", row, row), False)
    header, *lines = mmbench.cells(rows_of(items, ["A", "B"]))
    assert [line[header.index("prediction")] for line in lines] == ["B", "B"]


def test_activitynet_pairs_by_id(official):
    """In the original, answers in another order than the questions are paired with the wrong questions."""
    folder = official("activitynet_qa")
    file = folder / "test_a.json"
    file.write_text(json.dumps(json.loads(file.read_text())[::-1]))
    default, original = (SETS["activitynet_qa"].read(folder, mode)[0] for mode in (False, True))
    assert default[0].reference["answer"] == "yes" and original[0].reference["answer"] == "no"
    file.write_text(json.dumps(json.loads(file.read_text())[1:]))
    for mode in (False, True):
        with pytest.raises(InputError, match=r"test_a\.json"):
            SETS["activitynet_qa"].read(folder, mode)


def test_activitynet_ids_that_come_twice(official):
    """Each of the two questions keeps its own answer; surplus answers are ignored."""
    folder = official("activitynet_qa")
    for name in ("test_q.json", "test_a.json"):
        entries = json.loads((folder / name).read_text())
        entries[2]["question_id"] = entries[0]["question_id"]
        (folder / name).write_text(json.dumps(entries + entries[-1:] * ("a" in name.removeprefix("test_"))))
    answers = [one["answer"] for one in json.loads((folder / "test_a.json").read_text())]
    for mode in (False, True):
        items, _ = SETS["activitynet_qa"].read(folder, mode)
        assert [item.reference["answer"] for item in items] == answers[: len(items)]


def test_the_second_question_reaches_the_judge(official):
    items, _ = SETS["video_chatgpt"].read(official("video_chatgpt"), False)
    rows = rows_of(items, ["an answer"] * len(items))
    (*_, (_, entry, texts, _)) = video_chatgpt.entries_of(rows, "consistency")
    (consistency,) = [one for one in video_chatgpt.DIMENSIONS if one.name == "consistency"]
    for mode, second in ((False, video_chatgpt.SECOND), (True, video_chatgpt.FIRST)):
        shown = video_chatgpt.question_set(texts, entry, mode)
        sent = video_chatgpt.case(consistency, shown, mode).messages[1]["content"]
        assert f"Question 2: {entry[second]}\n" in sent


def test_one_of_two_consistent_answers_missing(official):
    """A pair with one answer is not judged."""
    items, _ = SETS["video_chatgpt"].read(official("video_chatgpt"), False)
    rows = rows_of(items, ["an answer"] * len(items))[:-1]
    assert SETS["video_chatgpt"].score(rows, False, OfflineJudge()).figures["consistency"].count == 2


def test_the_five_scores_of_a_video_belong_to_it(official):
    """The comparison of two runs needs this: it resamples whole videos."""
    items, _ = SETS["video_chatgpt"].read(official("video_chatgpt"), False)
    rows = rows_of(items, ["an answer"] * len(items))
    scores = SETS["video_chatgpt"].score(rows, False, OfflineJudge())
    media = {row["reference"]["key"]: row["media"] for row in rows if row["reference"]["file"] == "generic"}
    assert set(scores.media) == set(scores.items)
    assert all(scores.media[f"{name} {key}"] == video for key, video in media.items() for name in ("detail", "context"))


def test_offline_figures_say_so(official):
    items, _ = SETS["msvd"].read(official("msvd"), False)
    rows = rows_of(items, [f"It is {item.reference['answer']}." for item in items])
    scores = SETS["msvd"].score(rows, False, OfflineJudge())
    assert scores.figures["accuracy"].value == 100 and "not the paper's" in scores.notes[0]
    assert video_qa.case(rows[0], False, False).read("{'pred': 'yes', 'score': 1}") == read_leniently(
        "{'pred': 'yes', 'score': 1}", ("pred",)
    )


def test_numbers_of_videos(official):
    """MSVD's files are called vid7.avi, MSR-VTT's video7.mp4, and their questions give the number 7."""
    folder = official("msvd")
    lines = json.loads((folder / "test_qa.json").read_text())
    (folder / "test_qa.json").write_text(json.dumps([{**lines[0], "video_id": 101}]))
    assert [SETS["msvd"].read(folder, mode)[0][0].media.name for mode in (False, True)] == ["vid101.avi"] * 2


@pytest.mark.parametrize(
    "name, moved",
    [
        ("mme", {"MME_Benchmark_release_version": "MME_Benchmark_release_version/MME_Benchmark"}),
        ("mmbench", {"mmbench_dev_20230712.tsv": "MMBench_DEV_EN.tsv"}),
        ("mmbench_cn", {"mmbench_dev_cn_20231003.tsv": "MMBench_DEV_CN_V11.tsv"}),
        ("video_chatgpt", {f"{file}_qa.json": "Benchmarking_QA/" for file in ("generic", "temporal", "consistency")}),
        ("activitynet_qa", {"test_q.json": "dataset/", "test_a.json": "dataset/"}),
        ("msvd", {"video/vid101.avi": "video/vid101.AVI"}),
        ("msvd", {"video/vid101.avi": "video/-4wsuPCjDBc_5_15.avi", "video": "YouTubeClips"}),
    ],
)
def test_layouts_that_the_owners_have_too(official, name, moved):
    """The same questions and answers, with media files that exist."""
    data = official(name.removesuffix("_cn"))
    before, _ = SETS[name].read(data, False)
    (data / "youtube_mapping.txt").write_text("x_1_2 vid1\n-4wsuPCjDBc_5_15 vid101\n")
    for old, new in moved.items():
        (data / old).rename(aside := data / "aside")
        target = data / new / old if new.endswith("/") else data / new
        target.parent.mkdir(parents=True, exist_ok=True)
        aside.rename(target)
    items, _ = SETS[name].read(data, False)
    told = [[(item.id, item.text, item.reference) for item in some] for some in (before, items)]
    assert told[0] == told[1]
    assert all(Path(item.media).is_file() for item in items if not str(item.media).startswith("data:"))


@pytest.mark.parametrize("name", sorted(set(SETS) - {"mmbench_rounds"}))
def test_an_empty_folder_says_where_the_set_comes_from(tmp_path, name):
    with pytest.raises(InputError, match=r"holds no .*(\.com|\.co|\.org|\.edu|docs/Evaluation\.md)"):
        SETS[name].read(tmp_path, False)


@pytest.mark.parametrize(
    "name", ["gqa", "vqav2", "pope", "mme", "seed", "scienceqa", "textvqa", "msvd", "video_chatgpt"]
)
def test_files_of_another_form(official, name):
    """Objects in place of lists, and entries with missing fields, are each an error of one line."""
    folder = official(name)
    for file in sorted(folder.glob("*.json*")):
        before = file.read_bytes()
        for content in (b"{", b"[]" if before[:1] == b"{" else b"{}", b'[{"x": 1}]', b"\xff"):
            file.write_bytes(content)
            try:
                SETS[name].read(folder, False)
            except InputError as error:
                assert file.name in str(error) or "holds no" in str(error)
            except (KeyError, TypeError, AttributeError):
                pytest.fail(f"{file.name} {content}")
        file.write_bytes(before)
    shutil.rmtree(folder)
