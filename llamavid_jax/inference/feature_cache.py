"""Features of videos that were asked about before, in a folder: the next question, on another day, needs no tower.

    content of the video, sampling, processing, tower  ─ SHA-256 ─▶  NAME.safetensors, a feature file

An entry is found by what it is of, never by a file's name.  It is written aside and renamed, so that of two writers the
later one wins and a reader never meets half of one; its sums are checked while it is read.  Beyond the limit those go
that have not been used for longest.  A folder that cannot be written to is said once, and then there is no cache.
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
LEFT_OVER = 24 * 3600.0  # seconds after which a file that nobody finished is taken away
OWN = re.compile(r"\.?[0-9a-f]{40}\.safetensors(\..+\.part)?")  # all else in the folder is somebody's: it stays


class DamagedEntryError(Exception):
    """Frames of the cache cannot be used; those that came before are right."""


class FeatureCache:
    """`find(key)` an entry, or `keep(key, ...)` frames as they come.  `notice(text)` is told what goes wrong, once."""

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
        """The description of the entry, which counts as used now; None where there is none or it is damaged."""
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
        """The entry's frames, with the CLS token where they have it.  One that is damaged, or that another process has
        just taken away, is dropped, and DamagedEntryError raised."""
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
        """Passes `frames` on while it writes them; the entry is there when all `count()` have come.

        Both functions are called once frames have come, `describe` after the last one; None keeps nothing.
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
        """The writer after a step; None where that failed."""
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
        """Makes room: entries by their last use, after what was left over by processes that were killed."""
        found = []
        with contextlib.suppress(OSError):
            for entry in os.scandir(self.folder):
                with contextlib.suppress(OSError):  # another process has just taken it away
                    if OWN.fullmatch(entry.name):
                        found.append((entry.stat().st_mtime, entry.stat().st_size, entry.path))
        left_over = {path for used, _, path in found if path.endswith(".part") and time.time() - used > LEFT_OVER}
        for path in left_over:
            with contextlib.suppress(OSError):
                os.unlink(path)
        evict([one for one in found if one[2] not in left_over], self.limit, lambda path: path.endswith(".part"))
