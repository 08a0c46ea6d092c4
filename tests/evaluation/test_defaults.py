"""The default mode, where the original's rules would count a right answer wrong, or a wrong one right."""

import base64
import io
import json
import shutil

import pytest
from PIL import Image
from recorded_evaluation import rows_of

from llamavid_jax.errors import InputError
from llamavid_jax.evaluation import mmbench, video_chatgpt, video_qa, vqa, yes_no
from llamavid_jax.evaluation.choice import chosen, numbered
from llamavid_jax.evaluation.judge import ModelJudge, OfflineJudge
from llamavid_jax.evaluation.replies import read_leniently
from llamavid_jax.evaluation.sets import SETS
from llamavid_jax.media.image_processor import LLaMAVIDLlavaImageProcessor


@pytest.mark.parametrize(
    "text, found",
    [
        ("Yes", "yes"),
        ("NO", "no"),
        ("Nope", "no"),
        ("no.", "no"),
        ("There is not a kettle", "no"),
        ("The answer is yes", "yes"),
        ("yes. No car is parked.", "yes"),
        ("", "other"),
        ("Unsure", "other"),
        ("Know", "other"),
        ("nothing", "other"),
        ("eyes", "other"),
        ("Not sure", "other"),
        ("I have no idea", "other"),
        ("I am not sure, but yes", "yes"),
        ("There isn't a kettle", "no"),
        ("I don't know", "other"),
        ("No, I am not sure", "no"),
    ],
)
def test_yes_or_no(text, found):
    assert yes_no.yes_or_no(text) == found


def test_pope_counts_an_unclear_answer_wrong_either_way():
    table = yes_no.counts([("other", "yes"), ("other", "no"), ("yes", "yes"), ("no", "no")])
    assert (table["TP"], table["FP"], table["TN"], table["FN"], table["accuracy"]) == (1, 0, 1, 1, 0.5)


@pytest.mark.parametrize(
    "text, letter",
    [
        ("B", "B"),
        ("b", "B"),
        ("(B)", "B"),
        ("B.", "B"),
        ("B. two dogs", "B"),
        ("**B**", "B"),
        ("The answer is B", "B"),
        ("The answer is: A", "A"),
        ("Answer: **A**", "A"),
        ("'A'", "A"),
        ("A\n\nThe dog is alone.", "A"),
        ("A - one dog", "A"),
        ('The answer is "A".', "A"),
        ("the correct option: (B) two dogs", "B"),
        ("I think that it is C", "C"),
        ("two dogs", "B"),
        ("Two dogs.", "B"),
        ("A dog and a cat", None),
        ("", None),
        ("E", None),
        ("The answer is B. The answer is C.", None),
        ("B or C", None),
        ("A and B", None),
        ("A or C", None),
        ("A, B", None),
        ("(A), (B) and (C)", None),
        ("Both A and C are right", None),
        ("The answer is A or B", None),
        ("The answer is not A", None),
        ("The answer is B, A is wrong", "B"),
        ("A and C are wrong. The answer is B.", "B"),
        ("Choice A is a cat, option C is a fox. The answer is B.", "B"),
        ("Words such as issue, puzzle, answer\nA comparison has others. The answer is B.", "B"),
        ("B, A cat", "B"),
        ("Answer:A", "A"),
        ("It is A.", "A"),
        ("I choose A", "A"),
        ("The answer is A because it barks", "A"),
        ("a.m. or later", None),
        ("I'm not sure", None),
    ],
)
def test_letters(text, letter):
    """ "A dog" names no option; "I" and "A" alone inside a sentence are words."""
    assert chosen(text, numbered(["one dog", "two dogs", "three dogs", "none"])) == letter
    assert chosen(text, {}) is None


@pytest.mark.parametrize(
    "text, letter",
    [("Vitamin C", "A"), ("A dog", "C"), ("Answer: a dog.", "C"), ("P.M.", "D"), ("C", "C"), ("A.", "A")],
)
def test_an_option_s_own_words_come_before_letters_in_them(text, letter):
    assert chosen(text, numbered(["vitamin C", "vitamin D", "A dog", "p.m."])) == letter


def test_an_answer_of_several_options_is_none():
    assert chosen("I", numbered(list("abcdefghi"))) == "I"
    assert chosen("Is A the best? I say D", numbered(list("wxyz"))) == "D"


@pytest.mark.parametrize("name", ["pope", "mme", "seed", "scienceqa"])
def test_a_clear_answer_counts_by_default(official, name):
    """The words around an answer make no difference, but do by the original's rules."""
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


def test_pope_labels_of_another_version(official):
    """In another order, without a misspelling, some lost: each question keeps its own; in the original it does not."""
    folder = official("pope")
    questions = folder / "llava_pope_test.jsonl"
    right = ["Yes" if item.reference["label"] == "yes" else "No" for item in SETS["pope"].read(folder, False)[0]]
    questions.write_text(questions.read_text().replace("in the image?", "in the imange?"))
    for file in (folder / "coco").iterdir():
        file.write_text("\n".join(file.read_text().splitlines()[:0:-1]))
    found = {}
    for mode in (False, True):
        rows = rows_of(SETS["pope"].read(folder, mode)[0], right)
        found[mode] = SETS["pope"].score(rows, mode)
    assert all(found[False].items.values()) and len(found[False].items) == len(right) - 3
    assert "3 questions have no label" in found[False].notes[0] and len(found[False].notes) == 1
    assert not all(found[True].items.values()) and "labels belong to other questions" in found[True].notes[1]


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
    """ "NA" is an option, a gap does not end the list, and a grey picture is a picture."""
    row = f"7\tWhich?\tnan\tNA\t\tnone\tx\tD\tocr\t{picture('L')}\tmade up\tperception\t\tdev"
    folder = mmbench_table(tmp_path / "mmbench", row)
    (item,), _ = SETS["mmbench"].read(folder, False)
    assert item.question == "Which?\nA. NA\nC. none\nD. x"
    assert LLaMAVIDLlavaImageProcessor(28).image_pixels(item.media).shape == (1, 3, 28, 28)
    (like_original,), _ = SETS["mmbench"].read(folder, True)
    assert like_original.question == "Which?"
    scores = SETS["mmbench"].score(rows_of([item], ["D"]), False)
    assert scores.figures["accuracy"].value == 100


