"""The plug-in against a stand-in for lmms-eval: its requests and batches; tests/real uses the real lmms-eval."""

import dataclasses
import runpy
import sys
import types
from typing import Any

import pytest
from paths import ROOT
from PIL import Image

from llamavid_jax import LLaMAVIDLlavaForConditionalGeneration, LLaMAVIDLlavaImageProcessor
from llamavid_jax.errors import InputError
from llamavid_jax.evaluation.judge import OfflineJudge
from llamavid_jax.inference.session import Session

MODEL, CLIP = str(ROOT / "demo" / "model"), str(ROOT / "demo" / "held_out.mp4")
GREEDY = {"max_new_tokens": 4, "temperature": 0.7, "do_sample": False, "until": ["\n\n"]}


class Chat:
    """lmms-eval's wrapper of `doc_to_messages`."""

    def __init__(self, messages):
        part = {"start_time": None, "end_time": None}
        self.messages = [
            types.SimpleNamespace(content=[types.SimpleNamespace(**part | one) for one in message["content"]])
            for message in messages
        ]

    def extract_media(self):
        parts = [part for message in self.messages for part in message.content]
        return tuple([part.url for part in parts if part.type == kind] for kind in ("image", "video", "audio"))


class Base:
    """lmms-eval's base class of models."""

    def __init__(self):
        self.cache_hook = types.SimpleNamespace(
            kept=[], add_partial=lambda *arguments: self.cache_hook.kept.append(arguments)
        )
        self.task_dict: dict[str, Any] = {}


@pytest.fixture(scope="module")
def plugin():
    names = {"lmms_eval": {}, "lmms_eval.api": {}, "lmms_eval.api.model": {"lmms": Base}}
    names["lmms_eval.protocol"] = {"ChatMessages": lambda messages: Chat(messages)}
    with pytest.MonkeyPatch.context() as patch:
        for name, content in names.items():
            patch.setitem(sys.modules, name, types.ModuleType(name))
            vars(sys.modules[name]).update(content)
        patch.delitem(sys.modules, "llamavid_jax.harness.lmms_eval", raising=False)
        from llamavid_jax.harness import lmms_eval

        yield lmms_eval
        sys.modules.pop("llamavid_jax.harness.lmms_eval", None)


@pytest.fixture(scope="module")
def asked_model(plugin):
    return plugin.LlamaVidJax(MODEL, dtype="float32", batch_size=2, device="cpu")


@dataclasses.dataclass
class Request:
    args: tuple


def requests(model, docs: list[tuple[list[dict], dict]]) -> list[Request]:
    model.task_dict = {"task": {"test": [content for content, _ in docs]}}
    return [
        Request((f"context {place}", lambda doc: [{"role": "user", "content": doc}], settings, place, "task", "test"))
        for place, (_, settings) in enumerate(docs)
    ]


def test_answers_come_in_order_from_batches_of_one_kind(asked_model, monkeypatch):
    """Clips, an image, text alone and other settings; a clip is read once, and a missing one fails its own question."""
    picture = Image.new("RGB", (48, 48), (20, 20, 20))
    clip, lost = {"type": "video", "url": CLIP}, {"type": "video", "url": "absent.mp4"}
    asked = ["What colour is the 8?", "How many digits appear?", "Name the purple digit."]
    docs = [([clip, {"type": "text", "text": question}], GREEDY) for question in asked]
    docs.insert(1, ([{"type": "image", "url": picture}, {"type": "text", "text": "Describe the picture."}], GREEDY))
    docs.insert(2, ([lost, {"type": "text", "text": "What?"}], GREEDY))
    docs.append(([{"type": "text", "text": "What?"}], {"max_new_tokens": 2}))
    batches, read = [], []
    generate, stream = LLaMAVIDLlavaForConditionalGeneration.generate, LLaMAVIDLlavaImageProcessor.stream_video

    def counted(self, ids, **more):
        batches.append((len(ids), more["max_new_tokens"], more["temperature"]))
        return generate(self, ids, **more)

    def streamed(self, video, *arguments, **more):
        read.append(video)
        return stream(self, video, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(LLaMAVIDLlavaForConditionalGeneration, "generate", counted)
        patch.setattr(LLaMAVIDLlavaImageProcessor, "stream_video", streamed)
        answers = asked_model.generate_until(requests(asked_model, docs))
    assert [answers[place] for place in (0, 3, 4)] == ["white", "2", "0"] and answers[2] == ""
    session = Session(asked_model.model, asked_model.image_processor, images=[picture])
    assert answers[1] == session.ask("Describe the picture.", max_new_tokens=4).text
    assert sorted(batches) == [(1, 2, 0.0), (1, 4, 0.0), (1, 4, 0.0), (2, 4, 0.0)] and read.count(CLIP) == 1
    kept = {context: text for _, (context, _), text in asked_model.cache_hook.kept}
    assert kept == {f"context {place}": answers[place] for place in (0, 1, 3, 4, 5)}


@pytest.mark.parametrize(
    "content, settings, says",
    [
        ([{"type": "audio", "url": "a.wav"}, {"type": "text", "text": "?"}], {}, "sound"),
        ([{"type": "video", "url": CLIP, "start_time": 3.0}, {"type": "text", "text": "?"}], {}, "a part of a video"),
        ([{"type": "text", "text": "?"}], {"num_beams": 5}, "5 beams"),
    ],
)
def test_tasks_that_cannot_be_asked_are_said(asked_model, content, settings, says):
    with pytest.raises(InputError, match=says):
        asked_model.generate_until(requests(asked_model, [(content, settings)]))


def test_misspelt_model_arguments_are_refused(plugin):
    with pytest.raises(InputError, match="temprature"):
        plugin.LlamaVidJax(MODEL, temprature=1)


def test_video_tasks(tmp_path, monkeypatch):
    """Videos are found by the sets' numbers, and answers judged as by `llamavid-evaluate`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_URL", raising=False)
    (tmp_path / "video").mkdir()
    (tmp_path / "video" / "vid3.avi").touch()
    task = runpy.run_path(str(ROOT / "llamavid_jax" / "harness" / "tasks" / "utils.py"))
    doc = {"video_id": 3, "question": "who rides?", "answer": "woman"}
    assert task["visual"](doc) == ["video/vid3.avi"] and task["text"](doc) == "who rides?"
    assert isinstance(task["judge"](), OfflineJudge)
    found = [task["results"](doc, [text]) for text in ("A woman.", "a man")]
    assert found == [{"accuracy": 100.0, "score": 5.0}, {"accuracy": 0.0, "score": 0.0}]
    assert task["mean"]([100.0, float("nan"), 0.0]) == 50.0
