"""The shipped model: its size, what it answers about held-out clips, and the picture of `make demo`."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from damage import assert_told_or_harmless
from PIL import Image

from demo import digits, fresh_qformer, questions, show
from demo.evaluate import answers
from demo.make_data import generator, sample
from llamavid_jax import LLaMAVIDLlavaForConditionalGeneration, LLaMAVIDLlavaProcessor
from llamavid_jax.checkpoints.arrays import Arrays
from llamavid_jax.checkpoints.weights import abstract_params, check_params
from llamavid_jax.config.schema import LLaMAVIDLlavaConfig
from llamavid_jax.inference.draw import TILE
from llamavid_jax.inference.evidence import draw
from llamavid_jax.inference.session import Session
from llamavid_jax.models.llama_vid import attend_frames

DEMO = Path(show.__file__).parent


@pytest.fixture(scope="module")
def shipped():
    model = LLaMAVIDLlavaForConditionalGeneration.from_pretrained(DEMO / "model", dtype="float32")
    return model, LLaMAVIDLlavaProcessor.from_pretrained(DEMO / "model")


def test_it_is_small(shipped):
    size = sum(file.stat().st_size for file in (DEMO / "model").rglob("*") if file.is_file())
    assert size <= 15e6
    parameters = sum(leaf.size for leaf in shipped[0].params.values())
    assert parameters < 10e6 and shipped[0].config.tokens_per_frame == 2


def test_held_out_clips(shipped, tmp_path):
    """New clips with digit images that training never uses; docs/demo.md has the results of the whole set."""
    for folder in ("clips", "long"):
        (tmp_path / folder).mkdir()
    clips = [sample(("instruct_test", 100_000 + number), tmp_path, seed=1) for number in range(24)]
    found = [answer == truth for *_, truth, answer in answers(*shipped, clips, tmp_path, batch=8)]
    assert np.mean(found) >= 0.85, f"{np.mean(found):.0%} of {len(found)}"
    movie = sample(("long_test", 100_000), tmp_path, seed=1)
    asked = {kind: (truth, answer) for _, kind, _, truth, answer in answers(*shipped, [movie], tmp_path, batch=1)}
    assert asked["colour"][0] == asked["colour"][1]


def test_a_flipped_bit_of_its_weights(tmp_path):
    """One flip in each file, read as by `from_pretrained`; files outside weights/ have no checksums."""
    shutil.copytree(DEMO / "model/weights", tmp_path / "weights")
    config = LLaMAVIDLlavaConfig.from_pretrained(DEMO / "model")
    shapes = {path: value.shape for path, value in abstract_params(config).items()}

    def read() -> dict[str, np.ndarray]:
        arrays = Arrays(tmp_path / "weights")
        check_params(tmp_path, arrays, shapes)
        return {path: arrays.read(path) for path in arrays}

    assert_told_or_harmless(tmp_path, read, least=140)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["evaluate", str(DEMO / "model"), "no.json"], "no.json does not exist"),
        (["evaluate", str(DEMO / "model"), "chat.json"], "chat.json does not say of what type questions are"),
        (["fresh_qformer", "nowhere", "out"], "nowhere/config.json does not exist"),
    ],
)
def test_wrong_arguments_are_one_line(tmp_path, arguments, says):
    (tmp_path / "chat.json").write_text('[{"id": 1, "conversations": []}]')
    (tmp_path / "demo").symlink_to(DEMO)
    (tmp_path / "llamavid_jax").symlink_to(DEMO.parent / "llamavid_jax")
    command = [sys.executable, "-m", f"demo.{arguments[0]}", *arguments[1:]]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_the_demo_answers_and_draws(tmp_path, capsys):
    show.main([str(tmp_path / "out" / "demo.png")])
    out = capsys.readouterr().out
    record = json.loads((DEMO / "held_out.json").read_text())
    for turn in record["conversations"][1::2]:
        assert f"model: {turn['value']}\n  truth: {turn['value']}" in out
    picture = np.asarray(Image.open(tmp_path / "out" / "demo.png"))
    assert picture.shape[1] > 8 * TILE and picture.std() > 20


def test_the_context_token_looks_where_the_question_points(shipped):
    """It attends to the digit that the question names, among three in an image."""
    model, processor = shipped
    right = []
    for seed in range(6):
        scene = digits.still(np.random.default_rng(seed), test=True, count=3)
        frame = digits.frame(scene, 0)[None]
        (pixels,) = processor.image_processor(videos=frame)["pixel_values"]
        for event in scene.events:
            weights = model.context_attention(pixels, questions.DIGIT[0].format(who=event.colour))[0]
            places = [[round(at / digits.STEP) - 1 for at in other.path[0]] for other in scene.events]
            looks = [weights[row : row + 2, column : column + 2].sum() for column, row in places]
            right.append(scene.events[int(np.argmax(looks))] is event)
    assert np.mean(right) >= 0.8


def test_a_question_longer_than_the_positions_loses_its_beginning(shipped):
    """The demo's Q-Former has 64 positions; embeddings beyond them would be NaN."""
    model, processor = shipped
    frame = np.zeros((1, 3, 48, 48), np.float32)
    asked = "Is there a zebra behind the trees, or perhaps a crocodile or a hippopotamus? " + questions.CLIP_DIGIT[0]
    assert processor.qformer_tokenizer([asked])[0].shape[1] > 64
    assert np.isfinite(model.visual_tokens(frame, [asked])).all()
    assert np.isfinite(model.context_attention(frame, asked)).all()


