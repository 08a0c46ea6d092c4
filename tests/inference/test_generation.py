"""Generation: batches, buckets, stopping, streaming, sampling, and the number of compilations."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from llamavid_jax.checkpoints.weights import abstract_params
from llamavid_jax.inference.generate import decode_block, prefill
from llamavid_jax.models.llama_vid import compress_frames, encode_frames, forward
from llamavid_jax.shapes import IMAGE_TOKEN

VIDEO = [1, 40, 41, IMAGE_TOKEN, 42, 43, 44]
TEXT = [1, 300, 301, 302]
PROMPT = "what is the man doing?"


def frames(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 3, 56, 56)).astype(np.float32)


def full_forward_greedy(model, ids: list[int], count: int, **visuals) -> list[int]:
    """Greedy decoding without a cache: a full forward pass for every token."""
    ids, new = list(ids), []
    for _ in range(count):
        new.append(int(np.argmax(model([ids + new], **visuals).logits[0, -1])))
    return new


@pytest.fixture(scope="module")
def alone(tiny_model):
    """The answer to each row of the ragged batch, asked alone."""
    video = tiny_model.generate(
        [VIDEO], pixel_values=[frames(3)], prompts=[[PROMPT]], max_new_tokens=20, ignore_eos=True
    )
    text = tiny_model.generate([TEXT], max_new_tokens=20, ignore_eos=True)
    return video.token_ids[0], text.token_ids[0]


def test_cache_gives_the_ids_of_whole_rows(tiny_model, alone):
    visuals = {"pixel_values": [frames(3)], "prompts": [[PROMPT]]}
    assert full_forward_greedy(tiny_model, VIDEO, 6, **visuals) == alone[0][:6]
    assert full_forward_greedy(tiny_model, TEXT, 6) == alone[1][:6]
    assert len(set(alone[0])) > 3  # a model that repeats one token would prove little


def test_a_row_does_not_depend_on_its_batch(tiny_model, alone):
    """Video, text-only, two videos and a long row together: every row answers as it does alone."""
    long_row = [1, *range(100, 180)]
    out = tiny_model.generate(
        [VIDEO, TEXT, long_row],
        pixel_values=[frames(3), None, None],
        prompts=[[PROMPT], [], []],
        max_new_tokens=20,
        ignore_eos=True,
    )
    assert (out.token_ids[0], out.token_ids[1]) == alone
    assert out.prompt_tokens == [len(VIDEO) - 1 + 6, 4, 81]
    assert out.visual_tokens == [6, 0, 0]


def test_a_row_does_not_depend_on_its_bucket(tiny_model, alone):
    """More new tokens need a longer cache; the ids stay the same."""
    out = tiny_model.generate([TEXT], max_new_tokens=150, ignore_eos=True)
    assert out.token_ids[0][:20] == alone[1]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side(tiny_model, alone, side):
    padding = len(VIDEO) - len(TEXT)
    padded = [0] * padding + TEXT if side == "left" else TEXT + [0] * padding
    mask = np.ones((2, len(VIDEO)), bool)
    mask[1] = np.array(padded) != 0
    out = tiny_model.generate(
        np.array([VIDEO, padded]),
        attention_mask=mask,
        pixel_values=[frames(3), None],
        prompts=[[PROMPT], []],
        max_new_tokens=20,
        ignore_eos=True,
    )
    assert (out.token_ids[0], out.token_ids[1]) == alone


def test_several_videos_in_one_conversation(tiny_model):
    """A list of videos is paired with the prompts one by one; equal videos give the same as one video for both."""
    ids = [[1, IMAGE_TOKEN, 50, IMAGE_TOKEN, 60]]
    one = frames(2)
    apart = tiny_model(ids, pixel_values=[[one, one]], prompts=[[PROMPT, "how many dogs"]])
    together = tiny_model(ids, pixel_values=[one], prompts=[[PROMPT, "how many dogs"]])
    other = tiny_model(ids, pixel_values=[[one, frames(3, seed=1)]], prompts=[[PROMPT, "how many dogs"]])
    copies = tiny_model(ids, pixel_values=[[one, one.copy()]], prompts=[[PROMPT, "how many dogs"]])
    np.testing.assert_allclose(apart.logits, copies.logits, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(apart.logits, together.logits, rtol=1e-5, atol=1e-5)
    assert other.lengths.tolist() == [3 + 2 * 2 + 2 * 3]


def test_images_and_text_in_one_batch_have_their_own_loss(tiny_model):
    """The loss is the mean over all labels of the batch."""
    labels = [[-100, -100, -100, -100, 42, 43, 44], [-100, 300, 301, 302]]
    both = tiny_model([VIDEO, TEXT], pixel_values=[frames(3), None], prompts=[[PROMPT], []], labels=labels)
    video = tiny_model([VIDEO], pixel_values=[frames(3)], prompts=[[PROMPT]], labels=labels[:1])
    text = tiny_model([TEXT], labels=labels[1:])
    assert float(both.loss) == pytest.approx((float(video.loss) * 3 + float(text.loss) * 3) / 6, rel=1e-5)


def test_ready_features_give_the_tokens_of_pixels(tiny_model):
    """Features of the vision tower with their CLS token replace the pixels; without it the context tokens differ."""
    pixels = frames(40)  # more than one chunk
    features = tiny_model.vision_features(pixels)
    tokens = np.asarray(tiny_model.visual_tokens(pixels, [PROMPT]))
    with_cls = np.asarray(tiny_model.visual_tokens(features=features, prompts=[PROMPT], features_have_cls=True))
    without = np.asarray(tiny_model.visual_tokens(features=features[:, 1:], prompts=[PROMPT]))
    np.testing.assert_allclose(with_cls, tokens, rtol=1e-4, atol=1e-5)
    pairs = tokens.reshape(40, 2, -1), without.reshape(40, 2, -1)
    assert np.abs(pairs[0][:, 0] - pairs[1][:, 0]).max() > 1e-3  # context
    np.testing.assert_allclose(pairs[0][:, 1], pairs[1][:, 1], rtol=1e-4, atol=1e-5)  # content


def test_an_iterator_of_frames_is_a_video(tiny_model):
    """Frames that arrive one by one, in unknown number, give the tokens of the whole array; the table grows."""
    pixels = frames(70)
    streamed = tiny_model.visual_tokens((frame for frame in pixels), [PROMPT, "how many dogs"])
    whole = tiny_model.visual_tokens(pixels, [PROMPT, "how many dogs"])
    assert streamed.shape == (2, 140, 64)
    np.testing.assert_allclose(streamed, whole, rtol=1e-5, atol=1e-6)


def test_end_token_stops_a_row(tiny_model, alone, monkeypatch):
    """Rows end independently; the others continue."""
    eos = alone[1][3]
    text_config = tiny_model.config.text_config
    monkeypatch.setattr(
        tiny_model,
        "config",
        dataclasses.replace(tiny_model.config, text_config=dataclasses.replace(text_config, eos_token_id=eos)),
    )
    out = tiny_model.generate([VIDEO, TEXT], pixel_values=[frames(3), None], prompts=[[PROMPT], []], max_new_tokens=20)
    assert out.token_ids[1] == alone[1][: alone[1].index(eos)]
    expected = alone[0][: alone[0].index(eos)] if eos in alone[0] else alone[0]
    assert out.token_ids[0] == expected


def test_stop_strings_and_streaming(tiny_model, alone):
    """The text ends before the stop string, and the streamer shows that text and no more."""
    text = tiny_model.tokenizer.decode(alone[1])
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    pieces: list[tuple[int, str]] = []
    out = tiny_model.generate(
        [TEXT], max_new_tokens=20, ignore_eos=True, stop=stop, streamer=lambda row, new: pieces.append((row, new))
    )
    assert out.texts[0] == text[: text.index(stop)]
    assert "".join(new for _, new in pieces) == out.texts[0]
    whole: list[str] = []
    out = tiny_model.generate([TEXT], max_new_tokens=20, ignore_eos=True, streamer=lambda _, new: whole.append(new))
    assert "".join(whole) == out.texts[0] == text


def test_sampling_follows_its_seed(tiny_model):
    """The same seed draws the same ids whatever the batch; another seed draws others."""
    settings = {"max_new_tokens": 12, "temperature": 1.0, "ignore_eos": True}
    first = tiny_model.generate([TEXT], seed=1, **settings).token_ids[0]
    assert tiny_model.generate([TEXT, VIDEO[:3]], seed=1, **settings).token_ids[0] == first
    assert tiny_model.generate([TEXT], seed=2, **settings).token_ids[0] != first
    assert tiny_model.generate([TEXT], seed=1, top_k=1, **settings).token_ids == (
        tiny_model.generate([TEXT], max_new_tokens=12, ignore_eos=True).token_ids
    )


def test_requests_of_one_bucket_compile_once(tiny_model):
    """Other frames, questions, lengths, temperatures and seeds of one bucket compile nothing."""
    compiled = (encode_frames, compress_frames, prefill, decode_block, forward)

    def ask(count: int, question: str, ids: list[int], new: int, **settings) -> None:
        pixels = {"pixel_values": [frames(count)], "prompts": [[question]]}
        tiny_model.generate([ids], **pixels, max_new_tokens=new, ignore_eos=True, **settings)

    ask(5, PROMPT, VIDEO, 17)
    ask(5, PROMPT, VIDEO, 17, temperature=0.7)
    before = [function._cache_size() for function in compiled]
    ask(7, "where", [1, IMAGE_TOKEN, 9], 20)
    ask(2, "which car is at the end of the movie", [*VIDEO, 50, 51], 3, stop=["zz"])
    ask(8, "where", VIDEO, 18, temperature=0.2, top_p=0.7, top_k=5, seed=3)
    assert [function._cache_size() for function in compiled] == before
    ask(5, PROMPT, VIDEO, 100)  # a longer answer compiles another decode step, not another prefill
    assert [function._cache_size() for function in compiled] == [
        n + (f is decode_block) for n, f in zip(before, compiled, strict=True)
    ]


def test_text_only_costs_no_vision_work(tiny_model, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("the vision tower ran for a text-only sample")

    monkeypatch.setattr("llamavid_jax.inference.encode.encode_frames", never)
    monkeypatch.setattr("llamavid_jax.inference.encode.compress_frames", never)
    assert len(tiny_model.generate([TEXT], max_new_tokens=3, ignore_eos=True).token_ids[0]) == 3


def test_tower_once_a_frame_and_qformer_once_a_pair(tiny_model, monkeypatch):
    """Two prompts about 5 frames: the tower encodes 5 frames, the Q-Former 10 pairs."""
    from llamavid_jax.inference import encode

    seen = {"frames": 0, "pairs": 0}

    def tower(structure, params, pixels):
        seen["frames"] += int((np.abs(pixels).sum((1, 2, 3)) > 0).sum())
        return encode_frames(structure, params, pixels)

    def write(table, slot, tokens):
        seen["pairs"] += int((slot[:, 0] < len(table)).sum())
        return table.at[slot].set(tokens, mode="drop")

    monkeypatch.setattr(encode, "encode_frames", tower)
    monkeypatch.setattr(encode, "_write", write)
    tiny_model.visual_tokens(frames(5), [PROMPT, "how many dogs"])
    assert seen == {"frames": 5, "pairs": 10}
    one, other = frames(2), iter(frames(3))
    ids = [[1, *[IMAGE_TOKEN] * 4]]
    tiny_model(ids, pixel_values=[[one, other, one, other]], prompts=[[PROMPT, PROMPT, "who", "who"]])
    assert seen == {"frames": 10, "pairs": 20}


def test_save_and_load(tiny_model, tmp_path, alone):
    """A saved model answers as before."""
    tiny_model.save_pretrained(tmp_path)
    loaded = type(tiny_model).from_pretrained(tmp_path, dtype="float32")
    assert loaded.generate([TEXT], max_new_tokens=8, ignore_eos=True).token_ids[0] == alone[1][:8]


def test_arrays_of_whole_batches_are_taken(tiny_model, alone):
    """One array `[B, F, 3, H, W]`, on the host or the device, is a batch of videos."""
    batch = np.stack([frames(3), frames(3)])
    for pixels in (batch, jnp.asarray(batch)):
        out = tiny_model.generate(
            np.array([VIDEO, VIDEO]),
            pixel_values=pixels,
            prompts=[[PROMPT], [PROMPT]],
            max_new_tokens=5,
            ignore_eos=True,
        )
        assert out.token_ids == [alone[0][:5]] * 2


def test_a_dozen_projector_layers_are_loaded_in_their_order(tiny_model, tmp_path):
    config = dataclasses.replace(tiny_model.config, mm_projector_type="mlp12x_gelu")
    rng = np.random.default_rng(0)
    leaves = abstract_params(config).items()
    params = {path: rng.normal(size=leaf.shape).astype(np.float32) for path, leaf in leaves}
    saved = type(tiny_model)(config, params)
    saved.save_pretrained(tmp_path)
    loaded = type(tiny_model).from_pretrained(tmp_path, dtype="float32")
    for index in range(12):
        kernel = f"visual_tokens.projector.{index}.kernel"
        np.testing.assert_array_equal(loaded.params[kernel], params[kernel])


def test_where_a_question_looks(tiny_model):
    """One attention map per frame, the same in chunks as in one piece; another question changes it."""
    side = tiny_model.config.vision_tower_config.image_size
    pixels = np.random.default_rng(0).normal(size=(9, 3, side, side)).astype(np.float32)
    weights = tiny_model.context_attention(pixels, "what is the man doing?")
    assert weights.shape == (9, 4, 4) and weights.min() >= 0
    np.testing.assert_allclose(weights.sum((1, 2)), 1, rtol=1e-5)
    np.testing.assert_allclose(
        tiny_model.context_attention(pixels[:1], "what is the man doing?"), weights[:1], rtol=1e-4
    )
    assert np.abs(tiny_model.context_attention(pixels, "where") - weights).max() > 1e-4
