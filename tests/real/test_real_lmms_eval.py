"""lmms-eval from its wheel (see install.sh), offline: our plug-in with the demo model, our tasks, one of images."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT
from PIL import Image

import llamavid_jax.harness
from llamavid_jax import LLaMAVIDLlavaForConditionalGeneration, LLaMAVIDLlavaProcessor
from llamavid_jax.inference.session import Session
from llamavid_jax.media.video import read_video

pytestmark = pytest.mark.real
MODEL = ROOT / "demo" / "model"
PICTURE_TASK = """
task: local_pictures
dataset_path: json
dataset_kwargs: {data_files: {test: pictures.json}}
test_split: test
output_type: generate_until
doc_to_visual: !function pictures.visual
doc_to_text: question
doc_to_target: answer
generation_kwargs: {max_new_tokens: 4, temperature: 0, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
PICTURE_CODE = "import PIL.Image\ndef visual(doc):\n    return [PIL.Image.open(name) for name in doc['files']]\n"


def evaluate(folder: Path, tasks: str) -> tuple[dict, dict[str, list[dict]]]:
    """Results by task, and the logged questions and answers in the order of the documents."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hub")}
    environment["PYTHONPATH"] = str(Path(sys.prefix) / "lmms_eval")
    settings = ["--model", "llamavid_jax", "--model_args", f"checkpoint={MODEL},dtype=float32", "--batch_size", "3"]
    written = ["--include_path", "tasks", "--output_path", "out", "--log_samples", "--device", "cpu"]
    command = [sys.executable, "-m", "lmms_eval", *settings, *written, "--tasks", tasks]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (results,) = (folder / "out").rglob("*_results.json")
    samples = {}
    for task in tasks.split(","):
        (file,) = (folder / "out").rglob(f"*_samples_{task}.jsonl")
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        samples[task] = sorted(rows, key=lambda row: row["doc_id"])
    assert "not asked: " in done.stderr
    return json.loads(results.read_text())["results"], samples


def test_our_plugin_and_tasks(tmp_path):
    """The answers equal a Session's, for a clip, one image and two; a missing clip fails its own question."""
    shutil.copytree(Path(llamavid_jax.harness.__file__).parent / "tasks", tmp_path / "tasks")
    (tmp_path / "tasks" / "pictures.yaml").write_text(PICTURE_TASK)
    (tmp_path / "tasks" / "pictures.py").write_text(PICTURE_CODE)
    (tmp_path / "video").mkdir()
    shutil.copy(ROOT / "demo" / "held_out.mp4", tmp_path / "video" / "vid7.mp4")
    record = json.loads((ROOT / "demo" / "held_out.json").read_text())
    turns = [turn["value"].removeprefix("<image>\n") for turn in record["conversations"]]
    docs = [
        {"id": place, "video_id": video, "question": question, "answer": answer}
        for place, (video, question, answer) in enumerate(zip([7, 7, 7], turns[::2], turns[1::2], strict=True))
    ]
    docs.append({"id": 3, "video_id": 8, "question": "How many digits appear?", "answer": "1"})
    (tmp_path / "test_qa.json").write_text(json.dumps(docs))
    frames = read_video(ROOT / "demo" / "held_out.mp4").frames
    for second in (1, 6):
        Image.fromarray(frames[second]).save(tmp_path / f"{second}.png")
    pictures = [
        {"files": ["1.png"], "question": "Describe the picture.", "answer": ""},
        {"files": ["1.png", "6.png"], "question": "What colour is the 8?", "answer": ""},
    ]
    (tmp_path / "pictures.json").write_text(json.dumps(pictures))

    results, samples = evaluate(tmp_path, "msvd_qa,local_pictures")
    assert [row["filtered_resps"] for row in samples["msvd_qa"]] == [*turns[1::2], ""]
    assert results["msvd_qa"]["accuracy,none"] == 75.0 and results["msvd_qa"]["score,none"] == 3.75
    model = LLaMAVIDLlavaForConditionalGeneration.from_pretrained(MODEL, dtype="float32")
    processor = LLaMAVIDLlavaProcessor.from_pretrained(MODEL).image_processor
    for doc, row in zip(pictures, samples["local_pictures"], strict=True):
        session = Session(model, processor, images=[str(tmp_path / name) for name in doc["files"]])
        assert row["filtered_resps"] == session.ask(doc["question"], max_new_tokens=4).text
