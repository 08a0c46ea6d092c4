"""The image processor: every form of image and video, and transformers' settings file."""

import json

import numpy as np
import pytest
from clips import index_frame, write_clip
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llamavid_jax.config.parts import CLIP_MEAN, CLIP_STD
from llamavid_jax.errors import ConfigError
from llamavid_jax.media.image_processor import FILE_NAME, VIDEO_FILE, LLaMAVIDLlavaImageProcessor
from llamavid_jax.media.images import normalize, pad_to_square, resize_and_crop
from llamavid_jax.media.source import MediaError
from llamavid_jax.media.video import read_video

PICTURE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
processor = LLaMAVIDLlavaImageProcessor(size=56)


def expected(picture, aspect="pad"):
    picture = pad_to_square(Image.fromarray(picture), CLIP_MEAN) if aspect == "pad" else picture
    return normalize(resize_and_crop(picture, 56)[None], CLIP_MEAN, CLIP_STD)


@pytest.mark.parametrize("aspect", ["pad", "crop"])
def test_every_form_of_a_still(tmp_path, aspect):
    front = LLaMAVIDLlavaImageProcessor(size=56, image_aspect_ratio=aspect)
    path = tmp_path / "a.png"
    Image.fromarray(PICTURE).save(path)
    for images in (PICTURE, [PICTURE], Image.fromarray(PICTURE), path, str(path), [str(path)]):
        output = front(images=images)
        assert len(output["pixel_values"]) == 1 and output["pixel_values"][0].shape == (1, 3, 56, 56)
        np.testing.assert_array_equal(output["pixel_values"][0], expected(PICTURE, aspect))
        np.testing.assert_array_equal(output["timestamps"], [[0.0]])


def test_every_form_of_a_video_is_cropped(tmp_path):
    frames = np.random.default_rng(1).integers(0, 256, (5, 40, 60, 3), dtype=np.uint8)
    reference = np.concatenate([expected(frame, "crop") for frame in frames])
    for videos in (frames, list(frames), [frames], [list(frames)], [Image.fromarray(f) for f in frames]):
        output = processor(videos=videos, fps=2)
        assert len(output["pixel_values"]) == 1
        np.testing.assert_array_equal(output["pixel_values"][0], reference)
        np.testing.assert_array_equal(output["timestamps"][0], [0, 0.5, 1, 1.5, 2])


