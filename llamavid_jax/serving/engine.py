"""Continuous batching: answers join and leave a decode batch that runs in a thread of its own.

    submit ─▶ waiting ─ a free slot ─▶ prefilling, chunk by chunk ─ join ─▶ running, block by block ─▶ on_piece

Between two blocks of decode steps at most PREFILL_POSITIONS of new prompts are run; prompts take turns.  So a long
prompt delays neither running answers nor the short prompts after it.  Up to rounding in the model's type, a row's
greedy ids do not depend on the other rows, and neither do ids that are sampled with a seed.
"""

import collections
import sys
import threading
import time
import traceback
from collections.abc import Sequence

import jax
import numpy as np

from llamavid_jax.inference.generate import (
    BLOCK_STEPS,
    EVIDENCE_TOKENS,
    SMALLEST_LENGTH,
    decode_block,
    evidence,
    extend,
    longer,
)
from llamavid_jax.inference.model import LLaMAVIDLlavaForConditionalGeneration
from llamavid_jax.inference.request import Settings
from llamavid_jax.inference.sampling import Sampling
from llamavid_jax.inference.stopping import RowText
from llamavid_jax.models.kv_cache import KeysValues
from llamavid_jax.serving.batch import (
    SCORED,
    empty_batch,
    empty_row,
    join,
    prompt_of,
    prompt_sizes,
    resized,
    score,
)
from llamavid_jax.serving.jobs import Job, Piece, Running, Scores
from llamavid_jax.shapes import TEXT, Row, bucket, pad_rows

CHUNKS = (128, 512)  # positions of a prompt that are run at a time
PREFILL_POSITIONS = 1024  # between two blocks of decode steps
HURRIED_STEPS = 4  # of a block while others wait, so that a free slot is filled sooner
PREFILLING = 4  # prompts at a time: each holds keys and values beside the batch's


