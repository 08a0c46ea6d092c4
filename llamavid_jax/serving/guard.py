"""Checks before all routes: API keys, body sizes, each and in total, and the origin of browsers' requests.

It also adds security headers.
"""

import hmac
import json
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llamavid_jax.serving.metrics import Metrics
from llamavid_jax.serving.protocol import ApiError, error_object

OPEN = ("/", "/index.html", "/page.css", "/page.js", "/evidence.js", "/health", "/ready")  # reachable without a key
BODIES = 4  # bodies of the largest size that may be in memory at once
RETRY = {"Retry-After": "2"}
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    # the page reaches only this server, and shows its own blobs and data
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
}


class Guard:
    """ASGI middleware.  No other site's page may call: CORS is off, and requests with a foreign Origin are refused."""

    def __init__(self, app: ASGIApp, keys: Sequence[str], max_body: int, max_upload: int, metrics: Metrics):
        self.app, self.keys, self.max_body, self.max_upload = app, [key.encode() for key in keys], max_body, max_upload
        self.metrics, self.held = metrics, 0  # bytes of bodies that are in memory

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        uploads = scope["path"] == "/v1/files" or scope["method"] == "PUT"
        limit = self.max_upload if uploads else self.max_body
        too_large = ApiError(413, f"the body has more than {limit} bytes; send less, or upload to /v1/files first")
        too_many = ApiError(429, "too many large requests at once; upload to /v1/files, or try again", "busy", RETRY)
        taken, began = 0, False

        async def counted() -> Message:
            nonlocal taken
            message = await receive()
            size = len(message.get("body", b""))
            taken += size
            self.held += 0 if uploads else size  # those go to disk
            if taken > limit:
                raise too_large
            if not uploads and self.held > BODIES * self.max_body:
                raise too_many
            return message

        async def guarded(message: Message) -> None:
            nonlocal began
            if message["type"] == "http.response.start":
                began = True
                MutableHeaders(scope=message).update(HEADERS)
                self.metrics.requests.labels(self._route(scope["path"]), str(message["status"])).inc()
            await send(message)

        try:
            headers = Headers(scope=scope)
            self._check(scope["path"], headers)
            length = headers.get("content-length", "0")
            if not length.isdigit() or len(length) > 18 or int(length) > limit:
                raise too_large
            await self.app(scope, counted, guarded)
        except ApiError as error:
            if began:
                raise
            body = json.dumps(error_object(error.message, error.status, error.code)).encode()
            own = [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
            own += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
            await guarded({"type": "http.response.start", "status": error.status, "headers": own})
            await guarded({"type": "http.response.body", "body": body})
        finally:
            self.held -= 0 if uploads else taken

    def _check(self, path: str, headers: Headers) -> None:
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != headers.get("host"):
            raise ApiError(403, "the request comes from another site's page; CORS is off")
        if not self.keys or path in OPEN:
            return
        kind, _, given = headers.get("authorization", "").partition(" ")
        same = [hmac.compare_digest(given.strip().encode(), key) for key in self.keys]  # all of them, in constant time
        if kind.lower() != "bearer" or not any(same):
            raise ApiError(
                401, "the API key is missing or wrong; send it as Authorization: Bearer KEY", "invalid_api_key"
            )

    def _route(self, path: str) -> str:
        """A label for the metrics, one of a few, whatever paths are tried."""
        known = (*OPEN, "/metrics", "/v1/chat/completions", "/v1/models", "/v1/files", "/v1/uploads")
        return path if path in known else "other"
