"""Load test for a running server: throughput, latencies, and answers compared with those without load.

    llamavid-serve --model demo/model &
    python -m benchmarks.serve_load --url http://127.0.0.1:8000 --films 8

Every question is first asked alone, which also encodes the videos.  Then each number of clients asks for `--seconds`,
each client in its own random order.  Prints the table of docs/serving.md, with the server's own metrics: the tokens a
second that its slots could produce while decoding, its CPU time per answer, and its memory.  Exit code 1 if an answer
was lost or differs from the one alone.  The videos show the demo's digits.
"""

import argparse
import collections
import http.client
import json
import os
import random
import tempfile
import threading
import time
import urllib.parse
from pathlib import Path

import numpy as np

from demo.digits import long_clip
from demo.make_data import write_video
from demo.questions import PHRASINGS

COLOURS, DIGITS = ("red", "white", "purple", "green"), ("0", "7", "8")
QUESTIONS = sorted({text.format(who=who) for text in PHRASINGS for who in (*COLOURS, *DIGITS)})


def chosen_questions(count: int) -> list[str]:
    return random.Random(0).sample(QUESTIONS, min(count, len(QUESTIONS)))


class Client:
    """A persistent connection."""

    def __init__(self, url: str, key: str):
        self.place = urllib.parse.urlsplit(url).netloc
        self.headers = {"Authorization": f"Bearer {key}"}
        self.connection = http.client.HTTPConnection(self.place, timeout=600)

    def send(self, method: str, path: str, body: bytes | None = None, kind: str = "application/json"):
        self.connection.request(method, path, body, {**self.headers, "Content-Type": kind})
        response = self.connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"{response.status}: {response.read()[:300].decode()}")
        return response

    def upload(self, path: Path) -> str:
        mark = "-" * 20 + os.urandom(8).hex()
        head = f'--{mark}\r\nContent-Disposition: form-data; name="file"; filename="{path.name}"\r\n\r\n'
        body = head.encode() + path.read_bytes() + f"\r\n--{mark}--\r\n".encode()
        return json.load(self.send("POST", "/v1/files", body, f"multipart/form-data; boundary={mark}"))["id"]

    def ask(self, model: str, film: str, question: str) -> tuple[str, list[float], int]:
        """The answer, the seconds after the request at which its words and its end came, and its number of tokens."""
        content = [{"type": "video_url", "video_url": {"url": film}}, {"type": "text", "text": question}]
        body = {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": 64, "stream": True}
        started, text, moments, tokens = time.perf_counter(), "", [], 0
        body["stream_options"] = {"include_usage": True}
        for line in self.send("POST", "/v1/chat/completions", json.dumps(body).encode()):
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                if "error" in event:
                    raise RuntimeError(event["error"]["message"])
                new = "".join(choice["delta"].get("content") or "" for choice in event["choices"])
                text += new
                moments += [time.perf_counter() - started] if new else []
                tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
        return text, [*moments, time.perf_counter() - started], tokens


def measured(client: Client) -> dict[str, float]:
    """The server's own metrics."""
    lines = client.send("GET", "/metrics").read().decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


def drawn(folder: Path, count: int) -> list[Path]:
    """Writes videos of half a minute to four minutes."""
    paths = [folder / f"film-{number}.mp4" for number in range(count)]
    for number, path in enumerate(paths):
        write_video(path, long_clip(np.random.default_rng(number), True, 30 * (1 + number % 8)), 1)
    return paths


def load(url: str, key: str, model: str, pairs, alone: dict, clients: int, seconds: float) -> tuple[str, int]:
    """A row of the table, and how many answers were lost or wrong."""
    done, wrong, end = [], [], time.perf_counter() + seconds

    def run(number: int) -> None:
        client, order = Client(url, key), random.Random(number)
        while time.perf_counter() < end:
            pair = order.choice(pairs)
            try:
                text, moments, tokens = client.ask(model, *pair)
            except Exception as error:  # lost, for whatever reason
                wrong.append(f"{pair}: {error}")
                client = Client(url, key)
                continue
            done.append((moments, tokens))
            if text != alone[pair]:
                wrong.append(f"{pair}: {text!r}, alone {alone[pair]!r}")

    started, before = time.perf_counter(), measured(Client(url, key))
    threads = [threading.Thread(target=run, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took, after = time.perf_counter() - started, measured(Client(url, key))
    steps, decoding = (
        after[f"llamavid_decode_{name}"] - before[f"llamavid_decode_{name}"] for name in ("steps", "seconds")
    )
    most = after["llamavid_slots"] * steps / max(decoding, 1e-9)
    cpu = (after["process_cpu_seconds_total"] - before["process_cpu_seconds_total"]) / max(len(done), 1)
    memory = " → ".join(f"{one['process_resident_memory_bytes'] / 1e6:.0f}" for one in (before, after))
    for line, times in collections.Counter(wrong).most_common(5):
        print(f"{times} x {line}")
    first, whole = ([moments[place] for moments, _ in done] for place in (0, -1))
    shown = [
        " / ".join(f"{value:.2f}" for value in np.percentile(times, (50, 95, 99))) if times else "-"
        for times in (first, whole)
    ]
    tokens = sum(tokens for _, tokens in done)
    row = f"| {clients} | {len(done)} | {len(done) / took:.1f} | {tokens / took:.0f} | {shown[0]} | {shown[1]} |"
    return f"{row} {most:.0f} | {1000 * cpu:.0f} | {memory} | {len(wrong)} |", len(wrong)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--key", default="none", metavar="KEY")
    parser.add_argument("--films", type=int, default=8, metavar="N", help="number of videos (8)")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32, 64], metavar="N")
    parser.add_argument("--seconds", type=float, default=20, metavar="S")
    parser.add_argument("--questions", type=int, default=40, metavar="N", help="questions about each video (40)")
    options = parser.parse_args()
    client = Client(options.url, options.key)
    model = json.load(client.send("GET", "/v1/models"))["data"][0]["id"]
    with tempfile.TemporaryDirectory() as folder:
        films = [client.upload(path) for path in drawn(Path(folder), options.films)]
    pairs = [(film, question) for film in films for question in chosen_questions(options.questions)]
    alone = {pair: client.ask(model, *pair)[0] for pair in pairs}
    print(f"{len(pairs)} questions about {len(films)} films, {len(set(alone.values()))} different answers\n")
    print(
        "| clients | answers | answers/s | tokens/s | first words, s: p50 / p95 / p99 | all: p50 / p95 / p99 ", end=""
    )
    print("| slots' tokens/s | CPU, ms | memory, MB | wrong |\n" + "|---" * 10 + "|", flush=True)
    failed = 0
    for number in options.clients:
        row, wrong = load(options.url, options.key, model, pairs, alone, number, options.seconds)
        print(row, flush=True)
        failed += wrong
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
