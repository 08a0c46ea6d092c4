"""A server of the tiny model without a socket, and requests to it."""

import asyncio
import base64
import io
import json
from pathlib import Path

from PIL import Image

from llamavid_jax.inference.session import Session
from llamavid_jax.media.image_processor import LLaMAVIDLlavaImageProcessor
from llamavid_jax.serving.app import Limits, Server
from llamavid_jax.serving.engine import Engine
from llamavid_jax.serving.prepare import Preparer
from llamavid_jax.serving.sources import Sources
from llamavid_jax.serving.uploads import Uploads

QUESTION = "what is the man doing?"


def make_server(
    model, engine: Engine, folder: Path, limits: Limits | None = None, keys=(), hosts=("*",), cache=None, **sources
):
    """`sources` are settings of Sources."""
    images = LLaMAVIDLlavaImageProcessor.of(model.config)
    preparer = Preparer(model, images, Sources(Uploads(folder, 1 << 20), **sources), max_frames=40, cache=cache)
    return Server("tiny", engine, preparer, limits or Limits(), keys, hosts)


def video(url: str) -> dict:
    return {"type": "video_url", "video_url": {"url": url}}


def ask(client, *content, **fields):
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": QUESTION}]}]
    body = {"model": "tiny", "messages": messages, "max_tokens": 12, "temperature": 0} | fields
    return client.post("/v1/chat/completions", json=body)


def text_of(response) -> str:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def events(response) -> list[dict]:
    lines = [line[6:] for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def session(tiny_model, **visuals) -> Session:
    return Session(tiny_model, LLaMAVIDLlavaImageProcessor.of(tiny_model.config), **visuals)


def picture(colour=(200, 30, 30), kind="PNG") -> str:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(file, kind)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


async def call(server, body: dict, leave_after) -> list[dict]:
    """One request of a client that disconnects once `leave_after(messages)` is true."""
    content, sent, messages = json.dumps(body).encode(), False, []

    async def receive():
        nonlocal sent
        if not sent:
            sent = True
            return {"type": "http.request", "body": content}
        while not leave_after(messages):
            await asyncio.sleep(0.01)
        return {"type": "http.disconnect"}

    async def send(message):
        messages.append(message)

    headers = [(b"content-type", b"application/json"), (b"host", b"x")]
    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": headers, "query_string": b""}
    await server.app({**scope, "http_version": "1.1", "scheme": "http", "server": ("x", 80)}, receive, send)
    return messages
