"""Judges: a local server that replies well, badly or never; the file of replies; the offline judge."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from llamavid_jax.errors import InputError
from llamavid_jax.evaluation import judge as judges
from llamavid_jax.evaluation.judge import ATTEMPTS, Case, ModelJudge, OfflineJudge
from llamavid_jax.evaluation.replies import read_leniently

GOOD = "{'pred': 'yes', 'score': 4}"


class Server:
    """Sends `replies` in turn, the last one repeatedly; an int is a status code."""

    def __init__(self):
        self.replies: list = []
        self.lost = 0  # bytes that are announced but not sent
        self.seconds = 0.0  # delay before a reply
        self.hangs: threading.Event | None = None  # delays the end of a reply until it is set
        self.headers: dict[str, str] = {}
        self.asked: list = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.asked.append((self.path, self.headers.get("Authorization"), body))
                reply = server.replies.pop(0) if len(server.replies) > 1 else server.replies[0]
                time.sleep(server.seconds)
                status, content = (reply, b"{}") if isinstance(reply, int) else (200, self.content(reply))
                self.send_response(status)
                self.send_header("Content-Length", str(len(content) + server.lost))
                for name, value in server.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)
                if server.hangs:
                    self.wfile.flush()
                    server.hangs.wait(60)

            def content(self, reply) -> bytes:
                if isinstance(reply, bytes):
                    return reply
                usage = {"prompt_tokens": 10, "completion_tokens": 3}
                return json.dumps({"choices": [{"message": {"content": reply}}], "usage": usage}).encode()

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self.http.server_port}/v1"


@pytest.fixture
def server():
    one = Server()
    yield one
    one.http.shutdown()
    one.http.server_close()


def case(text: str = "a cat", read=read_leniently) -> Case:
    return Case([{"role": "user", "content": text}], "cat", [text], lambda reply: read(reply, ("pred",)))


def test_what_is_sent_and_what_comes_back(server, tmp_path):
    """The request holds model and messages alone, and the key; replies are kept, so a second judge sends nothing."""
    server.replies = [GOOD]
    judge = ModelJudge(server.address, "secret", "some-model", tmp_path / "replies.jsonl")
    (verdict,) = judge.verdicts([case()])
    assert (verdict.yes, verdict.score) == (True, 4)
    assert server.asked == [
        ("/v1/chat/completions", "Bearer secret", {"model": "some-model", "messages": case().messages})
    ]
    assert (judge.counts["calls"], judge.counts["tokens in"], judge.counts["tokens out"]) == (1, 10, 3)
    assert "secret" not in (tmp_path / "replies.jsonl").read_text()
    again = ModelJudge(server.address, "", "some-model", tmp_path / "replies.jsonl")
    assert again.verdicts([case()]) == [verdict] and len(server.asked) == 1 and again.counts["kept replies"] == 1
    assert (again.counts["calls"], again.counts["tokens in"], again.counts["tokens out"]) == (
        0,
        10,
        3,
    )  # totals over all scorings
    other = ModelJudge(server.address, "", "another-model", tmp_path / "replies.jsonl")
    assert other.verdicts([case()]) == [verdict] and len(server.asked) == 2


@pytest.mark.parametrize("bad", ["", "Sure!", "{'pred': yes}", "{'score': 'high', 'pred': 'yes'}", "[[[" * 4000, None])
def test_malformed_replies_end(server, bad):
    """A judge whose replies are never usable is asked ATTEMPTS times; other cases still count."""
    server.replies = [GOOD, bad]
    judge = ModelJudge(server.address, "")
    assert [verdict and verdict.yes for verdict in judge.verdicts([case("one")]) + judge.verdicts([case("two")])] == [
        True,
        None,
    ]
    assert len(server.asked) == 1 + ATTEMPTS and judge.counts["failed"] == 1 and judge.counts["unread"] == ATTEMPTS


def body(content, usage=None) -> bytes:
    return json.dumps({"choices": [{"message": {"content": content}}], "usage": usage}).encode()


@pytest.mark.parametrize(
    "bad",
    [
        *(b"", b"no json", b"[]", b"<html>\nBusy", b"[" * 100_000, b'data: {"choices": []}', 400),
        *(b'{"choices": []}', b'{"choices": [{"message": null}]}', body(5), body([{"type": "text", "text": GOOD}])),
    ],
)
def test_bodies_that_hold_no_reply(server, capsys, bad):
    """Each fails its own case only, and the reason is printed once, in one line."""
    server.replies = [bad]
    judge = ModelJudge(server.address, "")
    assert judge.verdicts([case(str(number)) for number in range(3)]) == [None] * 3 and judge.counts["failed"] == 3
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("lost, seconds", [(5, 0), (0, 0.5)])
def test_a_reply_that_breaks_off_or_does_not_come(server, monkeypatch, lost, seconds):
    """The other cases are judged; if no case is, an error is raised."""
    monkeypatch.setattr(judges, "PATIENCE", (1, 0.2))
    server.replies, judge = [GOOD], ModelJudge(server.address, "")
    assert judge.verdicts([case("one")])[0].yes
    server.lost, server.seconds = lost, seconds
    assert judge.verdicts([case("two")]) == [None] and judge.counts["failed"] == 1
    server.lost = server.seconds = 0
    assert judge.verdicts([case("two")])[0].yes


def test_a_reply_that_stops_half_way(server, monkeypatch):
    """Only the beginning arrives: that case fails, and the scoring continues."""
    monkeypatch.setattr(judges, "PATIENCE", (1, 0.2))
    server.replies, server.lost, server.hangs, judge = [GOOD], 5, threading.Event(), ModelJudge(server.address, "")
    try:
        assert judge.verdicts([case("one")]) == [None] and judge.counts["failed"] == 1
    finally:
        server.hangs.set()


def test_an_empty_reply_is_asked_for_by_the_next_scoring(server, tmp_path):
    server.replies, kept = [None], tmp_path / "replies.jsonl"
    assert ModelJudge(server.address, "", kept=kept).verdicts([case()]) == [None] and len(server.asked) == ATTEMPTS
    server.replies = [GOOD]
    assert ModelJudge(server.address, "", kept=kept).verdicts([case()])[0].yes


def test_two_cases_of_the_same_words_have_one_reply(tmp_path):
    """Also if both are asked at once: otherwise the next scoring, which finds one kept reply, gives other figures."""
    kept, number = tmp_path / "replies.jsonl", iter((1, 4))

    def call(sent):
        time.sleep(0.2)  # the other case comes meanwhile
        return judges.Reply(f"{{'pred': 'yes', 'score': {next(number)}}}", 10, 3)

    judge = ModelJudge("http://127.0.0.1:9/v1", "", kept=kept)
    judge._call = call
    first = [verdict.score for verdict in judge.verdicts([case(), case()])]
    later = ModelJudge("http://127.0.0.1:9/v1", "", kept=kept)
    again = later.verdicts([case(), case()])
    assert first == [verdict.score for verdict in again] and len(set(first)) == 1
    assert (judge.counts["kept replies"], judge.counts["tokens in"]) == (1, 10)
    assert (later.counts["kept replies"], later.counts["tokens in"]) == (2, 10)


@pytest.mark.parametrize("usage", [[1], {"prompt_tokens": "many"}, {"prompt_tokens": "1e400"}])
def test_a_reply_counts_whatever_the_tokens_are(server, usage):
    server.replies = [body(GOOD, usage).replace(b'"1e400"', b"1e400")]
    judge = ModelJudge(server.address, "")
    assert judge.verdicts([case()])[0].yes and judge.counts["tokens in"] == 0


def test_nobody_waits_for_a_slow_server():
    """A refused call ends the scoring although another call is still waiting; so does Ctrl-C."""
    judge, over = ModelJudge("http://127.0.0.1:9/v1", ""), threading.Event()

    def call(sent):
        if sent[0]["content"] == "slow":
            assert over.wait(60)
        raise InputError("refused")

    judge._call = call
    with pytest.raises(InputError, match="refused"):
        judge.verdicts([case("slow"), case("refused")])
    assert not over.is_set()
    over.set()


def test_a_password_in_the_address_is_not_shown(server):
    server.replies = [404]
    judge = ModelJudge(server.address.replace("//", "//me:secret@"), "")
    with pytest.raises(InputError, match="answered 404") as raised:
        judge.verdicts([case()])
    assert "secret" not in judge.name + str(raised.value)


def test_a_long_retry_after_is_not_waited_for(server, monkeypatch):
    monkeypatch.setattr(judges, "LONGEST_WAIT", 0.1)
    server.replies, server.headers = [429, GOOD], {"Retry-After": "3600"}
    assert ModelJudge(server.address, "").verdicts([case()])[0].yes


def test_busy_servers_are_asked_again(server, monkeypatch):
    server.replies = [503, 429, GOOD]
    judge = ModelJudge(server.address, "")
    judge._retry = judge._retry.new(backoff_factor=0)
    assert judge.verdicts([case()])[0].yes
    server.replies = [500]
    assert judge.verdicts([case("another")]) == [None]


@pytest.mark.parametrize("status, said", [(401, "check the key"), (404, "check the address")])
def test_wrong_addresses_and_keys_are_said(server, status, said, monkeypatch):
    monkeypatch.setattr(judges, "RETRIES", 0)
    server.replies = [status]
    with pytest.raises(InputError, match=said):
        ModelJudge(server.address, "").verdicts([case(str(n)) for n in range(20)])


def test_nobody_there(monkeypatch):
    monkeypatch.setattr(judges, "RETRIES", 0)
    with pytest.raises(InputError, match="cannot be reached"):
        ModelJudge("http://127.0.0.1:9/v1", "").verdicts([case()])
    with pytest.raises(InputError, match="give a URL"):
        ModelJudge("localhost", "")


def test_a_file_of_replies_that_was_cut_off(server, tmp_path):
    server.replies, kept = [GOOD], tmp_path / "replies.jsonl"
    ModelJudge(server.address, "", kept=kept).verdicts([case("one"), case("two")])
    kept.write_bytes(kept.read_bytes()[:-5])
    ModelJudge(server.address, "", kept=kept).verdicts([case("one"), case("two"), case("three")])
    assert len(server.asked) == 4
    ModelJudge(server.address, "", kept=kept).verdicts([case("one"), case("two"), case("three")])
    assert len(server.asked) == 4


def test_what_was_never_asked_is_wrong_without_a_judge(server):
    judge = ModelJudge(server.address, "")
    (verdict,) = judge.verdicts([Case([], "cat", [], read_leniently)])
    assert verdict == OfflineJudge().verdicts([Case([], "cat", [], read_leniently)])[0]
    assert verdict[:2] == (False, 0) and not server.asked


@pytest.mark.parametrize(
    "answer, prediction, right",
    [
        ("cat", "A cat.", True),
        ("cat", "a category", False),
        ("two", "2 dogs", True),
        ("dark blue", "It is dark blue", True),
        ("dark blue", "blue", False),
        ("cat", "", False),
        ("", "cat", False),
        ("the", "the", False),
        ("no", "Yes, there is no dog.", False),
        ("no", "It is not.", True),
        ("yes", "not sure, yes and no", True),
        ("yes", "Unsure", False),
    ],
)
def test_offline(answer, prediction, right):
    (verdict,) = OfflineJudge().verdicts([Case([], answer, [prediction], read_leniently)])
    assert verdict[:2] == (right, 5 if right else 0)
    assert "not the paper's" in OfflineJudge().name
