"""What an answer says of its tokens."""

import jax
import numpy as np
import pytest
from servers import QUESTION, ask, events, video

from llamavid_jax.serving.batch import MOST_LIKELY


def content_of(response, stream: bool = False) -> list[dict]:
    choice = events(response)[-1]["choices"][0] if stream else response.json()["choices"][0]
    return choice["logprobs"]["content"]


def test_logprobs_are_those_of_the_whole_row(tiny_model, client):
    """Of an answer longer than a chunk is, from a pass over prompt and answer at once."""
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
        assert one["top_logprobs"][0]["token"] == one["token"]  # a greedy answer
        assert one["bytes"] is None or bytes(one["bytes"]).decode() == one["token"]


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_drawn_answers(client, stream):
    """Behind a film; without top_logprobs no alternatives, and without logprobs none at all."""
    fields = {"temperature": 1.0, "seed": 3, "stream": stream}
    content = content_of(ask(client, video("clip.mp4"), logprobs=True, **fields), stream)
    assert content and all(one["top_logprobs"] == [] and one["logprob"] <= 0 for one in content)
    most = content_of(ask(client, video("clip.mp4"), logprobs=True, top_logprobs=MOST_LIKELY, **fields), stream)
    assert [one["logprob"] for one in most] == [one["logprob"] for one in content]
    assert any(one["token"] != one["top_logprobs"][0]["token"] for one in most)
    assert ask(client).json()["choices"][0]["logprobs"] is None