def test_images_and_videos_together_and_files_in_pieces(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", [index_frame(i) for i in range(60)])
    seen = []
    output = processor(
        images=[PICTURE, PICTURE], videos=[path, str(path)], fps=5, progress=lambda *now: seen.append(now)
    )
    assert [pixels.shape[0] for pixels in output["pixel_values"]] == [1, 1, 12, 12] and len(seen) == 24
    frames = read_video(path, fps=5).frames
    np.testing.assert_array_equal(output["pixel_values"][2], np.concatenate([expected(f, "crop") for f in frames]))
    pieces = list(processor.stream_video(path, fps=5, chunk=5))
    assert [len(pixels) for pixels, _ in pieces] == [5, 5, 2]
    np.testing.assert_array_equal(np.concatenate([pixels for pixels, _ in pieces]), output["pixel_values"][2])
    np.testing.assert_array_equal(np.concatenate([times for _, times in pieces]), output["timestamps"][2])


def test_arrays_of_jax_are_taken():
    import jax.numpy as jnp

    np.testing.assert_array_equal(processor(images=jnp.asarray(PICTURE))["pixel_values"][0], expected(PICTURE))


@pytest.mark.parametrize(
    "arguments",
    [
        {"images": PICTURE.astype(np.float32)},
        {"images": [PICTURE[..., 0]]},
        {"images": [PICTURE[..., :2]]},
        {"images": [np.zeros((0, 5, 3), np.uint8)]},
        {"images": [np.zeros((1, 500, 3), np.uint8)]},
        {"images": [Image.new("F", (5, 5))]},
        {"images": ["missing.png"]},
        {"videos": np.zeros((0, 4, 4, 3), np.uint8)},
        {"videos": [[]]},
        {"videos": PICTURE[None].astype(float)},
        {"videos": PICTURE[None], "fps": 0},
        {"videos": PICTURE[None], "fps": True},
        {"videos": PICTURE[None], "fps": float("inf")},
        {"videos": ""},
        {"videos": ["missing.mp4"]},
        {"images": 3},
        {"images": [None]},
        {"images": {"path": "a.png"}},
        {"images": np.uint8(3)},
        {"videos": [3]},
        {"videos": {"path": "a.mp4"}},
        {"videos": [["missing.png"]]},
    ],
)
def test_media_that_cannot_be_used(arguments):
    with pytest.raises(MediaError, match=r"; (give|use|save|check) "):
        processor(**arguments)


def test_settings_are_stored_as_transformers_stores_clips(tmp_path):
    front = LLaMAVIDLlavaImageProcessor(336, (0.5, 0.4, 0.3), (0.1, 0.2, 0.3), "crop", fps=0.5, num_frames=8)
    front.save_pretrained(tmp_path / "new")
    assert LLaMAVIDLlavaImageProcessor.from_pretrained(tmp_path / "new") == front
    assert {path.name for path in (tmp_path / "new").iterdir()} == {FILE_NAME, VIDEO_FILE}
    stored = {"fps": 0.5, "num_frames": 8, "do_sample_frames": True}
    assert json.loads((tmp_path / "new" / VIDEO_FILE).read_text()) == stored
    theirs = CLIPImageProcessorPil.from_pretrained(tmp_path / "new")(
        images=Image.fromarray(PICTURE), return_tensors="np"
    )
    np.testing.assert_allclose(front(images=PICTURE)["pixel_values"][0], theirs["pixel_values"], atol=1e-5)


@pytest.mark.parametrize(
    ("stored", "asked", "indices"),
    [
        ({}, {}, [0, 5]),
        ({"fps": 2.5}, {}, [0, 2, 4, 6, 8]),
        ({"fps": 2.5}, {"fps": 1}, [0, 5]),
        ({"num_frames": 4}, {}, [0, 2, 5, 7]),
        ({"num_frames": 4}, {"fps": 1}, [0, 5]),
        ({"num_frames": 4}, {"num_frames": 3}, [0, 3, 6]),
        ({"do_sample_frames": False}, {}, list(range(10))),
        ({}, {"do_sample_frames": False}, list(range(10))),
    ],
)
def test_which_frames_are_taken(tmp_path, stored, asked, indices):
    """Ten frames at 5 fps; a number of frames is spread as in transformers."""
    LLaMAVIDLlavaImageProcessor().save_pretrained(tmp_path)
    (tmp_path / VIDEO_FILE).write_text(json.dumps(stored | {"video_processor_type": "of another"}))
    clip = write_clip(tmp_path / "clip.mp4", [index_frame(i) for i in range(10)], rate=5)
    media = LLaMAVIDLlavaImageProcessor.from_pretrained(tmp_path)(videos=clip, **asked)
    (about,), (pixels,) = media["video_metadata"], media["pixel_values"]
    assert about.frames_indices.tolist() == indices and len(pixels) == len(indices)
    assert (about.fps, about.total_num_frames, about.duration) == (5, 10, 2)
    np.testing.assert_allclose(about.timestamps, np.array(indices) / 5)
    assert media["timestamps"][0] is about.timestamps


@pytest.mark.parametrize("values", [{"fps": 0}, {"fps": "1"}, {"num_frames": 0}, {"do_sample_frames": 1}, "", "[]"])
def test_bad_settings_of_sampling(tmp_path, values):
    LLaMAVIDLlavaImageProcessor().save_pretrained(tmp_path)
    (tmp_path / VIDEO_FILE).write_text(values if isinstance(values, str) else json.dumps(values))
    with pytest.raises(ConfigError, match=VIDEO_FILE):
        LLaMAVIDLlavaImageProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize("asked", [{"num_frames": 11}, {"num_frames": 0}, {"fps": 1, "num_frames": 2}])
def test_frames_that_there_are_not(tmp_path, asked):
    clip = write_clip(tmp_path / "clip.mp4", [index_frame(i) for i in range(10)], rate=5)
    with pytest.raises(MediaError, match="num_frames"):
        processor(videos=clip, **asked)


def test_settings_that_transformers_stored_are_read(tmp_path):
    size = {"height": 336, "width": 336}
    CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=size).save_pretrained(tmp_path)
    assert LLaMAVIDLlavaImageProcessor.from_pretrained(tmp_path) == LLaMAVIDLlavaImageProcessor(size=336)


@pytest.mark.parametrize(
    "values",
    [
        {"crop_size": 224, "size": 224, "feature_extractor_type": "CLIPFeatureExtractor"},
        {"size": {"shortest_edge": 224}, "resample": 3, "do_resize": True},
        {"size": {"height": 224, "width": 224}, "image_mean": [0.48145466, 0.4578275, 0.40821073]},
        {},
    ],
)
def test_older_forms_of_the_settings(tmp_path, values):
    (tmp_path / FILE_NAME).write_text(json.dumps(values))
    assert LLaMAVIDLlavaImageProcessor.from_pretrained(tmp_path) == LLaMAVIDLlavaImageProcessor()


BAD_SETTINGS = [
    "",
    "{",
    "[]",
    "[" * 100_000,
    "\xff",
    {"size": "224"},
    {"size": {"longest_edge": 224}},
    {"size": {"height": 224, "width": 336}},
    {"size": 0},
    {"size": -1},
    {"size": True},
    {"size": 10**9},
    {"size": None},
    {"size": 224, "crop_size": 256},
    {"do_center_crop": False},
    {"do_normalize": None},
    {"resample": 2},
    {"rescale_factor": 1.0},
    {"rescale_factor": "x"},
    {"image_mean": 0.5},
    {"image_mean": None},
    {"image_mean": [0.5, 0.5]},
    {"image_mean": ["a", "b", "c"]},
    {"image_std": [1, 1, 0]},
    {"image_std": [1, 1, float("nan")]},
    {"image_aspect_ratio": "square"},
    {"image_aspect_ratio": 1},
]


@pytest.mark.parametrize("values", BAD_SETTINGS, ids=range(len(BAD_SETTINGS)))
def test_bad_settings_are_named_with_their_file(tmp_path, values):
    text = values if isinstance(values, str) else json.dumps(values)
    (tmp_path / FILE_NAME).write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError) as caught:
        LLaMAVIDLlavaImageProcessor.from_pretrained(tmp_path)
    assert str(tmp_path / FILE_NAME) in str(caught.value)
    if isinstance(values, dict):
        assert next(reversed(values)) in str(caught.value)


def test_a_missing_settings_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=f"{FILE_NAME} does not exist; give the folder of a converted checkpoint"):
        LLaMAVIDLlavaImageProcessor.from_pretrained(tmp_path)
