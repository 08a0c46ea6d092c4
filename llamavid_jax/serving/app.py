"""The routes: OpenAI's protocol over HTTP, as an ASGI application.

POST /v1/chat/completions   admitted? ─ prepare, in a thread ─▶ row ─ engine ─▶ pieces ─▶ one object, or SSE
GET  /v1/models             POST, GET, DELETE /v1/files; /v1/uploads by ranges or in parts
GET  /health /ready         whether the process runs, whether it can answer; GET /metrics; GET / the page
"""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import sys
import time
import traceback
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import anyio.to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from llamavid_jax.errors import InputError
from llamavid_jax.files import parse_object
from llamavid_jax.serving.answers import Answers, Events, late, while_connected
from llamavid_jax.serving.engine import Engine
from llamavid_jax.serving.guard import Guard
from llamavid_jax.serving.metrics import Metrics
from llamavid_jax.serving.parts import Parts, read_range
from llamavid_jax.serving.prepare import Preparer
from llamavid_jax.serving.protocol import ApiError, error_object, read_asked
from llamavid_jax.serving.uploads import ConflictError, FullError, NoFileError, Uploads

PAGE = Path(__file__).with_name("page")
SCRIPT = "text/javascript"
KINDS = {"index.html": "text/html", "page.css": "text/css", "page.js": SCRIPT, "evidence.js": SCRIPT}


@dataclasses.dataclass(frozen=True)
class Limits:
    """The limits of one server."""

    queue: int = 64  # answers that wait, beside those that have a slot
    deadline: float = 600.0  # seconds for a request
    max_body: int = 128 << 20  # bytes of a request, data: URLs included
    max_upload: int = 2 << 30  # bytes of one file


