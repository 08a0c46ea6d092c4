"""Recordings of the original's evaluation: laid out as a set's official folder, and compared with ours."""

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamavid_jax.config.parts import CLIP_MEAN
from llamavid_jax.errors import InputError
from llamavid_jax.evaluation.answers import as_row, by_media, clean, llm_prompt
from llamavid_jax.evaluation.identity import settings
from llamavid_jax.evaluation.items import Item
from llamavid_jax.evaluation.judge import ATTEMPTS
from llamavid_jax.evaluation.llava import answers_file
from llamavid_jax.evaluation.replies import UnreadError, Verdict
from llamavid_jax.evaluation.sets import SETS
from llamavid_jax.media.images import open_image, pad_to_square
from llamavid_jax.media.source import fetch
from llamavid_jax.media.timeline import MediaError, Timeline, sample

MODEL = "llama-vid-7b-full-336"
QUESTION_FILES = {
    "gqa": ("llava_gqa_testdev_balanced.jsonl", "images"),
    "vqav2": ("llava_vqav2_mscoco_test-dev2015.jsonl", "test2015"),
    "vizwiz": ("llava_test.jsonl", "test"),
    "textvqa": ("llava_textvqa_val_v051_ocr.jsonl", "train_images"),
    "pope": ("llava_pope_test.jsonl", "val2014"),
    "mme": ("llava_mme.jsonl", "MME_Benchmark_release_version"),
    "seed": ("llava-seed-bench.jsonl", "."),
    "scienceqa": ("llava_test_CQM-A.json", "images/test"),
}
OTHER_FILES = {
    "gqa": {"questions_json": "data/testdev_balanced_questions.json"},
    "vqav2": {
        "test2015_file_jsonl": "llava_vqav2_mscoco_test2015.jsonl",
        "annotations_json": "v2_mscoco_val2014_annotations.json",
    },
    "vizwiz": {"annotations_json": "val.json"},
    "textvqa": {"annotations_json": "TextVQA_0.5.1_val.json"},
    "seed": {"SEED-Bench_json": "SEED-Bench.json"},
    "scienceqa": {"problems_json": "problems.json", "pid_splits_json": "pid_splits.json"},
    "msvd": {"test_qa_json": "test_qa.json"},
    "msrvtt": {"test_qa_json": "test_qa.json"},
    "activitynet_qa": {"test_q_json": "test_q.json", "test_a_json": "test_a.json"},
    "video_chatgpt": {f"{kind}_qa_json": f"{kind}_qa.json" for kind in ("generic", "temporal", "consistency")},
}
VIDEO_FOLDERS = {"msvd": "video", "msrvtt": "video", "activitynet_qa": "all_test", "video_chatgpt": "Test_Videos"}


def lay_out(recording: dict[str, Any], folder: Path) -> Path:
    """Writes the recorded items as their set's official folder; the video files contain one byte."""
    name, items = recording["set"], recording["items"]
    files = {target: json.dumps(items[key]) for key, target in OTHER_FILES.get(name, {}).items() if "jsonl" not in key}
    files |= {target: lines(items[key]) for key, target in OTHER_FILES.get(name, {}).items() if "jsonl" in key}
    if name in QUESTION_FILES:
        file, pictures = QUESTION_FILES[name]
        has_lines = "question_file_jsonl" in items
        files[file] = lines(items["question_file_jsonl"]) if has_lines else json.dumps(items["question_file_json"])
        for picture, content in items["images"].items():
            write(folder / pictures / picture, base64.b64decode(content["png_base64"]))
    for file, content in items.get("annotation_files", {}).items():
        files[f"coco/{file}"] = lines(content)
    for file, content in items.get("benchmark_txt_files", {}).items():
        files[f"MME_Benchmark_release_version/{file}"] = "\n".join(content) + "\n"
    if name == "mmbench":
        files["mmbench_dev_20230712.tsv"] = items["tsv_text"]
        files["mmbench_dev_cn_20231003.tsv"] = items["tsv_text"]
    for video in items.get("videos", ()):
        write(folder / VIDEO_FOLDERS[name] / video["file"], b"-")
    for file, text in files.items():
        write(folder / file, text.encode())
    return folder


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


# ---- prompts, images, frames, settings


def check_settings(name: str, recorded: dict[str, Any]) -> None:
    ours, kwargs = settings(SETS[name], Path("absent"), True, "bfloat16", None), recorded["generate_kwargs"]
    assert (ours["temperature"] > 0) == kwargs["do_sample"]
    assert ours["temperature"] == kwargs["temperature"]
    assert ours["max_new_tokens"] == kwargs["max_new_tokens"]
    assert ours["template"] == recorded["conversation_template"]
    is_cropped = str(recorded.get("image_aspect_ratio", "pad")).startswith("not applied")
    assert (ours["image_aspect_ratio"] == "crop") == is_cropped
    if "pad_colour_rgb" in recorded:
        assert [int(255 * value) for value in CLIP_MEAN] == recorded["pad_colour_rgb"]


def check_prompt(item: Item, recorded: dict[str, Any], suffix: str = "") -> None:
    visuals = 0 if item.media is None else 1
    assert llm_prompt(item.text, "vicuna_v1", visuals) == recorded[f"llm_prompt{suffix}"], item.id
    assert item.question == recorded["qformer_prompt"], item.id


