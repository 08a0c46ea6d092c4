"""An answer's token probabilities, its end, and what happens to it when the client disconnects."""

import asyncio
import itertools
import threading

import jax
import numpy as np
import pytest
from servers import QUESTION, ask, call, events, make_server, text_of, video
from starlette.testclient import TestClient

from llamavid_jax.serving.batch import MOST_LIKELY


def content_of(response, stream: bool = False) -> list[dict]:
    choice = events(response)[-1]["choices"][0] if stream else response.json()["choices"][0]
    return choice["logprobs"]["content"]


def test_logprobs_are_those_of_the_whole_row(tiny_model, client):
    """An answer longer than a chunk has those of one forward pass over prompt and answer."""
    made = ask(client, logprobs=True, top_logprobs=3, max_tokens=48)
    content = content_of(made)
    assert "".join(one["token"] for one in content).strip() == made.json()["choices"][0]["message"]["content"]
    assert len(content) == made.json()["usage"]["completion_tokens"] > 20
    messages = [{"role": "user", "content": QUESTION}]
    from llamavid_jax.text.chat import read_messages

    prompt = tiny_model.tokenizer.encode(read_messages(messages).text("vicuna_v1"))
    given = tiny_model.generate([prompt], max_new_tokens=48).token_ids[0]
    logits = tiny_model([prompt + given]).logits[0, len(prompt) - 1 :][: len(given)]
    every = np.asarray(jax.nn.log_softmax(logits))
    np.testing.assert_allclose([one["logprob"] for one in content], every[np.arange(len(given)), given], atol=1e-3)
    for place, one in enumerate(content):
        values = [other["logprob"] for other in one["top_logprobs"]]
        np.testing.assert_allclose(values, np.sort(every[place])[: -3 - 1 : -1], atol=1e-3)
        assert one["top_logprobs"][0]["token"] == one["token"]  # because the answer is greedy
        assert one["bytes"] is None or bytes(one["bytes"]).decode() == one["token"]


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_drawn_answers(client, stream):
    """About a film; without top_logprobs there are no alternatives, and without logprobs nothing."""
    fields = {"temperature": 1.0, "seed": 3, "stream": stream}
    content = content_of(ask(client, video("clip.mp4"), logprobs=True, **fields), stream)
    assert content and all(one["top_logprobs"] == [] and one["logprob"] <= 0 for one in content)
    most = content_of(ask(client, video("clip.mp4"), logprobs=True, top_logprobs=MOST_LIKELY, **fields), stream)
    assert [one["logprob"] for one in most] == [one["logprob"] for one in content]
    assert any(one["token"] != one["top_logprobs"][0]["token"] for one in most)
    assert ask(client).json()["choices"][0]["logprobs"] is None


def told(client, **fields) -> tuple[str, str]:
    """An answer's text and finish reason; the streamed pieces must give the same."""
    choice = ask(client, **fields).json()["choices"][0]
    pieces = [event["choices"][0] for event in events(ask(client, **fields, stream=True))]
    assert "".join(piece["delta"].get("content", "") for piece in pieces) == choice["message"]["content"]
    assert pieces[-1]["finish_reason"] == choice["finish_reason"]
    return choice["message"]["content"], choice["finish_reason"]


def test_stop_strings_over_any_border(client):
    """Stop strings across blocks, tokens and multi-byte characters: no part of them is sent."""
    drawn = {"temperature": 1.0, "max_tokens": 40}
    texts = [(seed, text_of(ask(client, seed=seed, **drawn))) for seed in range(5)]
    seed, text = max(texts, key=lambda pair: sum(len(letter.encode()) > 2 for letter in pair[1][:-4]))
    assert any(len(letter.encode()) > 2 for letter in text)
    wide = max(range(4, len(text) - 8), key=lambda at: len(text[at].encode()))  # a multi-byte character
    for at, length in itertools.product((wide, *range(5, len(text) - 8, len(text) // 2)), (1, 6)):
        stop = text[at:][:length]
        if stop.strip() == stop:  # spaces around an answer are stripped, so their number is unknown
            expected = text[: text.index(stop)].strip(), "stop"
            assert told(client, seed=seed, stop=[stop + "\0", stop], **drawn) == expected
    # the beginning of a stop string is held back, and sent once the text continues differently
    assert told(client, seed=seed, stop=[text[wide:][:6] + "\0", text[-6:] + "\0"], **drawn)[0] == text


def test_one_stop_string_inside_another(client):
    """The one completed first ends the answer; if one token completes both, the one that starts first."""
    drawn = {"temperature": 1.0, "max_tokens": 40, "seed": 3}
    text = text_of(ask(client, **drawn))
    for at in range(3, len(text) - 8, len(text) // 4):
        outer, inner = text[at : at + 6], text[at + 2 : at + 4]
        if outer.strip() == outer and inner.strip() == inner:
            found, why = told(client, stop=[outer, inner], **drawn)
            assert why == "stop" and found in (text[: text.index(outer)].strip(), text[: text.index(inner)].strip())
            assert told(client, stop=[inner, outer], **drawn) == (found, why)


def test_a_client_that_goes_in_the_middle_of_its_stream(tiny_model, engine, tmp_path, monkeypatch):
    """Its slot goes to a waiting request; the answers beside it continue and equal those asked alone."""
    server = make_server(tiny_model, engine, tmp_path)
    client, left, begun = TestClient(server.app), threading.Event(), threading.Event()
    questions = ["how many dogs", "hello", "why " * 60, "who goes there"]

    def put(question: str, found: dict[str, str]) -> None:
        pieces = events(ask(client, messages=[{"role": "user", "content": question}], max_tokens=40, stream=True))
        found[question] = "".join(piece["choices"][0]["delta"].get("content", "") for piece in pieces)

    alone: dict[str, str] = {}
    for question in questions:
        put(question, alone)
    tell, told_nobody = engine._tell, []

    def waits(one, *arguments):
        if one.job.settings.max_new_tokens == 48 and one.new >= 8:  # it has sent something, and is not at its end
            begun.set()
            assert left.wait(60)
        if one.job.cancelled:
            told_nobody.append(one.new)
        return tell(one, *arguments)

    monkeypatch.setattr(engine, "_tell", waits)
    body = {"model": "tiny", "messages": [{"role": "user", "content": QUESTION}], "stream": True, "max_tokens": 48}

    def goes() -> None:
        asyncio.run(call(server, body, lambda _: begun.is_set()))
        left.set()

    found: dict[str, str] = {}
    threads = [threading.Thread(target=goes)]
    threads += [threading.Thread(target=put, args=(question, found)) for question in questions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == alone and server.answers == 0
    assert engine.counts == {"waiting": 0, "prefilling": 0, "running": 0}
    assert len(told_nobody) == 1  # the piece that was being sent at the disconnect
