"""A cache of videos' features in a folder: a later question, on another day, needs no vision tower.

    content of the video, sampling, processing, tower  ─ SHA-256 ─▶  NAME.safetensors, a feature file

An entry is found by the video's content, never by a file's name.  It is written under a temporary name and renamed: of
two writers the later one wins, and a reader never sees half an entry.  Checksums are verified while it is read.  Beyond
the size limit the least recently used entries are deleted.  A folder that cannot be used is reported once, and the
session continues without a cache.
"""

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llamavid_jax.buckets import is_address
from llamavid_jax.copies import evict
from llamavid_jax.errors import InputError
from llamavid_jax.files import local
from llamavid_jax.media.feature_file import SUFFIX, Description, FeatureWriter, name_of
from llamavid_jax.media.features import describe, iter_features
from llamavid_jax.media.source import MediaError

DEFAULT_BYTES = 20 * 10**9  # eight hours of film at one frame a second, for the 7B models
LEFT_OVER = 24 * 3600.0  # seconds after which an unfinished file is deleted
OWN = re.compile(r"\.?[0-9a-f]{40}\.safetensors(\..+\.part)?")  # other files in the folder are the user's and stay


class DamagedEntryError(Exception):
    """The next frames of a cache entry are damaged; those before them are right."""


class FeatureCache:
    """`find(key)` looks an entry up, `keep(key, ...)` writes one as frames pass; `notice(text)` reports problems."""

    def __init__(self, folder: str | Path, limit: int = DEFAULT_BYTES, notice: Callable[[str], None] = lambda _: None):
        if limit < 1:
            raise InputError(f"the cache's size is {limit} bytes; give it more than 0")
        if is_address(folder):
            raise InputError(f"the cache is {folder}; give a folder on a disk, which is faster")
        self.folder, self.limit, self.notice, self._has_said = local(folder), limit, notice, False

    def path(self, key: Mapping[str, Any]) -> Path:
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:40]
        return self.folder / f"{name}{SUFFIX}"

    def find(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """The entry's description, or None if it is absent or damaged; the entry counts as used now."""
        path = self.path(key)
        try:
            if not path.exists():
                return None
            found = describe(path)
            if found is not None and found.get("key") == dict(key):
                os.utime(path)
                return found
        except MediaError:
            pass
        except OSError as error:
            self._say(error)
            return None
        self.drop(key)
        return None

    def frames(self, key: Mapping[str, Any]) -> Iterator[np.ndarray]:
        """Yields the entry's frames, with their CLS token if they have it.

        An entry that is damaged, or that another process has just deleted, is dropped and raises DamagedEntryError.
        """
        try:
            yield from iter_features(self.path(key), keep_cls=True)
        except MediaError as error:
            self.drop(key)
            raise DamagedEntryError(str(error)) from None

    def drop(self, key: Mapping[str, Any]) -> None:
        with contextlib.suppress(OSError):
            self.path(key).unlink(missing_ok=True)

    def keep(
        self,
        key: Mapping[str, Any],
        frames: Iterator[np.ndarray],
        count: Callable[[], int],
        describe: Callable[[], Description | None],
    ) -> Iterator[np.ndarray]:
        """Yields `frames` while it writes them; the entry exists once all `count()` have passed.

        `count` is called at the first frame, `describe` after the last; if that returns None, nothing is kept.
        """
        writer = None
        try:
            for number, frame in enumerate(frames):
                if number == 0:
                    writer = self._writer(key, count(), frame)
                if writer is not None:
                    writer = self._tried(writer, writer.add, frame)
                yield frame
            if writer is not None and writer.frames == count() and (said := describe()):
                writer = self._tried(writer, writer.commit, said, key=dict(key))
                self._evict()
        finally:
            if writer is not None:
                writer.discard()

    def _writer(self, key: Mapping[str, Any], count: int, frame: np.ndarray) -> FeatureWriter | None:
        if count * frame.size * frame.dtype.itemsize > self.limit:
            self.notice(
                f"the features of {count} frames are larger than the cache, {self.limit} bytes; see --cache-size"
            )
            return None
        try:
            return FeatureWriter(self.path(key), count, name_of(frame.dtype))
        except OSError as error:
            self._say(error)
            return None

    def _tried(
        self, writer: FeatureWriter, step: Callable[..., None], *given: Any, **more: Any
    ) -> FeatureWriter | None:
        """Runs a step; returns the writer, or None if the step failed."""
        try:
            step(*given, **more)
            return writer
        except (OSError, MediaError) as error:
            self._say(error)
            return None

    def _say(self, error: Exception) -> None:
        if not self._has_said:
            self._has_said = True
            reason = getattr(error, "strerror", None) or error
            self.notice(f"the cache {self.folder} cannot be used ({reason}); going on without it")

    def _evict(self) -> None:
        """Frees space: deletes leftovers of killed processes, then the least recently used entries."""
        found = []
        with contextlib.suppress(OSError):
            for entry in os.scandir(self.folder):
                with contextlib.suppress(OSError):  # another process has just deleted it
                    if OWN.fullmatch(entry.name):
                        found.append((entry.stat().st_mtime, entry.stat().st_size, entry.path))
        left_over = {path for used, _, path in found if path.endswith(".part") and time.time() - used > LEFT_OVER}
        for path in left_over:
            with contextlib.suppress(OSError):
                os.unlink(path)
        evict([one for one in found if one[2] not in left_over], self.limit, lambda path: path.endswith(".part"))
