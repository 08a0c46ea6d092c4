"""Repeated questions, from a cache or a feature file: the answer uses the video's own features and no others."""

import errno
import multiprocessing
import os
import pickle
import shutil
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from clips import index_frame, write_clip
from paths import ROOT

from llamavid_jax import LLaMAVIDLlavaForConditionalGeneration, LLaMAVIDLlavaImageProcessor
from llamavid_jax.errors import InputError
from llamavid_jax.inference import sources
from llamavid_jax.inference.evidence import draw
from llamavid_jax.inference.feature_cache import FeatureCache
from llamavid_jax.inference.film import Reading
from llamavid_jax.inference.session import Session
from llamavid_jax.inference.sources import video_key
from llamavid_jax.media import feature_file
from llamavid_jax.media.feature_file import FeatureWriter
from llamavid_jax.media.features import describe, iter_features
from llamavid_jax.text.subtitles import Cue

CLIP = str(ROOT / "demo" / "space.mp4")
IMAGES = LLaMAVIDLlavaImageProcessor(56)
SHORT = {"max_new_tokens": 8}


@pytest.fixture
def encoded(tiny_model, monkeypatch) -> list[int]:
    """The number of frames in each chunk that the tower encoded for the cache."""
    counts, chunks = [], type(tiny_model).feature_chunks

    def counted(model, pixels):
        for chunk in chunks(model, pixels):
            counts.append(len(chunk))
            yield chunk

    monkeypatch.setattr(type(tiny_model), "feature_chunks", counted)
    return counts


@pytest.fixture
def clip(tmp_path) -> str:
    return str(write_clip(tmp_path / "clip.mp4", [index_frame(i) for i in range(5)], rate=1))


def asked(model, video, cache=None, images=IMAGES, question="what is it?", **more):
    """The ids and visual tokens of one question."""
    ids, tokens = Session(model, images, videos=[video], cache=cache, follow_ups=False, **more).inputs(question)
    return ids, [array.tobytes() for array in tokens]


def entries(folder) -> list[str]:
    return sorted(name for name in os.listdir(folder) if name.endswith(".safetensors"))


@pytest.mark.parametrize("follow_ups", [False, True])
def test_the_second_question_needs_no_tower(tiny_model, encoded, tmp_path, follow_ups):
    """Another session, as on another day, gives the same answer to the last bit."""
    cache, seen, answers = FeatureCache(tmp_path / "cache"), [], []
    for _ in range(2):
        session = Session(
            tiny_model,
            IMAGES,
            videos=[CLIP],
            cache=cache,
            follow_ups=follow_ups,
            progress=lambda *told: seen.append(told),
        )
        answers.append(session.ask("what is in the video?", **SHORT))
    assert encoded == [12] and len(entries(tmp_path / "cache")) == 1
    assert seen == [(CLIP, number, 12) for number in range(1, 13)] * 2
    first, second = ({**vars(answer), "seconds": None} for answer in answers)
    assert first == second and second["sampling"] == [
        {"video": CLIP, "rule": "stride", "frames": 12, "times": list(range(12))}
    ]
    plain = Session(tiny_model, IMAGES, videos=[CLIP]).ask("what is in the video?", **SHORT)
    assert {**vars(plain), "seconds": None} == second
    assert asked(tiny_model, CLIP, cache) == asked(tiny_model, CLIP)


@pytest.mark.parametrize("reading", [Reading(), Reading(fast=True)])
def test_the_evidence_of_kept_frames_shows_the_same_picture(tiny_model, encoded, tmp_path, reading):
    """The file is read again for the images, at the seconds that were sampled the first time."""
    cache, pictures = FeatureCache(tmp_path / "cache"), []
    for kept in (None, cache, cache):
        session = Session(tiny_model, IMAGES, videos=[CLIP], fps=0.7, reading=reading, cache=kept)
        pictures.append(np.asarray(draw(session, "who?", session.ask("who?", evidence=True, **SHORT))))
    assert encoded == [9, 8, 9, 8, 8]  # all frames, then those drawn as evidence
    assert all(np.array_equal(picture, pictures[0]) for picture in pictures)


def test_subtitles_stand_between_the_kept_frames(tiny_model, clip, encoded, tmp_path):
    cache, cues = FeatureCache(tmp_path / "cache"), [Cue(1.5, "Hello."), Cue(3.0, "Bye.")]
    for more in ({}, {"times": "frame"}):
        plain = asked(tiny_model, clip, subtitles=cues, **more)
        assert [asked(tiny_model, clip, cache, subtitles=cues, **more) for _ in range(2)] == [plain] * 2
    assert encoded == [5]


