"""One check per recorded set: prompts, written files, scores and judge messages equal the original's."""

import json
from pathlib import Path
from typing import Any

import openpyxl
from recorded_evaluation import (
    Replies,
    check_answers,
    check_frame_table,
    check_picture,
    check_prompt,
    check_replies,
    check_settings,
    check_shards,
    check_video,
    lay_out,
    rounded,
    rows_of,
    texts_of,
    with_rest,
)

from llamavid_jax.evaluation import mmbench, video_chatgpt, video_qa, vqa, vqa_text, yes_no
from llamavid_jax.evaluation.sets import SETS


def check_recording(recording: dict[str, Any], folder: Path) -> None:
    name = recording["set"]
    lay_out(recording, folder)
    checks = {"mmbench": mmbench_set, "video_chatgpt": video_chatgpt_set}
    checks |= dict.fromkeys(("msvd", "msrvtt", "activitynet_qa"), video_set)
    checks.get(name, picture_set)(name, recording, folder)


# ---- image sets


def picture_set(name: str, recording: dict[str, Any], folder: Path) -> None:
    items, rest = SETS[name].read(folder, True)
    prompts = recording["expected_prompts"]
    check_settings(name, prompts["settings"])
    assert len(items) == len(prompts["per_item"])
    for item, recorded in zip(items, prompts["per_item"], strict=True):
        check_prompt(item, recorded)
        check_picture(item, recorded["image_given_to_processor"], SETS[name].original_crops)
        assert item.reference["question_id"] == recorded["question_id"]
    rows = rows_of(items, texts_of(recording["predictions"]))
    check_answers(rows, recording)
    scores = SETS[name].score(with_rest(rows, rest), True)
    SCORES[name](scores, recording["expected_scores"], with_rest(rows, rest))


def gqa(scores, expected, rows) -> None:
    assert json.loads(scores.files["testdev_balanced_predictions.json"]) == expected["converted_predictions_json"]
    assert {name: value == 1 for name, value in scores.items.items()} == expected["correct_per_question"]
    assert scores.figures["accuracy"].value == expected["accuracy"]
    printed = expected["official_printout_values"]
    assert rounded(scores.figures)["accuracy"] == printed["accuracy"]
    for name, value in rounded(scores.groups["answers"]).items():
        assert value == printed[name]
    assert round(scores.counts["distribution (lower is better)"], 2) == printed["distribution"]
    for title in ("structural type", "semantic type", "steps number", "words number"):
        found = {
            name: {"accuracy": round(figure.value, 2), "questions": figure.count}
            for name, figure in scores.groups[title].items()
        }
        assert found == printed[title], title


def vqa_set(scores, expected, rows) -> None:
    """VQAv2 and VizWiz."""
    (upload,) = scores.files.values()
    assert json.loads(upload) == expected["submission_json"]
    for key, figure, values in (
        ("accuracy_of_submission", "accuracy", scores.items),
        ("accuracy_of_unprocessed_text", "accuracy of the texts as they are", scores.details["unprocessed"]),
    ):
        if key in expected:
            assert round(scores.figures[figure].value, 2) == expected[key]["overall"]
            found = [round(100 * values[str(one["question_id"])], 2) for one in expected[key]["per_question"]]
            assert found == [one["accuracy"] for one in expected[key]["per_question"]]
    for title, key in (("answer type", "per_answer_type"), ("question type", "per_question_type")):
        if key in expected["accuracy_of_submission"]:
            assert rounded(scores.groups[title]) == expected["accuracy_of_submission"][key]
    for row in expected.get("answer_normalisation", ()):
        assert vqa_text.for_upload(row["input"]) == row["submission_processor"]
        assert vqa_text.official(row["input"]) == row["official_vqa_eval_punct_then_digit_article"]
    if "missing_prediction" in expected:  # crashes the original; ours uploads '' for it
        lost = [{**rows[0], "text": ""}, *rows[1:]]
        (upload,) = vqa.score_vizwiz(lost, True).files.values()
        assert json.loads(upload)[0]["answer"] == "" and len(json.loads(upload)) == len(rows)


