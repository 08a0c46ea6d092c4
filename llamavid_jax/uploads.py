"""Uploads what is written at a bucket's local path: a file, a whole folder, logs as they grow.

    FOLDER/gs/bucket/model/ ── send_folder ──▶ gs://bucket/model/.unfinished, weights/..., config.json

The file that makes a folder complete, such as a model's config.json, is sent last and deleted first.  Until it is sent,
the folder holds UNFINISHED, a list of the files to come, by which the next process recognises what a killed one left.
"""

import contextlib
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from llamavid_jax.buckets import asked, kind, listing, status, status_of, url
from llamavid_jax.errors import InputError, OutageError

UNFINISHED = ".unfinished"
AT_ONCE = 8  # requests at a time


def put(file: Path) -> None:
    """Uploads a file and keeps it writable, as it may grow; does nothing outside buckets."""
    if (address := url(file)) is not None:
        with asked(address) as (store, key):
            store.put_file(str(file), key)
            os.utime(file, ns=(time.time_ns(), status_of(store.info(key)).time))


def send(file: Path) -> None:
    """Uploads a file; the local one is then a read-only copy, like a fetched one."""
    if url(file):
        put(file)
        file.chmod(0o444)


def send_folder(folder: Path, last: str) -> None:
    """Sends all files below a folder, the one called `last` after the others."""
    if url(folder) is None:
        return
    files = [file for file in folder.rglob("*") if file.is_file() and file != folder / last]
    marker = folder / UNFINISHED
    names = (os.path.relpath(file, folder) for file in (folder / last, *files))
    with asked(url(marker)) as (store, key):
        store.pipe_file(key, "\n".join((f"{os.getpid()} on {socket.gethostname()}", *names)).encode())
    claim = Claim(marker)
    together(send, files)
    if holder := claim.holder():
        raise InputError(f"{folder} was taken over by another process ({holder}), which makes it anew")
    send(folder / last)
    remove(marker)


def discard_unfinished(folder: Path) -> None:
    """Deletes what a killed `send_folder` has left, here and in the bucket, unless other files are among it."""
    if url(folder) and kind(folder / UNFINISHED):
        with asked(url(folder / UNFINISHED)) as (store, key):
            _, last, *names = store.cat_file(key).decode().split("\n")
        if listing(folder).keys() <= {last, *names, UNFINISHED}:
            delete(folder, first=last)


def delete(folder: Path, first: str = "") -> None:
    """Deletes all files below a folder, here and in its bucket, the one called `first` before the others."""
    names = listing(folder).keys()
    for some in (names & {first}, names - {first, UNFINISHED}, names & {UNFINISHED}):
        together(remove, [folder / name for name in some])
    shutil.rmtree(folder, ignore_errors=True)


def remove(file: Path) -> None:
    """Deletes a file, here and in its bucket, if it exists."""
    file.unlink(missing_ok=True)
    if url(file):
        with asked(url(file)) as (store, key), contextlib.suppress(FileNotFoundError):
            store.rm_file(key)


def move(source: Path, target: Path) -> None:
    """Renames a folder in its bucket, object by object."""
    delete(target)
    to = url(target).partition("://")[2]
    with asked(url(source)) as (store, key):
        together(lambda name: store.cp_file(f"{key}/{name}", f"{to}/{name}"), listing(source))
    delete(source)


def together(action: Callable[[Any], object], items: Iterable[Any]) -> None:
    """Applies `action` to all items, AT_ONCE at a time.  If one fails, no more are started and its error is raised."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for _ in pool.map(action, items):
            pass


class Claim:
    """A file that says which process writes a folder: its latest writer does, and earlier writers notice.

    It replaces a lock, which nobody would release for a process that was killed.
    """

    def __init__(self, file: Path):
        self.file, self._version = file, status(file)

    def holder(self) -> str:
        """Who has written the file since (its first line); empty if nobody has."""
        if not kind(self.file):
            return f"its {self.file.name} is gone"
        if status(self.file) == self._version:
            return ""
        with asked(url(self.file)) as (store, key):
            return store.cat_file(key).decode(errors="replace").partition("\n")[0]


@contextlib.contextmanager
def sending(
    folder: Path,
    mine: Callable[[str], bool] = lambda name: True,
    report: Callable[[str], None] | None = None,
    taken: Callable[[], str] = str,
    every: float = 30.0,
) -> Iterator[Callable[[], None]]:
    """While the block runs, uploads files below `folder` that are written here and for which `mine(name)` is True.

    It uploads every `every` seconds, at the block's end, and when the yielded function is called, but nothing once
    `taken()` says that another process writes the folder.  Hidden files stay local.  The first failure is passed to
    `report`; without `report`, failures outside the periodic uploads are raised.
    """
    if url(folder) is None:
        yield lambda: None
        return
    sent: dict[Path, tuple[int, int]] = {}
    over, one_at_a_time, failed = threading.Event(), threading.Lock(), []

    def changed() -> Iterator[Path]:
        for file in sorted(folder.rglob("*")) if folder.is_dir() else [folder]:
            is_hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
            if not is_hidden and not file.name.endswith(".lock") and mine(file.name) and file.is_file():
                found = file.stat()
                if found.st_mode & 0o200 and sent.get(file) != (found.st_size, found.st_mtime_ns):
                    yield file

    def send_changed() -> None:
        with one_at_a_time:
            for file in () if taken() else changed():
                put(file)
                found = file.stat()
                sent[file] = found.st_size, found.st_mtime_ns

    def tried(quietly: bool = False) -> None:
        try:
            send_changed()
        except (InputError, OutageError, OSError) as error:
            if report is None and not quietly:
                raise
            if report is not None and not failed:
                failed.append(error)
                report(f"{folder}: logs cannot be sent ({error}); the run goes on without them")

    def now_and_then() -> None:
        while not over.wait(every):
            tried(quietly=True)

    for file in folder.iterdir() if folder.is_dir() else [folder]:
        if mine(file.name) and file.is_file():
            file.chmod(0o644)  # a fetched copy is read-only, and this one will grow
    thread = threading.Thread(target=now_and_then, daemon=True)
    thread.start()
    try:
        yield tried
    finally:
        over.set()
        thread.join()
        tried()
