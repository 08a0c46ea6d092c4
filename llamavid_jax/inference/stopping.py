"""Turns ids into text as they come: ends at stop strings, and streams only text that is final."""

from collections.abc import Sequence

from llamavid_jax.text.tokenizer import TextStream, Tokenizer


class RowText:
    """The text of one row as its ids come in.

    `push` takes new ids and returns the text that is safe to show: whole characters, and nothing that could still turn
    out to be the beginning of a stop string.  `stopped` is set once one is complete; `text` then ends before it.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]):
        self.ids: list[int] = []
        self.text = ""
        self.stopped = False
        self._stream, self._stop, self._shown = TextStream(tokenizer), tuple(stop), 0

    def push(self, ids: Sequence[int]) -> str:
        """Adds ids one by one, up to a stop string; returns the new safe text."""
        for token in ids:
            self.ids.append(token)
            self._add(self._stream.push(token))
            if self.stopped:
                break
        return self._show(len(self.text) if self.stopped else len(self.text) - self._held())

    def finish(self) -> str:
        """The rest, once no more ids come."""
        if not self.stopped:
            self._add(self._stream.finish())
        return self._show(len(self.text))

    def _add(self, new: str) -> None:
        self.text += new
        found = [at for stop in self._stop if (at := self.text.find(stop, self._shown)) >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True

    def _held(self) -> int:
        """How much of the end may be the beginning of a stop string."""
        return max((n for stop in self._stop for n in range(1, len(stop)) if self.text.endswith(stop[:n])), default=0)

    def _show(self, end: int) -> str:
        new, self._shown = self.text[self._shown : end], max(self._shown, end)
        return new
