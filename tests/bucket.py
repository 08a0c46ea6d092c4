"""A bucket on this machine: an in-memory emulator, with injected faults.

`python -m tests.bucket FOLDER` starts one and prints the variables that lead to it.
"""

import contextlib
import functools
import logging
import re
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import fsspec
from gcp_storage_emulator.handlers.buckets import create_bucket
from gcp_storage_emulator.server import RequestHandler
from gcp_storage_emulator.storage import Storage

from llamavid_jax.buckets import file_system

NAME = "films"


class Bucket:
    """gs://films; `url` is its address and `env` the variables that lead a process to it."""

    def __init__(self, port: int, places: Path):
        self.url, self.faults, self.seen = f"gs://{NAME}", [], []
        here = f"http://127.0.0.1:{port}"
        self.env = {
            "STORAGE_EMULATOR_HOST": here,
            "TENSORSTORE_GCS_HTTP_URL": here,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "abc",
            "GOOGLE_CLOUD_PROJECT": "tests",
            "FSSPEC_GCS_TOKEN": "anon",
            "LLAMAVID_BUCKETS": str(places),
        }

    def fail(self, what: str, how: int | float | str, times: int = 1) -> None:
        """The next `times` requests like `what` ("PUT .*weights") get a status, wait for seconds, or are "reset"."""
        self.faults.append([re.compile(what), how, times])

    @property
    def store(self) -> fsspec.AbstractFileSystem:
        return file_system("gs")

    def put(self, source: Path, name: str) -> str:
        """Uploads a local file or folder; returns its address."""
        files = [source] if source.is_file() else [file for file in source.rglob("*") if file.is_file()]
        for file in files:
            inside = "" if file == source else f"/{file.relative_to(source)}"
            self.store.pipe_file(f"{NAME}/{name}{inside}", file.read_bytes())
        return f"{self.url}/{name}"

    def get(self, name: str, target: Path) -> Path:
        """Downloads a folder to `target`."""
        for inside, content in self.files(name).items():
            file = target / inside
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        return target

    def files(self, name: str) -> dict[str, bytes]:
        """The files below a folder: path → content."""
        prefix = f"{NAME}/{name}/"
        found = self.store.find(prefix.rstrip("/"))
        return {one.removeprefix(prefix): self.store.cat_file(one) for one in found if one.startswith(prefix)}


class Faulty(RequestHandler):
    """The emulator's request handler with faults; it handles one request at a time."""

    bucket: Bucket
    one_at_a_time, counting = threading.Lock(), threading.Lock()

    def parse_request(self) -> bool:
        if not super().parse_request():
            return False
        line = f"{self.command} {self.path}"
        self.bucket.seen.append(line)
        how = self.fault(line)
        if isinstance(how, int):
            self.refuse(how)
        elif how == "reset":
            self.rfile.read(min(int(self.headers.get("Content-Length") or 0), 100))
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        else:
            time.sleep(how)
        return isinstance(how, float)

    def fault(self, line: str) -> int | float | str:
        with self.counting:
            for fault in self.bucket.faults:
                what, how, times = fault
                if times and what.search(line):
                    fault[2] -= 1
                    return how
        return 0.0

    def handle(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            super().handle()

    def answer(self, method: str) -> None:
        """Answers as the emulator, and also checks preconditions and returns the object's version.

        TensorStore needs both: several threads update the one manifest of a checkpoint's arrays.
        """
        path, query = urlsplit(self.path).path, parse_qs(urlsplit(self.path).query)
        name = query["name"][0] if "name" in query else unquote(path.partition("/o/")[2])
        with self.one_at_a_time:
            version = self.storage.objects.get(NAME, {}).get(name, {}).get("generation", "0")
            if query.get("ifGenerationMatch", [version]) != [version]:
                return self.refuse(412)
            if version != "0" and query.get("ifGenerationNotMatch") == [version]:
                return self.refuse(304)
            self.version = version
            getattr(super(), f"do_{method}")()

    def refuse(self, status: int) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_error(status)

    def end_headers(self) -> None:
        if self.command == "GET" and (version := self.__dict__.pop("version", "0")) != "0":
            self.send_header("x-goog-generation", version)
        super().end_headers()


for method in ("GET", "POST", "PUT", "DELETE", "PATCH"):
    setattr(Faulty, f"do_{method}", functools.partialmethod(Faulty.answer, method))


class Objects(Storage):
    """The emulator's objects, with unique version numbers in microseconds, as Google's."""

    newest = 0

    def create_file(self, bucket_name, file_name, content, file_obj, file_id=None) -> None:
        self.newest = max(self.newest + 1, time.time_ns() // 1000)
        file_obj["generation"] = str(self.newest)
        super().create_file(bucket_name, file_name, content, file_obj, file_id)

    def _write_config_to_file(self) -> None:
        """Does nothing; the emulator would write the whole listing again for each object."""


class Server(ThreadingHTTPServer):
    request_queue_size = 128  # connections; any more would wait for a second


@contextlib.contextmanager
def emulated(places: Path) -> Iterator[Bucket]:
    """`with emulated(folder) as bucket`: an empty bucket, whose local copies are in `places`."""
    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
    storage = Objects(use_memory_fs=True)
    create_bucket(NAME, storage)
    handler = type("Handler", (Faulty,), {})
    server = Server(("127.0.0.1", 0), functools.partial(handler, storage))
    handler.bucket = Bucket(server.server_address[1], places)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield handler.bucket
    finally:
        server.shutdown()
        server.server_close()


if __name__ == "__main__":
    with emulated(Path(sys.argv[1])) as bucket:
        print(*(f"export {name}={value}" for name, value in bucket.env.items()), sep="\n", flush=True)
        threading.Event().wait()