def test_another_table(tmp_path):
    (tmp_path / "mmbench_dev_20230712.tsv").write_text("name\tvalue\na\tb\n")
    with pytest.raises(InputError, match="has no column 'index'"):
        SETS["mmbench"].read(tmp_path, False)


def test_mmbench_rounds(tmp_path):
    """A question counts in circular accuracy where every round is right, whatever letter that is."""
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


def test_mmbench_hands_in_every_line(tmp_path):
    """Also one that comes twice: as in the original both have the last answer."""
    row = f"7\tWhich?\t\tcat\tdog\tfox\t\tB\tanimal\t{picture('RGB')}\tmade up\tperception\t\tdev"
    items, _ = SETS["mmbench"].read(mmbench_table(tmp_path / "mmbench", row, row), False)
    header, *lines = mmbench.cells(rows_of(items, ["A", "B"]))
    assert [line[header.index("prediction")] for line in lines] == ["B", "B"]


def test_activitynet_pairs_by_id(official):
    """Answers in another order than the questions go to other questions in the original."""
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
    """Each of the two keeps its own answer; answers beyond the questions are nobody's."""
    folder = official("activitynet_qa")
    for name in ("test_q.json", "test_a.json"):
        entries = json.loads((folder / name).read_text())
        entries[2]["question_id"] = entries[0]["question_id"]
        (folder / name).write_text(json.dumps(entries + entries[-1:] * ("a" in name.removeprefix("test_"))))
    answers = [one["answer"] for one in json.loads((folder / "test_a.json").read_text())]
    for mode in (False, True):
        items, _ = SETS["activitynet_qa"].read(folder, mode)
        assert [item.reference["answer"] for item in items] == answers[: len(items)]


@pytest.mark.parametrize("name", ["pope", "vqav2", "textvqa", "msvd", "activitynet_qa", "video_chatgpt"])
@pytest.mark.parametrize("original", [False, True])
def test_what_could_not_be_asked_is_wrong(official, name, original):
    """Also where the original takes an empty answer for yes; and no judge is asked."""
    items, _ = SETS[name].read(official(name), original)
    rows = [{**row, "error": "cut short"} for row in rows_of(items, [""] * len(items))]
    rows = [row | {"reference": row["reference"] | {"people": ["the"] * 10}} for row in rows]
    judge = ModelJudge("http://127.0.0.1:9", "")
    scores = SETS[name].score(rows, original, *[judge] * SETS[name].is_judged)
    assert scores.items and not any(scores.items.values()) and not judge.counts["calls"]
    assert all(figure.value == 0 for figure in scores.figures.values())


def test_mme_questions_with_blanks_around_them(official):
    """The original cuts them off a line of the benchmark's, and so does what is handed in."""
    folder = official("mme")
    before = SETS["mme"].score(rows_of(items := SETS["mme"].read(folder, True)[0], ["Yes"] * len(items)), True)
    for file in (folder / "MME_Benchmark_release_version").rglob("*.txt"):
        file.write_text("".join(f" {line} \n" for line in file.read_text().splitlines()))
    assert SETS["mme"].score(rows_of(SETS["mme"].read(folder, True)[0], ["Yes"] * len(items)), True) == before


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
    """Half an entry is not judged."""
    items, _ = SETS["video_chatgpt"].read(official("video_chatgpt"), False)
    rows = rows_of(items, ["an answer"] * len(items))[:-1]
    assert SETS["video_chatgpt"].score(rows, False, OfflineJudge()).figures["consistency"].count == 2


def test_the_five_scores_of_a_video_belong_to_it(official):
    """For the comparison of two runs, which draws whole videos."""
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
    """MSVD's own files are called vid7.avi, MSR-VTT's video7.mp4, and their questions say 7."""
    folder = official("msvd")
    lines = json.loads((folder / "test_qa.json").read_text())
    (folder / "test_qa.json").write_text(json.dumps([{**lines[0], "video_id": 101}]))
    assert SETS["msvd"].read(folder, False)[0][0].media.name == "vid101.avi"
    assert SETS["msvd"].read(folder, True)[0][0].media.name == "101.mp4"


@pytest.mark.parametrize("name", sorted(set(SETS) - {"mmbench_rounds"}))
def test_an_empty_folder_says_where_the_set_comes_from(tmp_path, name):
    with pytest.raises(InputError, match=r"holds no .*(\.com|\.co|\.org|\.edu|docs/Evaluation\.md)"):
        SETS[name].read(tmp_path, False)


@pytest.mark.parametrize(
    "name", ["gqa", "vqav2", "pope", "mme", "seed", "scienceqa", "textvqa", "msvd", "video_chatgpt"]
)
def test_files_of_another_form(official, name):
    """Objects where lists are wanted, and entries without their fields, are one line each."""
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
