"""Judges of free answers: a model at any OpenAI-compatible address, or offline by exact and normalised match.

    Case ─ messages ─▶ address ─ reply ─ read ─▶ Verdict       an unreadable reply is requested again, up to ATTEMPTS
         └ answer, predictions ─▶ offline ─────▶ Verdict       times in all; then the case counts as failed

Replies are kept in a file, so that scoring again needs no calls.  Unlike in the original, requests are not repeated for
ever, and no reply stops the scoring.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llamavid_jax.errors import InputError, say
from llamavid_jax.evaluation.replies import UnreadError, Verdict
from llamavid_jax.evaluation.vqa_text import official
from llamavid_jax.evaluation.yes_no import yes_or_no

ATTEMPTS = 5  # of one case
CALLS = 8  # in parallel
RETRIES = 5  # of a call that the server temporarily refuses
BUSY = 408, 409, 429, 500, 502, 503, 504  # status codes of such a refusal
PATIENCE = 10, 120  # seconds for a connection, and for a reply
LONGEST_WAIT = 60  # seconds, even if a busy server asks for more
SAY_EVERY = 60.0  # seconds between progress lines
MODEL = "gpt-3.5-turbo"  # the original's


Read = Callable[[str], Verdict]
WRONG = Verdict(False, 0.0, {"pred": "no", "score": 0})


@dataclasses.dataclass(frozen=True)
class Case:
    """One judgement: the messages to send, what an offline judge compares, and the function that reads a reply.

    `predictions` is empty if the question could not be asked: it counts as wrong without asking a judge.
    """

    messages: list[dict[str, str]]
    answer: str
    predictions: Sequence[str]
    read: Read


class Reply(NamedTuple):
    """A judge's words, and the tokens that its server counted for them."""

    text: str
    tokens_in: int = 0
    tokens_out: int = 0


