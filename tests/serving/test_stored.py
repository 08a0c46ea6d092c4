"""A feature file in place of a film: the same answer, with nothing decoded or encoded."""

import json

import pytest
from servers import QUESTION, ask, make_server, picture, session, text_of, video
from starlette.testclient import TestClient

from llamavid_jax.inference.sources import description, video_key
from llamavid_jax.media.feature_file import FeatureWriter
from llamavid_jax.media.image_processor import LLaMAVIDLlavaImageProcessor
from llamavid_jax.media.video import plan_video
from llamavid_jax.text.subtitles import Cue, interleave

CUES = [Cue(1.5, "Hello there")]


@pytest.fixture(scope="module")
def folder(tiny_model, clip, tmp_path_factory):
    """A clip, its features at 1 and 2 fps, and those of a film with subtitles."""
    folder = tmp_path_factory.mktemp("stored")
    (folder / "clip.mp4").write_bytes(clip.read_bytes())
    images = LLaMAVIDLlavaImageProcessor.of(tiny_model.config)
    for name, fps, said in (("one", 1.0, ()), ("two", 2.0, ()), ("film", 1.0, CUES)):
        plan, (pixels, _) = plan_video(clip, fps), images.video_pixels(clip, fps)
        inputs = interleave(plan.times, said) if said else None
        writer = FeatureWriter(folder / f"{name}.mp4.safetensors", len(plan), "F32", inputs or "")
        for frame in tiny_model.vision_features(pixels):
            writer.add(frame)
        writer.commit(description(clip, video_key(clip, fps, tiny_model, images), plan, tiny_model, inputs))
    return folder


@pytest.fixture
def server(tiny_model, engine, folder, tmp_path):
    return make_server(tiny_model, engine, tmp_path / "uploads", media_root=folder)


@pytest.fixture
def client(server):
    return TestClient(server.app)


def test_it_stands_for_its_film(tiny_model, server, client, clip):
    """Below the media folder and uploaded; at its own rate, which need not be given."""
    for name, fps in (("one", 1.0), ("two", 2.0)):
        expected = session(tiny_model, videos=[clip], fps=fps).ask(QUESTION, max_new_tokens=12).text
        source = f"{name}.mp4.safetensors"
        assert text_of(ask(client, video(source))) == text_of(ask(client, video(source), fps=fps)) == expected
    content = (server.preparer.sources.media_root / source).read_bytes()
    made = client.post("/v1/files", files={"file": ("walk", content)}, data={"purpose": "user_data"}).json()
    assert text_of(ask(client, video(made["id"]))) == expected
    assert server.preparer.frames == 0
    seconds = ask(client, video(source), evidence=True).json()["choices"][0]["evidence"][0]["seconds"]
    assert seconds == plan_video(clip, 2.0).times.round(3).tolist()


def test_what_is_said_in_it(tiny_model, client, clip):
    """The request's subtitles replace the file's own; times of frames can be added to both."""
    other = {"subtitles": "1\n00:00:00,500 --> 00:00:03,500\nOther words\n"}
    for fields, cues in (({}, CUES), (other, [Cue(3.5, "Other words")])):
        for times in (None, "frame"):
            chat = session(tiny_model, videos=[clip], subtitles=cues, times=times)
            more = fields | ({"times": times} if times else {})
            expected = chat.ask(QUESTION, max_new_tokens=12).text
            assert text_of(ask(client, video("film.mp4.safetensors"), **more)) == expected


def test_what_is_refused(client, server, folder):
    """The error has the name from the request, and no path of the server."""
    damaged = bytearray((folder / "one.mp4.safetensors").read_bytes())
    damaged[-5] ^= 1
    (folder / "damaged.safetensors").write_bytes(damaged)
    header = json.dumps({"feats": {"dtype": "F32", "shape": [1, 4, 2], "data_offsets": [0, 32]}}).encode()
    (folder / "foreign.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(32))
    image = {"type": "image_url", "image_url": {"url": picture()}}
    for shown, fields, words in (
        ([video("one.mp4.safetensors")], {"fps": 2.0}, "holds 1 frames a second, not 2; leave out fps"),
        (
            [video("one.mp4.safetensors")],
            {"media_io_kwargs": {"video": {"num_frames": 2}}},
            "one.mp4.safetensors holds features of frames that were taken before; leave out num_frames",
        ),
        ([video("film.mp4.safetensors"), image], {}, "goes alone; show nothing else"),
        ([video("damaged.safetensors")], {}, "damaged.safetensors"),
        ([video("foreign.safetensors")], {}, "make it with llamavid-features"),
    ):
        made = ask(client, *shown, **fields)
        message = made.json()["error"]["message"]
        assert made.status_code == 400 and words in message and str(folder) not in message, message
