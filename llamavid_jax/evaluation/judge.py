"""Judges of free answers: a model at any OpenAI-compatible address, or exact and normalised match offline.

    Case ─ messages ─▶ address ─ reply ─ read ─▶ Verdict       a reply that cannot be read is asked for again, ATTEMPTS
         └ answer, predictions ─▶ offline ─────▶ Verdict       times in all; then the case is counted as failed

Replies are kept in a file, so that a score is computed again without a call.  The original asks again for ever and
stops at replies of a wrong form; nothing here loops, and nothing stops the scoring.
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
from typing import Any

from llamavid_jax.errors import InputError, say
from llamavid_jax.evaluation.replies import UnreadError, Verdict
from llamavid_jax.evaluation.vqa_text import official
from llamavid_jax.evaluation.yes_no import yes_or_no

ATTEMPTS = 5  # of one case
CALLS = 8  # at a time
RETRIES = 5  # of a call that the server refuses for now
PATIENCE = 120  # seconds for one reply
SAY_EVERY = 60.0  # seconds
MODEL = "gpt-3.5-turbo"  # the original's


Read = Callable[[str], Verdict]
WRONG = Verdict(False, 0.0, {"pred": "no", "score": 0})


@dataclasses.dataclass(frozen=True)
class Case:
    """One judgement: the messages as sent, what an offline judge compares, and how a reply is read.

    `predictions` are none where the question could not be asked: it counts as wrong, and no judge is.
    """

    messages: list[dict[str, str]]
    answer: str
    predictions: Sequence[str]
    read: Read


def messages(system: str, user: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


class OfflineJudge:
    """Right is what equals the answer once both are normalised as VQA's are, or holds it as whole words; 5 or 0.

    Where the answer is yes or no, right is what says the same.
    """

    name = "offline: exact and normalised match; not the paper's judge"

    def __init__(self):
        self.counts: dict[str, int] = {}

    def verdicts(self, cases: Sequence[Case]) -> list[Verdict | None]:
        return [self._one(case) for case in cases]

    def _one(self, case: Case) -> Verdict:
        answer = _comparable(case.answer)
        if answer in ("yes", "no"):
            right = all(yes_or_no(prediction) == answer for prediction in case.predictions)
        else:
            right = all(f" {answer} " in f" {_comparable(prediction)} " for prediction in case.predictions)
        right = right and bool(answer) and bool(case.predictions)
        return Verdict(True, 5.0, {"pred": "yes", "score": 5}) if right else WRONG


def _comparable(text: str) -> str:
    return official(text.lower())


class ModelJudge:
    """A chat model at `address`, such as https://api.openai.com/v1; `key` may be empty for a local server.

    `kept` is the file of replies.  `counts`: calls, tokens in and out, replies from the file, unread ones, failures.
    """

    def __init__(self, address: str, key: str, model: str = MODEL, kept: Path | None = None):
        import requests
        from urllib3.util import Retry

        if not re.match(r"https?://", address):
            raise InputError(f"the judge's address is {address!r}; give a URL such as https://api.openai.com/v1")
        self.url = address.rstrip("/") + "/chat/completions"
        self.model, self.key, self.kept = model, key, kept
        self.name = f"{model} at {address}"
        self.counts = dict.fromkeys(("calls", "tokens in", "tokens out", "kept replies", "unread", "failed"), 0)
        self._lock, self._local, self._stop = threading.Lock(), threading.local(), threading.Event()
        self._retry = Retry(
            total=RETRIES,
            backoff_factor=1.0,
            status_forcelist=(408, 409, 429, 500, 502, 503, 504),
            allowed_methods=None,
            raise_on_status=False,
        )
        self._requests = requests
        self._replies = self._read_kept()

    def verdicts(self, cases: Sequence[Case]) -> list[Verdict | None]:
        """One a case, None where it failed.  InputError where the address answers nothing that a judge would."""
        with concurrent.futures.ThreadPoolExecutor(CALLS) as pool:
            waiting, said = [pool.submit(self._one, case) for case in cases], time.monotonic()
            try:
                for done, _ in enumerate(concurrent.futures.as_completed(waiting), 1):
                    if time.monotonic() - said > SAY_EVERY:
                        said = time.monotonic()
                        say(f"{done} of {len(cases)} answers judged, {self.counts['failed']} failed")
                return [one.result() for one in waiting]
            except BaseException:
                self._stop.set()
                pool.shutdown(cancel_futures=True)
                raise

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
        if key in self._replies:
            self._count(**{"kept replies": 1})
            return self._replies[key]
        reply = self._call(sent)
        if reply is not None:
            with self._lock:
                self._replies[key] = reply
                if self.kept is not None:
                    with self.kept.open("a", encoding="utf-8") as file:
                        file.write(json.dumps({"key": key, "reply": reply}) + "\n")
        return reply

    def _call(self, sent: list[dict[str, str]]) -> str | None:
        """The reply's text; None where the server has none for these messages."""
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        body = {"model": self.model, "messages": sent}
        self._count(calls=1)
        try:
            response = self._session().post(self.url, json=body, headers=headers, timeout=PATIENCE)
        except self._requests.Timeout:
            return None
        except self._requests.RequestException as error:
            raise InputError(f"the judge at {self.url} cannot be reached ({error}); check the address") from None
        if response.status_code in (401, 403, 404, 405):
            remedy = "check the key" if response.status_code in (401, 403) else "check the address and the model's name"
            raise InputError(f"the judge at {self.url} answered {response.status_code} {response.text[:200]}; {remedy}")
        try:
            content = response.json()
            usage = content.get("usage") or {}
            self._count(
                **{
                    "tokens in": int(usage.get("prompt_tokens") or 0),
                    "tokens out": int(usage.get("completion_tokens") or 0),
                }
            )
            return content["choices"][0]["message"]["content"] or ""
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            return None

    def _session(self) -> Any:
        """One a thread: connections are kept open in it."""
        if not hasattr(self._local, "session"):
            self._local.session = self._requests.Session()
            for scheme in ("http://", "https://"):
                self._local.session.mount(scheme, self._requests.adapters.HTTPAdapter(max_retries=self._retry))
        return self._local.session

    def _count(self, **more: int) -> None:
        with self._lock:
            for name, value in more.items():
                self.counts[name] += value

    def _read_kept(self) -> dict[str, str]:
        """A line that was cut off by the end of a process is left out."""
        replies = {}
        if self.kept is not None and self.kept.exists():
            text = self.kept.read_text(encoding="utf-8", errors="replace")
            if text and not text.endswith("\n"):
                self.kept.write_text(text + "\n", encoding="utf-8")
            for line in text.splitlines():
                try:
                    row = json.loads(line)
                    replies[row["key"]] = str(row["reply"])
                except (ValueError, KeyError, TypeError):
                    continue
        return replies