class Server:
    """Holds what the routes share.  `app` is the ASGI application, which stops the engine at its end."""

    def __init__(
        self,
        name: str,
        engine: Engine,
        preparer: Preparer,
        limits: Limits,
        api_keys: tuple[str, ...] = (),
        hosts: tuple[str, ...] = ("*",),
    ):
        self.name, self.engine, self.preparer, self.limits = name, engine, preparer, limits
        self.uploads = preparer.sources.uploads
        self.parts = Parts(self.uploads)
        self.metrics = Metrics(engine, preparer)
        self.deadline = limits.deadline
        self.answers, self.created = 0, int(time.time())  # admitted and not yet ended
        self.threads = concurrent.futures.ThreadPoolExecutor(engine.slots + limits.queue, "prepare")
        guard = Middleware(Guard, api_keys, limits.max_body, limits.max_upload, self.metrics)
        routes = [
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/v1/files", self.upload, methods=["POST"]),
            Route("/v1/files", self.files),
            Route("/v1/files/{key}", self.file, methods=["GET", "DELETE"]),
            Route("/v1/files/{key}/content", self.content),
            Route("/v1/uploads", self.begin_upload, methods=["POST"]),
            Route("/v1/uploads/{key}", self.put, methods=["PUT"]),
            Route("/v1/uploads/{key}", self.unfinished),
            Route("/v1/uploads/{key}/parts", self.part, methods=["POST"]),
            Route("/v1/uploads/{key}/{end}", self.end_upload, methods=["POST"]),
            Route("/health", self.health),
            Route("/ready", self.ready),
            Route("/metrics", self.metrics.route),
            Route("/", self.page),
            *(Route(f"/{name}", self.page) for name in KINDS),
        ]
        handlers = {
            ApiError: _api_error,
            InputError: _input_error,
            ClientDisconnect: _gone,
            HTTPException: _http_error,
            Exception: _server_error,
        }
        self.app = Starlette(
            routes=routes,
            middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts)), guard],
            exception_handlers=handlers,
            lifespan=self._lifespan,
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        yield
        await anyio.to_thread.run_sync(self.engine.stop)

    # ---- chat

    async def chat(self, request: Request) -> Response:
        """One request: its row is made in a thread, its answers by the engine."""
        started = time.monotonic()
        self.admit(1)  # before its body is read, which may be large
        answers, response = Answers(self, started), None
        try:
            async with asyncio.timeout(self.deadline):
                asked = read_asked(await self._asked(request), self.engine.max_new_tokens)
                answers.admit(asked.n)
                prompt = await while_connected(request, answers.begin(asked))
                if not asked.stream:
                    return JSONResponse(await while_connected(request, answers.whole(prompt)))
            response = Events(answers, prompt, self.deadline - (time.monotonic() - started))
            return response
        except TimeoutError:
            raise late(self.deadline) from None
        finally:
            if response is None:  # else the stream ends them
                answers.end()

    def admit(self, answers: int) -> None:
        """Takes places in the queue, which `Answers.end` frees."""
        if self.answers + answers > self.engine.slots + self.limits.queue:
            raise ApiError(429, "the server is busy; try again", "queue_full", {"Retry-After": "2"})
        self.answers += answers

    async def _asked(self, request: Request) -> dict[str, Any]:
        body = await self._body(request)
        if (name := body.get("model")) != self.name:
            raise ApiError(404, f"there is no model {str(name)[:100]!r}; this is {self.name!r}", "model_not_found")
        return body

    async def _body(self, request: Request) -> dict[str, Any]:
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "the body's content type is not application/json; send JSON")
        content = await request.body()
        try:
            return await anyio.to_thread.run_sync(parse_object, content)
        except ValueError as error:
            raise InputError(f"the body is not readable JSON: {error}") from None

    # ---- models and files

    async def models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        if request.path_params["name"] != self.name:
            raise ApiError(404, f"there is no such model; this is {self.name!r}", "model_not_found")
        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "llamavid_jax"}

    async def upload(self, request: Request) -> Response:
        """A form with `file` and `purpose`, as in OpenAI's protocol; a large file goes to disk while it arrives.

        Or JSON with the `url` of a file to fetch, which takes a place in the queue meanwhile.
        """
        if "json" in request.headers.get("content-type", ""):
            body = await self._body(request)
            self.admit(1)
            try:
                fetching = asyncio.get_running_loop().run_in_executor(self.threads, self.preparer.sources.keep, body)
                return JSONResponse(await fetching)
            finally:
                self.answers -= 1
        async with request.form(max_files=1, max_fields=8) as form:
            file, purpose = form.get("file"), form.get("purpose", "user_data")
            if not hasattr(file, "file") or not isinstance(purpose, str):
                raise InputError("the form has no file; send one as 'file', and a 'purpose' such as user_data")
            name = file.filename or "upload"
            return JSONResponse(await anyio.to_thread.run_sync(self.uploads.add, _blocks(file), name, purpose))

    async def begin_upload(self, request: Request) -> Response:
        body = await self._body(request)
        if type(size := body.get("bytes")) is int and size > self.limits.max_upload:
            raise ApiError(413, f"the file has {size} bytes, and this server takes up to {self.limits.max_upload}")
        return JSONResponse(await anyio.to_thread.run_sync(self.parts.create, body))

    async def unfinished(self, request: Request) -> Response:
        return JSONResponse(await anyio.to_thread.run_sync(self.parts.find, request.path_params["key"]))

    async def put(self, request: Request) -> Response:
        """Receives a file, or its bytes of a Content-Range; received bytes stay if the connection breaks."""
        key = request.path_params["key"]
        about = await anyio.to_thread.run_sync(self.parts.find, key)
        said, length = (request.headers.get(f"content-{name}") for name in ("range", "length"))
        at, end = read_range(said, length and int(length), about["bytes"])
        async for block in request.stream():
            if at + len(block) > end:
                raise InputError(f"more bytes came than {key} is to have up to {end}; say the right Content-Range")
            if block:
                await anyio.to_thread.run_sync(self.parts.put, key, at, block)
            at += len(block)
        return JSONResponse(await anyio.to_thread.run_sync(self.parts.finish, key))

    async def part(self, request: Request) -> Response:
        async with request.form(max_files=1, max_fields=8) as form:
            if not hasattr(data := form.get("data"), "file"):
                raise InputError("the form has no file; send the part's bytes as 'data'")
            key = request.path_params["key"]
            return JSONResponse(await anyio.to_thread.run_sync(self.parts.add, key, _blocks(data)))

    async def end_upload(self, request: Request) -> Response:
        key, end = request.path_params["key"], request.path_params["end"]
        if end == "cancel":
            return JSONResponse(await anyio.to_thread.run_sync(self.parts.cancel, key))
        if end != "complete":
            raise HTTPException(404)
        return JSONResponse(await anyio.to_thread.run_sync(self.parts.complete, key, await self._body(request)))

    async def files(self, _: Request) -> Response:
        found = await anyio.to_thread.run_sync(self.uploads.all)
        return JSONResponse({"object": "list", "data": found, "has_more": False})

    async def file(self, request: Request) -> Response:
        key = request.path_params["key"]
        if request.method == "DELETE":
            self.uploads.delete(key)
            return JSONResponse({"id": key, "object": "file", "deleted": True})
        about = self.uploads.find(key)
        if found := self.preparer.encoding.get(key.removeprefix("file-")):
            about["encoding"] = dict(zip(("frames", "of"), found, strict=True))
        return JSONResponse(about)

    async def content(self, request: Request) -> Response:
        """The bytes, as a download, so that no browser shows them as a page of this server."""
        return Content(self.uploads, request.path_params["key"])

    # ---- the rest

    async def health(self, _: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def ready(self, _: Request) -> Response:
        return JSONResponse(self.engine.counts, status_code=200 if self.engine.is_alive else 503)

    async def page(self, request: Request) -> Response:
        name = request.url.path[1:] or "index.html"
        return FileResponse(PAGE / name, media_type=KINDS[name])


class Content(FileResponse):
    """An uploaded file, which stays on disk until it is sent, even if it is deleted meanwhile."""

    def __init__(self, uploads: Uploads, key: str):
        self.reading = uploads.reading(key)
        super().__init__(uploads.path(key), media_type="application/octet-stream", filename=key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self.reading:
            await super().__call__(scope, receive, send)


def _blocks(file: Any) -> Iterator[bytes]:
    return iter(lambda: file.file.read(1 << 20), b"")


def _respond(status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse(error_object(message, status, code), status, headers)


async def _api_error(_: Request, error: ApiError) -> Response:
    return _respond(error.status, error.message, error.code, error.headers)


async def _input_error(_: Request, error: InputError) -> Response:
    status = {NoFileError: 404, ConflictError: 409, FullError: 507}.get(type(error), 400)
    return _respond(status, str(error))


async def _gone(_: Request, __: ClientDisconnect) -> Response:
    return _respond(499, "the client has gone")  # which nobody reads


async def _http_error(_: Request, error: HTTPException) -> Response:
    return _respond(
        error.status_code, f"{error.detail}; the routes are in docs/serving.md", None, dict(error.headers or {})
    )


async def _server_error(_: Request, error: Exception) -> Response:
    traceback.print_exception(error, file=sys.stderr)
    return _respond(500, "the server met an error of its own, which its log has; try again")
