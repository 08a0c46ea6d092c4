"""Turning ids into text while they come: stop strings, and whole characters only for a streamer."""

from collections.abc import Sequence
from typing import Any


class RowText:
    """The text of one row as its ids come in.

    Each `push` takes new ids and returns the text that is safe to show: whole characters, and nothing that could still
    turn out to be the beginning of a stop string.  `stopped` is set when one is complete; `text` then ends before it.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str]):
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.ids: list[int] = []
        self.text = ""
        self.shown = 0
        self.stopped = False

    def push(self, ids: Sequence[int]) -> str:
        """Adds ids one by one up to a stop string; returns the new safe text."""
        for token in ids:
            if self.stopped:
                break
            self.ids.append(token)
            self.text = self.tokenizer.decode(self.ids)
            found = [at for stop in self.stop if (at := self.text.find(stop)) >= 0]
            if found:
                self.text, self.stopped = self.text[: min(found)], True
        return self._show(len(self.text) if self.stopped else self._safe())

    def finish(self) -> str:
        """The rest, once no more ids come."""
        return self._show(len(self.text))

    def _show(self, end: int) -> str:
        new = self.text[self.shown : max(end, self.shown)]
        self.shown += len(new)
        return new

    def _safe(self) -> int:
        """Where the text ends that no further id can change."""
        end = len(self.text.rstrip("\N{REPLACEMENT CHARACTER}"))  # bytes of a character that is not whole yet
        held = [size for stop in self.stop for size in range(1, len(stop)) if self.text[:end].endswith(stop[:size])]
        return end - max(held, default=0)