def textvqa(scores, expected, rows) -> None:
    assert scores.figures["accuracy"].value == expected["accuracy"] and scores.figures["accuracy"].count == len(rows)
    tables = scores.details["answers' scores"]
    for row, recorded in zip(rows, expected["per_question"], strict=True):
        assert row["reference"]["question"] == recorded["matched_question"]
        assert scores.items[row["id"]] == recorded["accuracy"] and tables[row["id"]] == recorded["answer_scores"]
    for row in expected["answer_normalisation"]:
        assert vqa_text.for_upload(row["input"]) == row["output"]


def pope(scores, expected, rows) -> None:
    tables = scores.counts["categories"]
    summary = ("f1", "accuracy", "precision", "recall", "yes_ratio")
    for category, recorded in expected["per_category"].items():
        line = ", ".join(f"{tables[category][name]:.3f}" for name in summary)
        assert {**tables[category], "summary_line": line} == recorded
    assert set(tables) == set(expected["per_category"])
    means = [figure.value / 100 for figure in scores.figures.values()]
    for found, name in zip(means, ("mean_f1_of_the_three", "mean_accuracy_of_the_three"), strict=True):
        assert abs(found - expected[name]) < 1e-12
    for row in expected["answer_parsing"]:
        assert yes_no.pope_original(row["text"]) == row["parsed"], row["text"]
    nobody = [{**row, "text": "no"} for row in rows]  # crashes the original
    assert yes_no.score_pope(nobody, True).figures["mean F1 of the categories"].value == 0


def mme(scores, expected, rows) -> None:
    files = {name.removeprefix("eval_tool/"): content.decode() for name, content in scores.files.items()}
    assert files == expected["submission_txt_files"]
    for kind, names in (("Perception", yes_no.PERCEPTION), ("Cognition", yes_no.COGNITION)):
        recorded, printed = expected["by_published_rule"][kind], expected["official_tool_printed"].get(kind)
        assert scores.figures[kind.lower()].value == recorded["total"]
        assert printed is None or printed["total"] == recorded["total"]  # the tool stops at a TAB in an answer
        for name in names:
            found = {key: scores.groups[key][name].value for key in ("acc", "acc_plus", "score")}
            assert found == recorded["tasks"][name], name
            assert printed is None or found["score"] == printed["tasks"][name]
    for row in expected["answer_parsing"]:
        assert yes_no.mme_original(row["answer_lowercased"]) == row["parsed"], row


def seed(scores, expected, rows) -> None:
    def printed(found) -> list[str]:
        tasks = [f"{name}: {figure.value:.2f}%" for name, figure in found.groups["task"].items()]
        total = [f"Total accuracy: {found.figures['accuracy'].value:.2f}%"]
        kinds = [f"{kind} accuracy: {found.figures[f'{kind} accuracy'].value:.2f}%" for kind in ("image", "video")]
        return tasks + total + kinds

    assert printed(scores) == expected["printed"]
    for name in ("total", "image", "video"):
        figure = scores.figures["accuracy" if name == "total" else f"{name} accuracy"]
        assert figure.value == expected[f"{name}_accuracy"]
    found = [{"question_id": name, "correct": value == 1} for name, value in scores.items.items()]
    assert found == expected["per_question"]
    upload = [json.loads(line) for line in scores.files["seed_bench.jsonl"].decode().splitlines()]
    assert upload == expected["submission_jsonl"]
    if "missing_prediction" in expected:  # counts as wrong and crashes the original as it writes; ours omits it
        name = expected["missing_prediction"]["exception"].rsplit(": ", 1)[1].strip("'")
        without = [{**row, "text": None} if row["id"] == name else row for row in rows]
        assert printed(SETS["seed"].score(without, True)) == expected["missing_prediction"]["printed_before_it"]
    if "type_without_right_answer" in expected:  # crashes the original
        number = int(expected["type_without_right_answer"].split(": ")[1])
        wrong = [{**row, "text": "?"} if row["reference"]["type_id"] == number else row for row in rows]
        (kind,) = {row["reference"]["type"] for row in rows if row["reference"]["type_id"] == number}
        assert SETS["seed"].score(wrong, True).groups["task"][kind].value == 0