def messages(system: str, user: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


class OfflineJudge:
    """An answer is right (5, else 0) if it contains the reference as whole words, both normalised as VQA's answers are.

    If the reference is yes or no, the answer is right if it means the same.
    """

    name = "offline: exact and normalised match; not the paper's judge"

    def __init__(self):
        self.counts: dict[str, int] = {}

    def verdicts(self, cases: Sequence[Case]) -> list[Verdict | None]:
        return [self._one(case) for case in cases]

    def _one(self, case: Case) -> Verdict:
        answer = official(case.answer)
        if answer in ("yes", "no"):
            right = all(yes_or_no(prediction) == answer for prediction in case.predictions)
        else:
            right = all(f" {answer} " in f" {official(prediction)} " for prediction in case.predictions)
        right = right and bool(answer) and bool(case.predictions)
        return Verdict(True, 5.0, {"pred": "yes", "score": 5}) if right else WRONG


def _was_reached(error: Exception) -> bool:
    """Whether the server was reached, but its reply broke off or did not come in time."""
    from requests.exceptions import ChunkedEncodingError, ContentDecodingError, ReadTimeout
    from urllib3.exceptions import ProtocolError, ReadTimeoutError

    is_broken = isinstance(error, ReadTimeout | ChunkedEncodingError | ContentDecodingError)
    return is_broken or isinstance((error.args or (None,))[0], ProtocolError | ReadTimeoutError)


class ModelJudge:
    """A chat model at `address`, such as https://api.openai.com/v1; `key` may be empty for a local server.

    `kept` is the file of replies.  `counts`: calls, tokens in and out (kept replies included), replies from the file,
    unreadable ones, failures.
    """

    def __init__(self, address: str, key: str, model: str = MODEL, kept: Path | None = None):
        import requests
        from urllib3.util import Retry

        class Patient(Retry):
            def get_retry_after(self, response):
                seconds = super().get_retry_after(response)
                return seconds and min(seconds, LONGEST_WAIT)

        if not re.match(r"https?://", address):
            raise InputError(f"the judge's address is {address!r}; give a URL such as https://api.openai.com/v1")
        self.url = address.rstrip("/") + "/chat/completions"
        self.model, self.key, self.kept = model, key, kept
        self.shown = re.sub("//[^/]*@", "//", self.url)  # hides a password in the address
        self.name = f"{model} at {self.shown.removesuffix('/chat/completions')}"
        self.counts = dict.fromkeys(("calls", "tokens in", "tokens out", "kept replies", "unread", "failed"), 0)
        self._lock, self._local, self._stop = threading.Lock(), threading.local(), threading.Event()
        self._retry = Patient(  # read=False: no second request after a reply's timeout
            RETRIES, read=False, backoff_factor=1.0, status_forcelist=BUSY, allowed_methods=None, raise_on_status=False
        )
        self._requests, self._is_said, self._replies = requests, False, self._read_kept()
        self._turns: dict[str, threading.Lock] = {}

    def verdicts(self, cases: Sequence[Case]) -> list[Verdict | None]:
        """A verdict per case, None if it failed.  InputError if the address does not answer as a judge would."""
        pool = concurrent.futures.ThreadPoolExecutor(CALLS)
        try:
            waiting, said = [pool.submit(self._one, case) for case in cases], time.monotonic()
            for done, one in enumerate(concurrent.futures.as_completed(waiting), 1):
                one.result()
                if time.monotonic() - said > SAY_EVERY:
                    said = time.monotonic()
                    say(f"{done} of {len(cases)} answers judged, {self.counts['failed']} failed")
            return [one.result() for one in waiting]
        except BaseException:
            self._stop.set()
            raise
        finally:  # at Ctrl-C or after an error, does not wait for a slow server
            pool.shutdown(wait=False, cancel_futures=True)

    def _one(self, case: Case) -> Verdict | None:
        if not case.predictions:
            return WRONG
        for attempt in range(ATTEMPTS):
            if self._stop.is_set():
                return None
            reply = self._reply(case.messages, attempt)
            if reply is None:
                break
            try:
                return case.read(reply)
            except UnreadError as unread:
                self._count(unread=1)
                if unread.is_final:
                    break
        self._count(failed=1)
        return None

    def _reply(self, sent: list[dict[str, str]], attempt: int) -> str | None:
        key = hashlib.sha256(json.dumps([self.url, self.model, sent, attempt]).encode()).hexdigest()
        with self._lock:
            turn = self._turns.setdefault(key, threading.Lock())
        with turn:  # cases with the same messages have one call
            if (kept := self._replies.get(key)) is not None:
                self._replies[key] = Reply(kept.text)  # its tokens are counted once, however many cases it answers
                self._count(**{"kept replies": 1, "tokens in": kept.tokens_in, "tokens out": kept.tokens_out})
                return kept.text
            reply = self._call(sent)
            if reply is None:
                return None
            self._count(**{"tokens in": reply.tokens_in, "tokens out": reply.tokens_out})
            if reply.text:  # an empty one is requested again by the next scoring
                self._replies[key] = Reply(reply.text)
                self._keep(key, reply)
        return reply.text

    def _keep(self, key: str, reply: Reply) -> None:
        if self.kept is not None:
            row = {"key": key, "reply": reply.text, "tokens in": reply.tokens_in, "tokens out": reply.tokens_out}
            with self._lock, self.kept.open("a", encoding="utf-8") as file:
                file.write("\n" + json.dumps(row))  # after a line cut off by a kill

    def _call(self, sent: list[dict[str, str]]) -> Reply | None:
        """The reply's text; None if the server gives none for these messages."""
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        asked = {"json": {"model": self.model, "messages": sent}, "headers": headers, "timeout": PATIENCE}
        self._count(calls=1)
        try:
            response = self._session().post(self.url, **asked)
        except self._requests.RequestException as error:
            if _was_reached(error):
                return self._nothing(f"{type(error).__name__}: {error}")
            raise InputError(f"the judge at {self.shown} cannot be reached ({error}); check the address") from None
        told = f"{response.status_code} {response.text[:200]}"
        if response.status_code in (401, 403, 404, 405):
            doubtful = "the key" if response.status_code in (401, 403) else "the address and the model's name"
            raise InputError(f"the judge at {self.shown} answered {told}; check {doubtful}")
        try:
            content = response.json()
            reply = content["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError, RecursionError):
            return self._nothing(told)
        used = content["usage"] if isinstance(content.get("usage"), dict) else {}
        tokens = (used.get(name) for name in ("prompt_tokens", "completion_tokens"))
        tokens = [number if isinstance(number, int) else 0 for number in tokens]
        return Reply(reply or "", *tokens) if isinstance(reply, str | None) else self._nothing(told)

    def _nothing(self, reason: str) -> None:
        """Reports once why there is no reply."""
        if not self._is_said:
            self._is_said = True
            say(f"the judge at {self.shown} gave no reply, which counts as failed: {' '.join(reason.split())[:300]}")

    def _session(self) -> Any:
        """One session per thread; it keeps connections open."""
        if not hasattr(self._local, "session"):
            self._local.session = self._requests.Session()
            for scheme in ("http://", "https://"):
                self._local.session.mount(scheme, self._requests.adapters.HTTPAdapter(max_retries=self._retry))
        return self._local.session

    def _count(self, **more: int) -> None:
        with self._lock:
            for name, value in more.items():
                self.counts[name] += value

    def _read_kept(self) -> dict[str, Reply]:
        """The kept replies; a line that a killed process left incomplete is skipped."""
        replies = {}
        if self.kept is not None and self.kept.exists():
            text = self.kept.read_text(encoding="utf-8", errors="replace")
            for line in text.splitlines():
                try:
                    row = json.loads(line)
                    tokens = (int(row.get(name, 0)) for name in ("tokens in", "tokens out"))
                    replies.setdefault(row["key"], Reply(str(row["reply"]), *tokens))
                except (ValueError, KeyError, TypeError):
                    continue
        return replies