def test_questions_of_like_length_share_a_program(shipped):
    frame = np.zeros((1, 3, 48, 48), np.float32)
    before = attend_frames._cache_size()
    for asked in ("Which digit?", "Which digit is the red one?"):
        shipped[0].context_attention(frame, asked)
    assert attend_frames._cache_size() <= before + 1


def test_a_fresh_qformer_is_all_that_changes(shipped, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["fresh_qformer", str(DEMO / "model"), str(tmp_path / "fresh")])
    fresh_qformer.main()
    fresh = LLaMAVIDLlavaForConditionalGeneration.from_pretrained(tmp_path / "fresh", dtype="float32")
    before, after = (model.params for model in (shipped[0], fresh))
    changed = {
        path.split(".kernel")[0].split(".bias")[0] for path in before if not np.array_equal(before[path], after[path])
    }
    assert {path for path in changed if not path.startswith("qformer.")} == {
        "visual_tokens.query_projector",
        "visual_tokens.key_projector",
    }
    assert before.keys() == after.keys()
    frame = np.random.default_rng(0).integers(0, 256, (1, 60, 80, 3)).astype(np.uint8)
    processors = shipped[1], LLaMAVIDLlavaProcessor.from_pretrained(tmp_path / "fresh")
    first, second = (processor.image_processor(videos=frame)["pixel_values"][0] for processor in processors)
    np.testing.assert_array_equal(first, second)


def test_a_fresh_bert_in_the_qformer_s_place(shipped, tmp_path):
    """BERT has a layer that the Q-Former lacks; LLaMA and the vision tower keep the model's weights."""
    fresh_qformer.main([str(DEMO / "model"), str(tmp_path / "fresh"), "--bert-type", "raw_bert"])
    fresh = LLaMAVIDLlavaForConditionalGeneration.from_pretrained(tmp_path / "fresh", dtype="float32")
    assert fresh.config.bert_type == "raw_bert"
    same = {path for path, value in fresh.params.items() if np.array_equal(value, shipped[0].params.get(path))}
    expected = {path for path in shipped[0].params if path.startswith(("llama.", "vision."))}
    assert same >= expected and "visual_tokens.to_memory.kernel" in fresh.params.keys() - same


def test_the_evidence_is_the_right_second(shipped, tmp_path):
    """In ten minutes with one event of 5 seconds, one of the three frames with the largest weights shows the event."""
    model, processor = shipped
    (tmp_path / "long").mkdir()
    right = []
    for number in range(100_000, 100_010):
        record = sample(("long_test", number), tmp_path, seed=1)
        (event,) = digits.long_clip(generator("long_test", number, seed=1), test=True, seconds=600).events
        session = Session(model, processor.image_processor, videos=[tmp_path / record["video"]])
        question = record["conversations"][0]["value"].removeprefix("<image>\n")
        frames = session.ask(question, evidence=True, max_new_tokens=16).evidence
        first = sorted(frames, key=lambda frame: -frame["weight"])[:3]
        right.append(any(event.start <= frame["second"] < event.start + event.seconds for frame in first))
    assert np.mean(right) >= 0.8 and len(frames) == 600
    draw(session, question, session.ask(question, evidence=True)).save(tmp_path / "evidence.png")
    assert np.asarray(Image.open(tmp_path / "evidence.png")).std() > 20