def scienceqa(scores, expected, rows) -> None:
    pictured, overall = scores.figures["accuracy with picture"], scores.figures["accuracy"]
    assert (overall.value, overall.count) == (expected["accuracy"], expected["count"])
    assert (pictured.value, pictured.count) == (expected["img_accuracy"], expected["img_count"])
    result = json.loads(scores.files["scienceqa_result.json"])
    assert result["acc"] == expected["accuracy"]
    assert (result["correct"], result["results"]) == (expected["correct"], expected["parsed_index"])
    line = f"Total: {overall.count}, Correct: {result['correct']}, Accuracy: {overall.value:.2f}%, IMG-Accuracy: "
    assert f"{line}{pictured.value:.2f}%" == expected["printed"]
    for recorded in expected["per_question"]:
        analysis = scores.details["analyses"][recorded["question_id"]]
        assert {
            "question_id": recorded["question_id"],
            **{name: analysis[name] for name in list(recorded)[1:]},
        } == recorded


SCORES = {"gqa": gqa, "vqav2": vqa_set, "vizwiz": vqa_set, "textvqa": textvqa, "pope": pope, "mme": mme, "seed": seed}
SCORES["scienceqa"] = scienceqa


def mmbench_set(name: str, recording: dict[str, Any], folder: Path) -> None:
    items, _ = SETS[name].read(folder, True)
    chinese, _ = SETS["mmbench_cn"].read(folder, True)
    prompts, expected = recording["expected_prompts"], recording["expected_scores"]
    check_settings(name, prompts["settings"])
    for item, in_chinese, recorded in zip(items, chinese, prompts["per_item"], strict=True):
        check_prompt(item, recorded)
        check_prompt(in_chinese, recorded, "_cn")
        check_picture(item, recorded["image_given_to_processor"], False)
        assert item.reference["options"] == recorded["options"]
    rows = rows_of(items, texts_of(recording["predictions"]))
    letters = {
        "options": lambda row: row["reference"]["options"],
        "option_char": lambda row: row["reference"]["option_char"],
    }
    check_answers(rows, recording, **letters)
    scores = SETS[name].score(rows, True)
    sheet = folder / "upload.xlsx"
    sheet.write_bytes(scores.files["mmbench.xlsx"])
    cells = [[cell.value for cell in row] for row in openpyxl.load_workbook(sheet).active.rows]
    assert cells == expected["submission_xlsx_cells"] == mmbench.cells(rows)
    rotations = [item for item in SETS["mmbench_rounds"].read(folder, True)[0] if item.reference["round"] >= 0]
    for recorded in expected["option_rotation_first_rounds"]:
        (item,) = [
            one
            for one in rotations
            if (one.reference["question_id"], one.reference["round"]) == (recorded["question_id"], recorded["round_id"])
        ]
        fields = item.prompt, item.reference["options"], item.reference["option_char"]
        assert fields == (recorded["prompt"], recorded["options"], recorded["option_char"])
    for row, recorded in zip(rows, expected["letter_extraction_without_a_judge"], strict=True):
        assert (scores.details["extracted"][row["id"]] or False) == recorded["extracted"], row["id"]
        assert (scores.items[row["id"]] == 1) == recorded["hit"]
    assert scores.figures["accuracy"].value == expected["vanilla_accuracy"]
    assert scores.figures["circular accuracy"].value == expected["circular_accuracy"]
    assert scores.details["circular groups"] == expected["circular_groups"]


# ---- video sets