def check_picture(item: Item, given: dict[str, Any] | None, crops: bool) -> None:
    """Compares the image processor's input; by pixel only if the original's is RGB, as ours always is."""
    assert (given is None) == (item.media is None), item.id
    if given is None:
        return
    with fetch(item.media) as path:
        picture = open_image(path)
    picture = picture if crops else pad_to_square(picture, CLIP_MEAN)
    assert list(picture.size) == given["width_height"], item.id
    if given["mode"] == "RGB":
        assert hashlib.sha256(picture.tobytes()).hexdigest() == given["sha256_raw_bytes"], item.id


def sampled(frames: int, fps: float) -> list[int]:
    """The frames sampled from a video with a constant rate."""
    times = np.arange(frames) / fps
    return sample(Timeline(np.arange(frames), times, frames / fps, float(fps)), 1.0).frames.tolist()


def check_video(item: Item, videos: dict[str, dict[str, Any]], recorded: dict[str, Any]) -> None:
    assert item.is_video
    if "video_file" in recorded:
        assert item.media.name == recorded["video_file"], item.id
    video = videos[item.media.name]
    assert sampled(video["frames"], video["avg_fps"]) == recorded["frame_indices"], item.id


def check_frame_table(table: list[dict[str, Any]]) -> None:
    """Where the original crashes (fewer than half a frame a second), ours raises an error with a remedy."""
    for row in table:
        if "exception" in row:
            with pytest.raises(MediaError, match="too few"):
                sampled(row["frames"], row["avg_fps"])
        else:
            assert sampled(row["frames"], row["avg_fps"]) == row["frame_indices"]


def check_shards(table: list[dict[str, Any]]) -> None:
    """With any number of parts ours hold every item exactly once; the original loses chunks."""
    for row in table:
        items = [Item(str(n), "", "", "", None, False, {}) for n in range(row["items"])]
        groups = by_media(items)
        parts = [groups[part :: row["chunks"]] for part in range(row["chunks"])]
        assert sorted(place for part in parts for group in part for place in group) == list(range(row["items"]))


# ---- rows and scores


def rows_of(items: list[Item], texts: list[str]) -> list[dict[str, Any]]:
    """The rows of answers.jsonl, after a round trip through JSON."""
    made = [as_row(item, place, text) for place, (item, text) in enumerate(zip(items, texts, strict=True))]
    return json.loads(json.dumps(made))


def with_rest(rows: list[dict[str, Any]], rest: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [*rows, *json.loads(json.dumps([{**row, "index": len(rows), "media": None} for row in rest]))]


def check_answers(rows: list[dict[str, Any]], recording: dict[str, Any], **more: Any) -> None:
    """Compares the answer file with that of the original's script."""
    found = [json.loads(line) for line in answers_file(rows, MODEL, **more).decode().splitlines()]
    assert found == recording["answers_file_rows"]


def texts_of(predictions: list[dict[str, Any]]) -> list[str]:
    """The cleaned texts of the model's raw outputs."""
    texts = [clean(one["raw_output"]) for one in predictions]
    assert texts == [one["text"] for one in predictions]
    return texts


def rounded(figures: dict[str, Any], digits: int = 2) -> dict[str, Any]:
    return {name: round(figure.value, digits) for name, figure in figures.items()}


class Replies:
    """A judge that gives recorded replies and checks the messages it receives."""

    name = "recorded"

    def __init__(self, per_item: list[dict[str, Any]]):
        self.left = list(per_item)
        self.counts: dict[str, int] = {}

    def verdicts(self, cases: list[Any]) -> list[Verdict | None]:
        return [self.one(case) for case in cases]

    def one(self, case: Any) -> Verdict | None:
        places = [place for place, one in enumerate(self.left) if one["messages"] == case.messages]
        assert places, f"the original sends no such message: {case.messages}"
        recorded = self.left.pop(places[0])
        assert recorded["model"] == "gpt-3.5-turbo" and not recorded["other_arguments"]
        calls, verdict = 0, None
        for reply in recorded["replies_given"][:ATTEMPTS]:
            calls += 1
            try:
                verdict = case.read(reply)
                break
            except UnreadError as unread:
                if unread.is_final:
                    break
        assert calls == min(recorded["calls_made"], ATTEMPTS)
        return verdict


def check_replies(table: list[dict[str, Any]], read: Any, score: Any) -> None:
    """A reply on its own: accepted or asked for again, and what the scoring makes of it.

    Where the original's scoring stops at an accepted reply, ours counts a failure; one whose word is neither yes nor no
    leaves only its score, where the original divides by zero.
    """
    for row in table:
        try:
            verdict, asks_again = read(row["reply"]), False
        except UnreadError as unread:
            verdict, asks_again = None, not unread.is_final
        is_accepted = (
            row.get("accepted") or "broken_result_file" in row
        )  # a set: cut off in its file, and never asked again
        assert asks_again == (not is_accepted), row["reply"]
        if verdict is not None:
            assert verdict.reply == row["parsed"], row["reply"]
        scoring = row.get("scoring")
        if isinstance(scoring, list):
            assert verdict is not None and score(verdict) == scoring, row["reply"]
        elif scoring is not None:
            only_score = "ZeroDivisionError" in scoring["exception"] and verdict is not None and verdict.yes is None
            assert verdict is None or only_score, row["reply"]


def raises_input_error(call: Any) -> None:
    with pytest.raises(InputError):
        call()
