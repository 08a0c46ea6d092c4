"""The `openai` client against the server: replies have the types of its models."""

import pytest
from openai import OpenAI, types
from servers import QUESTION, make_server, session, video
from starlette.testclient import TestClient


@pytest.fixture(scope="module")
def openai(client):
    return OpenAI(base_url="http://testserver/v1", api_key="none", http_client=client, max_retries=0)


def checked(answer):
    """Returns the answer if its fields have the types of OpenAI's schema, which the client does not check."""
    return type(answer).model_validate(answer.model_dump(warnings=False), strict=True)


def test_files_models_and_parts(openai, clip):
    about = checked(openai.files.create(file=clip, purpose="user_data"))
    assert checked(openai.files.retrieve(about.id)) == about and about in openai.files.list().data
    assert openai.files.content(about.id).read() == clip.read_bytes()
    done = checked(
        openai.uploads.upload_file_chunked(file=clip, mime_type="video/mp4", purpose="user_data", part_size=5000)
    )
    assert done.status == "completed" and done.file.id == about.id
    begun = checked(openai.uploads.create(bytes=3, filename="a", mime_type="video/mp4", purpose="vision"))
    checked(openai.uploads.parts.create(begun.id, data=b"a"))
    assert checked(openai.uploads.cancel(begun.id)).status == "cancelled"
    assert checked(openai.models.list().data[0]).id == "tiny" and checked(openai.models.retrieve("tiny")).id == "tiny"
    assert checked(openai.files.delete(about.id)).deleted


def test_answers(openai, clip, tiny_model):
    expected = session(tiny_model, videos=[clip]).ask(QUESTION, max_new_tokens=12, evidence=True)
    messages = [{"role": "user", "content": [video("clip.mp4"), {"type": "text", "text": QUESTION}]}]
    asked = {"model": "tiny", "messages": messages, "max_tokens": 12, "logprobs": True, "top_logprobs": 2}
    asked["extra_body"] = {"evidence": True, "fps": 1}
    made = checked(openai.chat.completions.create(**asked))
    assert isinstance(made, types.chat.ChatCompletion) and made.choices[0].message.content == expected.text
    assert len(made.choices[0].evidence[0]["seconds"]) == len(expected.evidence)
    assert len(made.choices[0].logprobs.content) == made.usage.completion_tokens
    text, last = "", None
    for chunk in openai.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        for choice in checked(chunk).choices:
            text, last = text + (choice.delta.content or ""), choice
    assert text == expected.text and chunk.usage == made.usage
    assert last.logprobs.content == made.choices[0].logprobs.content and last.evidence == made.choices[0].evidence


def test_errors(openai, tiny_model, engine, tmp_path):
    from openai import AuthenticationError, BadRequestError, NotFoundError

    hello = [{"role": "user", "content": "hi"}]
    with pytest.raises(BadRequestError, match="temperature is -1"):
        openai.chat.completions.create(model="tiny", messages=hello, temperature=-1)
    with pytest.raises(NotFoundError, match="no model 'other'"):
        openai.chat.completions.create(model="other", messages=hello)
    keyed = TestClient(make_server(tiny_model, engine, tmp_path, keys=("secret",)).app)
    with pytest.raises(AuthenticationError):
        OpenAI(base_url="http://testserver/v1", api_key="wrong", http_client=keyed, max_retries=0).models.list()