def video_set(name: str, recording: dict[str, Any], folder: Path) -> None:
    items, _ = SETS[name].read(folder, True)
    prompts, expected = recording["expected_prompts"], recording["expected_scores"]
    check_settings(name, prompts["settings"])
    videos = {video["file"]: video for video in recording["items"]["videos"]}
    for item, recorded in zip(items, prompts["per_item"], strict=True):
        check_prompt(item, recorded)
        check_video(item, videos, recorded)
        assert item.reference["question_id"] == recorded.get("question_id", recorded.get("id"))
    rows = rows_of(items, texts_of(recording["predictions"]))
    judge = Replies(expected["judge"]["per_item"])
    scores = SETS[name].score(rows, True, judge)
    assert not judge.left
    predictions = [json.loads(line) for line in scores.files["predictions.json"].decode().splitlines()]
    assert predictions == recording["prediction_file_rows"]
    judgements = json.loads(scores.files["judgements.json"])
    assert judgements == {one["key"]: one["result_file"] for one in expected["judge"]["per_item"]}
    accuracy, average = scores.figures.values()
    counts = scores.counts["yes"], scores.counts["no"]
    assert counts == (expected["judge"]["yes_count"], expected["judge"]["no_count"])
    assert abs(accuracy.value / 100 - expected["judge"]["accuracy"]) < 1e-12
    assert abs(average.value - expected["judge"]["average_score"]) < 1e-12
    if "reply_table" in expected:
        read = video_qa.case(rows[0], True, name == "activitynet_qa").read
        check_replies(expected["reply_table"], read, printed_verdict)
    if "frame_sampling_table" in expected:
        check_frame_table(expected["frame_sampling_table"])
    if "chunking" in expected:
        check_shards(expected["chunking"])


def printed_verdict(verdict) -> list[str]:
    """What the original prints for a single verdict."""
    yes, no = int(verdict.yes is True), int(verdict.yes is False)
    return [
        f"Yes count: {yes}",
        f"No count: {no}",
        f"Accuracy: {yes / (yes + no)}",
        f"Average score: {verdict.score / 1}",
    ]


def video_chatgpt_set(name: str, recording: dict[str, Any], folder: Path) -> None:
    items, _ = SETS[name].read(folder, True)
    videos = {video["file"]: video for video in recording["items"]["videos"]}
    texts: list[str] = []
    for kind in ("generic", "temporal", "consistency"):
        prompts = recording["expected_prompts"][kind]
        check_settings(name, prompts["settings"])
        own = [item for item in items if item.reference["file"] == kind]
        recorded = [
            {**one, "llm_prompt": prompt, "qformer_prompt": question}
            for one in prompts["per_item"]
            for prompt, question in zip(
                one.get("llm_prompts", [one.get("llm_prompt")]),
                one.get("qformer_prompts", [one.get("qformer_prompt")]),
                strict=True,
            )
        ]
        for item, one in zip(own, recorded, strict=True):
            check_prompt(item, one)
            check_video(item, videos, one)
        for one in recording["predictions"][kind]:
            pairs = [("raw_output", "text")] if "text" in one else [("raw_outputs", "text1"), ("raw_outputs", "text2")]
            raws = [one["raw_output"]] if "text" in one else one["raw_outputs"]
            texts += texts_of(
                [{"raw_output": raw, "text": one[key]} for raw, (_, key) in zip(raws, pairs, strict=True)]
            )
    rows, expected = rows_of(items, texts), recording["expected_scores"]
    judge = Replies([one for dimension in video_chatgpt.DIMENSIONS for one in expected[dimension.name]["per_item"]])
    scores = SETS[name].score(rows, True, judge)
    assert not judge.left
    for kind, recorded in recording["prediction_file_rows"].items():
        found = [json.loads(line) for line in scores.files[f"{kind}_predictions.json"].decode().splitlines()]
        assert found == recorded, kind
    for dimension, recorded in expected.items():
        judgements = json.loads(scores.files[f"{dimension}_judgements.json"])
        assert judgements == {one["key"]: one["result_file"] for one in recorded["per_item"]}
        assert abs(scores.figures[dimension].value - recorded["average_score"]) < 1e-12
        (template,) = [one for one in video_chatgpt.DIMENSIONS if one.name == dimension]
        shown = {"q": "", "a": "", "pred": ""}
        title = recorded["printed"][0].split(": ")[0]
        read = video_chatgpt.case(template, shown, True).read
        check_replies(
            recorded.get("reply_table", []), read, lambda verdict, title=title: [f"{title}: {verdict.score / 1}"]
        )
