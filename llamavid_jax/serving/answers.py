"""The answers to one request, from its preparation to the last piece of each answer."""

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, Protocol, runtime_checkable

from starlette.requests import Request
from starlette.responses import StreamingResponse

from llamavid_jax.serving.engine import Engine
from llamavid_jax.serving.jobs import Job, Piece
from llamavid_jax.serving.metrics import Metrics
from llamavid_jax.serving.prepare import Preparer
from llamavid_jax.serving.prepared import Prepared
from llamavid_jax.serving.protocol import ApiError, Asked, Reply, error_object, logprobs, usage


class GoneError(Exception):
    """Nobody waits for this request any more."""


@runtime_checkable
class Shared(Protocol):
    """What all requests share: those parts of the server that their answers use."""

    name: str
    engine: Engine
    preparer: Preparer
    metrics: Metrics
    threads: Any  # in which requests are prepared
    deadline: float
    answers: int  # admitted and not yet ended

    def admit(self, answers: int) -> None: ...


class Answers:
    """The `n` answers of one request; it is admitted as a single one until its body has been read."""

    asked: Asked
    prepared: Prepared | None = None

    def __init__(self, server: Shared, started: float):
        self.server, self.started, self.places = server, started, 1
        self.reply = Reply(server.name)
        self.jobs: list[Job] = []
        self.pieces: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        self._gone = threading.Event()

    def admit(self, places: int) -> None:
        """Sets how many places in the queue it takes; ApiError if there are too few."""
        self.server.admit(places - self.places)
        self.places = places

    async def begin(self, asked: Asked) -> int:
        """Makes the row and queues the jobs; returns how many tokens the prompt has."""
        self.asked, loop = asked, asyncio.get_running_loop()
        made = await loop.run_in_executor(self.server.threads, self.server.preparer, asked, self._check)
        self.prepared = made

        def into_queue(index: int) -> Callable[[Piece], None]:
            def put(piece: Piece) -> None:
                with contextlib.suppress(RuntimeError):  # the loop is closed: the engine continues for others
                    loop.call_soon_threadsafe(self.pieces.put_nowait, (index, piece))

            return put

        wanted = asked.evidence, asked.likely is not None
        for index in range(asked.n):
            self.jobs.append(Job(made.row, made.table, asked.settings_of(index), into_queue(index), *wanted))
            self.server.engine.submit(self.jobs[-1])
        self.server.metrics.prompt_tokens.inc(len(made.row.token_ids))
        return len(made.row.token_ids)

    def _check(self) -> None:
        if self._gone.is_set():
            raise GoneError

    async def new_texts(self) -> AsyncIterator[tuple[int, str, Piece]]:
        """(choice, its new text, piece) until all answers have ended; white space around an answer is removed."""
        texts, told, left, first = [""] * self.asked.n, [0] * self.asked.n, self.asked.n, True
        while left:
            index, piece = await self.pieces.get()
            if piece.finish == "error":
                raise ApiError(500, "the answer was lost to an error of the server; ask again")
            if first:
                self.server.metrics.first_piece.observe(time.monotonic() - self.started)
                first = False
            texts[index] += piece.text
            shown = texts[index].strip()
            new, told[index] = shown[told[index] :], len(shown)
            if piece.finish:
                left -= 1
                self.server.metrics.new_tokens.inc(piece.tokens)
            yield index, new, piece

    async def whole(self, prompt: int) -> dict[str, Any]:
        texts, last = [""] * self.asked.n, {}
        async for index, new, last[index] in self.new_texts():
            texts[index] += new
        choices = [(text, await self._end(last[index])) for index, text in enumerate(texts)]
        return self.reply.whole(choices, usage(prompt, sum(piece.tokens for piece in last.values())))

    async def events(self, prompt: int, seconds: float) -> AsyncIterator[str]:
        """The lines of the stream; an error during the stream becomes an event."""
        try:
            tokens = [0] * self.asked.n
            for index in range(self.asked.n):
                yield _event(self.reply.chunk(index, {"role": "assistant", "content": ""}))
            async with asyncio.timeout(seconds):
                async for index, new, piece in self.new_texts():
                    tokens[index] = piece.tokens
                    if new:
                        yield _event(self.reply.chunk(index, {"content": new}))
                    if piece.finish:
                        yield _event(self.reply.chunk(index, {}, await self._end(piece)))
            if self.asked.include_usage:
                yield _event(self.reply.usage_chunk(usage(prompt, sum(tokens))))
        except TimeoutError:
            error = late(self.server.deadline)
            yield _event(error_object(error.message, error.status, error.code))
        except ApiError as error:
            yield _event(error_object(error.message, error.status, error.code))
        yield "data: [DONE]\n\n"

    async def _end(self, piece: Piece) -> dict[str, Any]:
        """The fields of a choice: `evidence`, which is not in OpenAI's protocol, and `logprobs`, if requested."""
        fields: dict[str, Any] = {"finish_reason": piece.finish}
        if piece.evidence is not None:
            found = self.prepared.rests_on, piece.evidence, self.server.preparer.look
            fields["evidence"] = await asyncio.get_running_loop().run_in_executor(self.server.threads, *found)
        if piece.scores is not None:
            tokenizer = self.server.engine.model.tokenizer
            fields["logprobs"] = logprobs(tokenizer, piece.ids, piece.scores, self.asked.likely or 0)
        return fields

    def end(self) -> None:
        """Cancels what still runs, which ends within a block, and frees the places in the queue."""
        self._gone.set()
        for job in self.jobs:
            job.cancelled = True
        self.jobs.clear()  # jobs refer back to this: now arrays are freed at once, without the garbage collector
        self.prepared = None
        self.server.answers -= self.places


class Events(StreamingResponse):
    """A stream that ends its answers however it ends itself, even if it never begins."""

    def __init__(self, answers: Answers, prompt: int, seconds: float):
        self.answers = answers
        super().__init__(answers.events(prompt, seconds), media_type="text/event-stream")

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.answers.end()


async def while_connected(request: Request, work: Coroutine[Any, Any, Any]) -> Any:
    """The result of `work`, which is cancelled if the client disconnects."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.create_task(work), asyncio.create_task(watch())
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ApiError(499, "the client has gone")  # which nobody reads
    finally:
        working.cancel()
        watching.cancel()


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def late(deadline: float) -> ApiError:
    """The error of a request that missed its deadline."""
    return ApiError(408, f"the answer took longer than {deadline:g} s; ask about less, or try again", "deadline")