class Engine:
    """The engine's thread, its queue and its slots.  `max_new_tokens` is the most that a job may ask for."""

    def __init__(self, model: LLaMAVIDLlavaForConditionalGeneration, slots: int = 8, max_new_tokens: int = 512):
        self.model, self.slots, self.max_new_tokens = model, slots, max_new_tokens
        self.sizes = prompt_sizes(model.config.text_config.max_length, CHUNKS[-1])  # in positions, of prompts
        self.room = bucket(max_new_tokens + BLOCK_STEPS, SMALLEST_LENGTH)  # in positions, of answers
        self.steps, self.decoding = 0, 0.0  # decoded so far, and their seconds; a step gives each row a token
        self._waiting: collections.deque[Job] = collections.deque()
        self._prefilling: collections.deque[Running] = collections.deque()
        self._running: dict[int, Running] = {}
        self._changed, self._stopping = threading.Condition(), False
        self._state = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # ---- for other threads

    def start(self) -> float:
        """Compiles every program that answers may need, or reads it from disk; returns the seconds that took."""
        started = time.perf_counter()
        with self.model.on_mesh():
            self._warm()
        self._thread.start()
        return time.perf_counter() - started

    def submit(self, job: Job) -> None:
        """Queues a job; its row must fit the model's positions, and its answer ends with them at the latest."""
        with self._changed:
            self._waiting.append(job)
            self._changed.notify()

    def stop(self) -> None:
        """Ends the thread after its block.  Remaining jobs finish with "error"."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def counts(self) -> dict[str, int]:
        """How many jobs wait for a slot, are being prefilled, and run."""
        return {
            "waiting": len(self._waiting),
            "prefilling": len(self._prefilling),
            "running": len(self._running),
        }

    # ---- the engine's thread

    def _run(self) -> None:
        with self.model.on_mesh():
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._stopping or self._waiting or self._prefilling or self._running)
                    if self._stopping:
                        break
                try:
                    self._drop_cancelled()
                    self._prefill()
                    self._decode()
                except Exception:  # such as too little memory: these answers are lost, the server goes on
                    traceback.print_exc(file=sys.stderr)
                    self._lose()
            self._lose()

    def _lose(self) -> None:
        """Ends all jobs that have begun, and empties the batch; if the engine stops, ends waiting jobs too."""
        with self._changed:
            left = [one.job for one in (*self._running.values(), *self._prefilling)]
            left += self._waiting if self._stopping else []
            self._running.clear()
            self._prefilling.clear()
            self._state = None
            if self._stopping:
                self._waiting.clear()
        for job in left:
            job.on_piece(Piece("", 0, "error"))

    def _drop_cancelled(self) -> None:
        with self._changed:
            self._waiting = collections.deque(job for job in self._waiting if not job.cancelled)
            self._prefilling = collections.deque(one for one in self._prefilling if not one.job.cancelled)
            self._running = {slot: one for slot, one in self._running.items() if not one.job.cancelled}

    def _admit(self) -> None:
        """Gives free slots to waiting jobs."""
        taken = {one.slot for one in (*self._running.values(), *self._prefilling)}
        free = [slot for slot in range(self.slots) if slot not in taken]
        while free and self._waiting and len(self._prefilling) < PREFILLING:
            with self._changed:
                job = self._waiting.popleft()
            size = next(size for size in self.sizes if len(job.row.token_ids) <= size)
            text = RowText(self.model.tokenizer, job.settings.stop)
            self._prefilling.append(Running(job, free.pop(0), text, size))

    def _prefill(self) -> None:
        """Runs chunks of prompts, in turn; a row whose prompt is done joins the batch."""
        left = PREFILL_POSITIONS
        self._admit()
        while self._prefilling and left > 0:
            one = self._prefilling[0]
            left -= self._chunk(one)
            self._prefilling.rotate(-1)
            if one.start >= len(one.job.row.token_ids):
                self._prefilling.remove(one)
            self._admit()

    def _chunk(self, one: Running) -> int:
        """Runs the next chunk of a prompt; after the last one the row joins.  Returns how many positions were run."""
        row, length = one.job.row, len(one.job.row.token_ids)
        if one.prompt is None:
            one.token, one.prompt = empty_row(self.model.structure, self.model.params, one.size)
        size = next((size for size in CHUNKS if size >= length - one.start), CHUNKS[-1])
        part = slice(one.start, one.start + size)
        index = row.visual_index[part]
        visual = np.zeros((1, size, self.model.config.text_config.hidden_size), self.model.dtype)
        visual[0, : len(index)][index != TEXT] = one.job.table[index[index != TEXT]]
        places = np.where(index == TEXT, TEXT, np.arange(len(index), dtype=np.int32))
        columns = pad_rows([row.token_ids[part]], 1, size, 0), visual, pad_rows([places], 1, size, TEXT)
        one.token, keys, one.prompt = self._extend(one.token, one.prompt, columns, one.start, length, one.job.settings)
        one.start += size
        if one.start >= length:
            self._fit([one.size, *(other.size for other in self._running.values())])
            self._state = join(self._state, np.int32(one.slot), one.prompt, one.token, keys, np.int32(length))
            one.prompt = None
            self._running[one.slot] = one
        return size

    def _extend(self, token, prompt: KeysValues, columns, start: int, length: int, settings: Settings):
        """Token, random key, and keys and values after a chunk; `columns`: its ids, visual tokens and their indices."""
        arrays = np.int32(start), np.array([length], np.int32), np.uint32(settings.seed), _sampling([settings])
        # a temperature of 0 is greedy anyway, so one program is enough
        return extend(self.model.structure, self.model.params, token, prompt, *columns, *arrays, greedy=False)

    def _fit(self, sizes: Sequence[int]) -> None:
        """Gives the batch room for prompts of `sizes`, and not more."""
        if self._state is None:
            empty = self.model.structure, self.model.params, self.slots, max(sizes), self.room
            self._state = empty_batch(*empty)
        elif self._state.cache.prompt.slots != max(sizes):
            self._state = resized(self._state, slots=max(sizes))

    def _decode(self) -> None:
        """Runs a block of steps for all running rows, and hands on their new text."""
        if not self._running:
            return
        settings = [
            self._running[slot].job.settings if slot in self._running else Settings() for slot in range(self.slots)
        ]
        done = np.array([slot not in self._running for slot in range(self.slots)])
        eos = self.model.config.text_config.eos_token_id
        started, steps = time.perf_counter(), HURRIED_STEPS if self._waiting or self._prefilling else BLOCK_STEPS
        self._state, tokens = decode_block(
            self.model.structure,
            self.model.params,
            self._state._replace(done=done),
            np.int32(steps),
            np.int32(eos),
            _sampling(settings),
            greedy=all(one.temperature == 0 for one in settings),
        )
        tokens = np.asarray(tokens)[:, :steps]
        self.steps += steps
        self.decoding += time.perf_counter() - started
        for slot, one in list(self._running.items()):
            if not one.job.cancelled and self._tell(one, tokens[slot].tolist(), eos):
                with self._changed:
                    del self._running[slot]

    def _tell(self, one: Running, ids: list[int], eos: int) -> bool:
        """Hands on the text of a block's ids; returns whether the answer has ended."""
        length, positions = len(one.job.row.token_ids), self.model.config.text_config.max_length
        left = min(one.job.settings.max_new_tokens, positions - length) - one.new
        ids = ids[:left]
        ended = eos in ids
        ids = ids[: ids.index(eos)] if ended else ids
        one.new += len(ids)
        text = one.text.push(ids)
        is_last = ended or one.text.stopped or len(ids) == left
        text += one.text.finish() if is_last else ""  # it may complete a stop string, too
        finish = None if not is_last else "stop" if ended or one.text.stopped else "length"
        own = one.job.row, one.text.ids
        looked_at = self._evidence(*own, self._prompt(one)) if finish and one.job.evidence else None
        scores = self._scores(*own, self._prompt(one)) if finish and one.job.scores else None
        one.job.on_piece(Piece(text, len(one.text.ids), finish, looked_at, one.text.ids, scores))
        return finish is not None

    def _prompt(self, one: Running) -> KeysValues:
        """The row's prompt, which stays in its slot until another row joins there."""
        return prompt_of(self._state, np.int32(one.slot), slots=one.size)

    def _evidence(self, row: Row, ids: list[int], prompt: KeysValues) -> np.ndarray:
        """The answer's attention to the visual tokens, by one program for answers of all lengths."""
        return evidence(self.model.structure, self.model.params, [row], [ids], prompt, EVIDENCE_TOKENS)[0]

    def _scores(self, row: Row, ids: list[int], prompt: KeysValues) -> Scores:
        """Scores of an answer, from a pass over it after its prompt, whose last position is run again."""
        prompt = longer(prompt, slots=prompt.slots + self.room + SCORED)
        before, made = [int(row.token_ids[-1]), *ids], []
        for at in range(0, max(len(ids), 1), SCORED):
            columns = (pad_rows([given[at : at + SCORED]], 1, SCORED, 0) for given in (before, ids))
            start = np.int32(len(row.token_ids) - 1 + at)
            *of_chunk, prompt = score(self.model.structure, self.model.params, prompt, *columns, start)
            made.append([np.asarray(array)[0] for array in of_chunk])
        return Scores(*(np.concatenate(arrays)[: len(ids)].tolist() for arrays in zip(*made, strict=True)))

    def _warm(self) -> None:
        """Runs every program once, for each of the sizes that its arrays may have."""
        weights, eos = (self.model.structure, self.model.params), np.int32(self.model.config.text_config.eos_token_id)
        width, zero, rows = self.model.config.text_config.hidden_size, np.int32(0), {}
        for size in self.sizes:
            token, prompt = empty_row(*weights, size)
            for chunk in CHUNKS:
                ids = np.zeros((1, chunk), np.int32)
                columns = ids, np.zeros((1, chunk, width), self.model.dtype), np.full_like(ids, TEXT)
                token, keys, prompt = self._extend(token, prompt, columns, 0, 1, Settings())
            rows[size] = prompt, token, keys
        nobody, sampling = np.ones(self.slots, bool), _sampling([Settings()] * self.slots)
        for size in self.sizes:
            state = empty_batch(*weights, self.slots, size, self.room)
            for other in self.sizes:
                if other <= size:
                    state = join(state, zero, *rows[other], np.int32(1))
                    prompt = prompt_of(state, zero, slots=other)
                if other != size:
                    resized(state, slots=other)
            for greedy in (True, False):
                state = state._replace(done=nobody)
                state, _ = decode_block(*weights, state, zero, eos, sampling, greedy=greedy)
            row = Row(np.zeros(1, np.int32), np.full(1, TEXT, np.int32), None)
            self._evidence(row, [], prompt)
            self._scores(row, [0], prompt)
        jax.block_until_ready(state)


def _sampling(settings: Sequence[Settings]) -> Sampling:
    """The sampling settings of all rows, as arrays `[B]`."""
    return Sampling(
        np.array([one.temperature for one in settings], np.float32),
        np.array([one.top_k for one in settings], np.int32),
        np.array([one.top_p for one in settings], np.float32),
    )