def test_found_by_content_and_by_nothing_else(tiny_model, clip, encoded, tmp_path):
    """A copy is found; a changed file of the same name, size and time is not, nor is another sampling or processing."""
    cache = FeatureCache(tmp_path / "cache")
    first = asked(tiny_model, clip, cache)
    shutil.copy(clip, tmp_path / "copy.mkv")
    assert asked(tiny_model, str(tmp_path / "copy.mkv"), cache) == first and encoded == [5]

    asked(tiny_model, clip, cache, fps=0.5)
    assert encoded == [5, 3]
    for images in (LLaMAVIDLlavaImageProcessor(56, (0.0,) * 3), LLaMAVIDLlavaImageProcessor(56, image_std=(1.0,) * 3)):
        assert asked(tiny_model, clip, cache, images) == asked(tiny_model, clip, None, images) != first
    assert encoded == [5, 3, 5, 5]

    before, data = os.stat(clip), bytearray((tmp_path / "clip.mp4").read_bytes())
    write_clip(tmp_path / "clip.mp4", [index_frame(i + 700) for i in range(5)], rate=1)
    size = os.path.getsize(clip)
    with open(clip, "ab") as file:  # MPEG-4 readers skip the appended bytes as an unknown box
        file.write(bytes(max(0, len(data) - size)))
    os.utime(clip, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert asked(tiny_model, clip, cache) == asked(tiny_model, clip) != first and encoded[4:] == [5]


def other(model, change, **more):
    params = {name: change(name, value) for name, value in model.params.items()}
    tokenizers = {"tokenizer": model.tokenizer, "qformer_tokenizer": model.qformer_tokenizer}
    return LLaMAVIDLlavaForConditionalGeneration(model.config, params, **tokenizers, **more)


def nudged(name, value):
    """Changes one weight of the tower by the smallest float32 step."""
    if not name.startswith("vision.blocks.attn") or not name.endswith("out.kernel"):
        return value
    return value.at[(0,) * value.ndim].set(np.nextafter(value[(0,) * value.ndim], np.float32(9)))


def test_another_tower(tiny_model, clip, encoded, tmp_path):
    cache = FeatureCache(tmp_path / "cache")
    asked(tiny_model, clip, cache)
    changed = other(tiny_model, nudged)
    assert changed.tower.exact() != tiny_model.tower.exact()
    asked(changed, clip, cache)
    assert encoded == [5, 5]
    half = other(tiny_model, lambda _, value: value.astype(jnp.bfloat16), dtype="bfloat16")
    assert asked(half, clip, cache) == asked(half, clip, cache) and encoded == [5, 5, 5]
    assert half.tower.rounded() == half.tower.exact() == tiny_model.tower.rounded()
    words = other(tiny_model, lambda name, value: value if name.startswith("vision.") else value + 1)
    asked(words, clip, cache)  # another language model on the same tower
    assert encoded == [5, 5, 5]


def test_weights_that_are_exchanged_later_are_noticed(tiny_model, clip, encoded, tmp_path):
    cache, model = FeatureCache(tmp_path / "cache"), other(tiny_model, lambda _, value: value)
    asked(model, clip, cache)
    model.params = other(model, nudged).params
    asked(model, clip, cache)
    assert encoded == [5, 5]


@pytest.mark.parametrize("place", [0.02, 0.2, 0.6, 0.9, 0.999])
def test_a_flipped_byte_costs_the_entry_and_nothing_else(tiny_model, encoded, tmp_path, place):
    """40 frames, so that some have been used before the damage is found."""
    clip = str(write_clip(tmp_path / "clip.mp4", [index_frame(i) for i in range(40)], rate=1))
    cache = FeatureCache(tmp_path / "cache")
    first = asked(tiny_model, clip, cache)
    path = tmp_path / "cache" / entries(tmp_path / "cache")[0]
    data = bytearray(path.read_bytes())
    at = int(place * len(data))
    while data[at] == 0x20:  # the padding after the header is not checked
        at += 1
    data[at] ^= 0x10
    path.write_bytes(data)
    session = Session(tiny_model, IMAGES, videos=[clip], cache=cache)
    assert session.encode() == 40 and encoded == [32, 8] * 2
    assert asked(tiny_model, clip, cache) == first and encoded == [32, 8] * 2


@pytest.mark.parametrize("content", [0.3, 0.9, b"", b"x", b"PK\3\4", b"\0" * 5000, pickle.dumps({"feats": 1})])
def test_a_torn_entry_is_made_again(tiny_model, clip, encoded, tmp_path, content):
    """Content that is cut off, or something else entirely."""
    cache = FeatureCache(tmp_path / "cache")
    first = asked(tiny_model, clip, cache)
    path = tmp_path / "cache" / entries(tmp_path / "cache")[0]
    whole = path.read_bytes()
    path.write_bytes(whole[: int(content * len(whole))] if isinstance(content, float) else content)
    assert asked(tiny_model, clip, cache) == first == asked(tiny_model, clip, cache) and encoded == [5, 5]


def test_an_entry_under_the_name_of_another_is_not_taken(tiny_model, clip, encoded, tmp_path):
    cache = FeatureCache(tmp_path / "cache")
    first = asked(tiny_model, clip, cache)
    asked(tiny_model, clip, cache, fps=0.5)
    one, two = (tmp_path / "cache" / name for name in entries(tmp_path / "cache"))
    whole, half = (one, two) if len(list(iter_features(one))) == 5 else (two, one)
    shutil.copy(half, whole)
    assert asked(tiny_model, clip, cache) == first and encoded == [5, 3, 5]


def test_those_not_used_for_longest_go_first(tiny_model, tmp_path, encoded):
    clips = [
        str(write_clip(tmp_path / f"{number}.mp4", [index_frame(number * 9 + i) for i in range(5)], rate=1))
        for number in range(4)
    ]
    cache = FeatureCache(tmp_path / "cache")
    asked(tiny_model, clips[0], cache)
    size = os.path.getsize(tmp_path / "cache" / entries(tmp_path / "cache")[0])
    cache = FeatureCache(tmp_path / "cache", limit=int(2.5 * size))
    others, left_over = {"notes.txt", "walk.mp4.safetensors", "model.safetensors"}, f".{40 * 'a'}.safetensors.1.f.part"
    for name in (*others, left_over):
        (tmp_path / "cache" / name).write_bytes(bytes(3 * size))
        os.utime(tmp_path / "cache" / name, (1, 1))
    for clip in (clips[1], clips[0], clips[2], clips[0], clips[3], clips[0]):
        asked(tiny_model, clip, cache)
        time.sleep(0.01)
    assert encoded == [5] * 4  # the first entry was always used recently enough
    assert len(kept := set(os.listdir(tmp_path / "cache"))) == 5 and others < kept
    asked(tiny_model, clips[1], cache)
    assert encoded == [5] * 5


def test_what_is_larger_than_the_cache_is_not_kept(tiny_model, clip, tmp_path):
    said = []
    assert asked(tiny_model, clip, FeatureCache(tmp_path / "cache", 1000, said.append)) == asked(tiny_model, clip)
    assert len(said) == 1 and "larger than the cache" in said[0] and not (tmp_path / "cache").exists()
    with pytest.raises(InputError, match="give it more than 0"):
        FeatureCache(tmp_path, 0)


@pytest.mark.parametrize("when", ["at once", "frame 3", "the header"])
def test_a_full_disk_is_said_once_and_harms_nothing(tiny_model, clip, tmp_path, monkeypatch, when):
    class Full:
        def __init__(self, file, room):
            self.file, self.room = file, room

        def write(self, data):
            self.room -= 1
            if self.room < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(data)

        def __getattr__(self, name):
            return getattr(self.file, name)

    made = FeatureWriter.__init__

    def full(writer, *arguments):
        made(writer, *arguments)
        writer._file = Full(writer._file, {"at once": 0, "frame 3": 3, "the header": 5}[when])

    monkeypatch.setattr(FeatureWriter, "__init__", full)
    said = []
    cache = FeatureCache(tmp_path / "cache", notice=said.append)
    assert [asked(tiny_model, clip, cache) for _ in range(2)] == [asked(tiny_model, clip)] * 2
    assert said == [f"the cache {tmp_path / 'cache'} cannot be used (No space left on device); going on without it"]
    assert os.listdir(tmp_path / "cache") == []


def test_a_folder_that_cannot_be_made_is_said_once(tiny_model, clip, tmp_path):
    (tmp_path / "file").write_text("no folder")
    said = []
    cache = FeatureCache(tmp_path / "file" / "cache", notice=said.append)
    assert [asked(tiny_model, clip, cache) for _ in range(2)] == [asked(tiny_model, clip)] * 2
    assert len(said) == 1 and "Not a directory" in said[0]


def test_a_video_that_is_written_to_meanwhile_is_not_kept(tiny_model, clip, tmp_path, monkeypatch):
    cache = FeatureCache(tmp_path / "cache")
    session = Session(tiny_model, IMAGES, videos=[clip], cache=cache, progress=lambda *_: os.utime(clip, (1, 1)))
    session.encode()
    assert entries(tmp_path / "cache") == []


def test_an_answer_that_is_broken_off_leaves_nothing(tiny_model, clip, tmp_path):
    def stop(*_):
        raise KeyboardInterrupt

    session = Session(tiny_model, IMAGES, videos=[clip], cache=FeatureCache(tmp_path / "cache"), progress=stop)
    with pytest.raises(KeyboardInterrupt):
        session.encode()
    assert not (tmp_path / "cache").exists() or os.listdir(tmp_path / "cache") == []


def write_often(folder: str, key: dict, value: int) -> None:
    cache = FeatureCache(folder, limit=10_000_000)
    frames = [np.full((5, 4), value, np.float32)] * 3
    said = feature_file.Description(
        True,
        [0.0, 1.0, 2.0],
        {"name": "a"},
        {"fps": 1.0, "rule": "stride", "seconds": 3.0},
        {"size": 56},
        {"sha256": "a"},
    )
    for _ in range(100):
        list(cache.keep(key, iter(frames), lambda: 3, lambda: said))


def test_two_writers_and_a_reader(tmp_path):
    """Two processes write one entry again and again; a read returns all of one of the two."""
    key, seen = {"source": "film"}, set()
    writers = [
        multiprocessing.get_context("spawn").Process(target=write_often, args=(str(tmp_path), key, value))
        for value in (1, 2)
    ]
    cache = FeatureCache(tmp_path)
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        if cache.find(key):
            frames = np.stack(list(cache.frames(key)))
            assert frames.shape == (3, 5, 4) and len(np.unique(frames)) == 1
            seen.add(float(frames[0, 0, 0]))
    assert [writer.exitcode for writer in writers] == [0, 0] and seen and seen <= {1.0, 2.0}
    assert os.listdir(tmp_path) == [cache.path(key).name]


def test_an_entry_that_another_process_takes_away_is_made_again(tiny_model, clip, tmp_path, monkeypatch, encoded):
    cache = FeatureCache(tmp_path / "cache")
    first = asked(tiny_model, clip, cache)
    find = FeatureCache.find

    def found_and_gone(self, key):
        found = find(self, key)
        self.drop(key)
        return found

    monkeypatch.setattr(FeatureCache, "find", found_and_gone)
    assert asked(tiny_model, clip, cache) == first and encoded == [5, 5]


def test_the_rules_of_sampling_are_part_of_the_key(tiny_model, clip, tmp_path, monkeypatch, encoded):
    cache = FeatureCache(tmp_path / "cache")
    asked(tiny_model, clip, cache)
    monkeypatch.setattr(sources, "RULES", sources.RULES + 1)
    asked(tiny_model, clip, cache)
    assert encoded == [5, 5]


# ---- feature files in a session


def film(model, path, video, dtype="F32", inputs=None, fps=1.0, images=IMAGES):
    """A video's feature file, as the cache writes it."""
    cache = FeatureCache(path.parent / "made")
    asked(model, video, cache, images, fps=fps)
    made = path.parent / "made" / cache.path(video_key(Path(video), fps, model, images)).name
    said = describe(made)
    fields = feature_file.Description.__dataclass_fields__
    writer = FeatureWriter(path, len(said["timestamps"]), dtype, inputs or "")
    for frame in iter_features(made, keep_cls=True):
        writer.add(frame)
    writer.commit(feature_file.Description(**{name: said[name] for name in fields} | {"inputs": inputs}))
    return str(path)


def test_a_feature_file_stands_for_its_video(tiny_model, clip, tmp_path, encoded):
    path = film(tiny_model, tmp_path / "f.safetensors", clip)
    cues = [Cue(1.5, "Hello.")]
    encoded.clear()
    assert asked(tiny_model, path) == asked(tiny_model, clip)
    assert asked(tiny_model, path, subtitles=cues) == asked(tiny_model, clip, subtitles=cues)
    session = Session(tiny_model, IMAGES, videos=[path, CLIP])  # with another video, and with a second question
    both = Session(tiny_model, IMAGES, videos=[clip, CLIP])
    for question in ("what?", "who?"):
        assert session.ask(question, **SHORT).text == both.ask(question, **SHORT).text
    assert session.visuals.frames == 17 and encoded == [12, 5, 12]


def test_a_feature_file_has_its_rate(tiny_model, clip, tmp_path):
    path = film(tiny_model, tmp_path / "f.safetensors", clip, fps=0.5)
    assert asked(tiny_model, path) == asked(tiny_model, path, fps=0.5) == asked(tiny_model, clip, fps=0.5)
    with pytest.raises(InputError, match=r"f\.safetensors holds 0\.5 frames a second, not 1; leave out fps"):
        asked(tiny_model, path, fps=1)


def test_a_film_with_what_is_said(tiny_model, clip, tmp_path):
    path = film(tiny_model, tmp_path / "f.safetensors", clip, inputs="<image><image>Hello.<image><image><image>")
    assert asked(tiny_model, path) == asked(tiny_model, clip, subtitles=[Cue(1.5, "Hello.")])
    with pytest.raises(InputError, match="goes alone"):
        Session(tiny_model, IMAGES, videos=[path, clip]).encode()
    wrong = film(tiny_model, tmp_path / "g.safetensors", clip, inputs="<image>" * 4)
    with pytest.raises(InputError, match=r"g\.safetensors: `inputs` has 4 <image> for 5 frames"):
        asked(tiny_model, wrong)


def test_the_originals_file_has_no_cls(tiny_model, clip, tmp_path):
    """The Q-Former sees the patches alone, as the long-video model was trained."""
    features = np.stack(list(iter_features(film(tiny_model, tmp_path / "f.safetensors", clip), keep_cls=True)))
    with (tmp_path / "f.pkl").open("wb") as file:
        pickle.dump({"feats": features, "inputs": "<image>" * 5}, file)
    ids, tokens = Session(tiny_model, IMAGES, videos=[str(tmp_path / "f.pkl")], follow_ups=False).inputs("who?")
    wanted = tiny_model.visual_tokens(features=features[:, 1:], prompts=["who?"])[0]
    np.testing.assert_array_equal(tokens[0], wanted)
    assert ids.count(-200) == 10


def test_int8_is_near(tiny_model, clip, tmp_path):
    path = film(tiny_model, tmp_path / "f.safetensors", clip, dtype="I8")
    whole, near = (
        Session(tiny_model, IMAGES, videos=[video], follow_ups=False).inputs("who?")[1][0] for video in (clip, path)
    )
    assert 0 < np.abs(near - whole).max() < 0.1 * np.abs(whole).max()


def test_a_file_of_another_tower_is_told(tiny_model, clip, tmp_path):
    path = film(tiny_model, tmp_path / "f.safetensors", clip)
    half = other(tiny_model, lambda _, value: value.astype(jnp.bfloat16), dtype="bfloat16")
    asked(half, path)  # the same tower, rounded
    changed = other(tiny_model, lambda name, value: value * 1.01 if name.startswith("vision.") else value)
    with pytest.raises(InputError, match=r"f\.safetensors was made by another vision tower .* make it again"):
        asked(changed, path)
    with pytest.raises(InputError, match=r"f\.safetensors was made of frames that were prepared by .* this model"):
        asked(tiny_model, path, images=LLaMAVIDLlavaImageProcessor(56, (0.0,) * 3))
    np.savez(tmp_path / "g.npz", feats=np.ones((3, 10, 4), np.float16))
    with pytest.raises(InputError, match=r"g\.npz holds 9 patches of 4 numbers a frame, this model takes 16 of"):
        asked(tiny_model, str(tmp_path / "g.npz"))


def test_a_damaged_feature_file_is_told(tiny_model, clip, tmp_path):
    path = film(tiny_model, tmp_path / "f.safetensors", clip)
    data = bytearray((tmp_path / "f.safetensors").read_bytes())
    data[-9] ^= 1
    (tmp_path / "f.safetensors").write_bytes(data)
    with pytest.raises(InputError, match=r"f\.safetensors is no file of features, or damaged .*SHA-256"):
        asked(tiny_model, path)
