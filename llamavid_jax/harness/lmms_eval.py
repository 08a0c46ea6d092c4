"""The chat model `llamavid_jax` of lmms-eval (0.7.3):

    python -m lmms_eval --model llamavid_jax --model_args checkpoint=llamavid-7b-336 --tasks mme --batch_size 8

    request ─ doc_to_messages ─▶ images, videos, text ─ Session ─▶ ids, tokens ─ a batch per length bucket ─▶ answers

Videos are read here, one frame a second, and encoded once for all questions about them.  A request that cannot be
answered gets an empty answer and is reported.  The task's `until` is not used: the model ends its answers, as in the
original.
"""

import collections
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm

from llamavid_jax import LLaMAVIDLlavaForConditionalGeneration, LLaMAVIDLlavaImageProcessor
from llamavid_jax.commands.program import keep_programs
from llamavid_jax.errors import InputError, say
from llamavid_jax.inference.session import Session
from llamavid_jax.parallel.mesh import make_mesh, parse_mesh
from llamavid_jax.shapes import bucket

MAX_NEW_TOKENS = 128  # for tasks that set none


class Asked(NamedTuple):
    """A request: its images and videos, its text, and its generation settings."""

    images: list[Any]
    videos: list[str]
    text: str
    settings: tuple[tuple[str, Any], ...]


class Ready(NamedTuple):
    """A row of a batch, and the index of its request."""

    place: int
    ids: list[int]
    tokens: list[np.ndarray]


class LlamaVidJax(lmms):
    """`checkpoint` is a converted checkpoint; `mesh`, such as "tensor=4", shards it over this process's devices."""

    is_simple = False

    def __init__(
        self,
        checkpoint: str,
        dtype: str = "bfloat16",
        quantize: str | None = None,
        mesh: str = "",
        fps: float = 1.0,
        template: str = "vicuna_v1",
        batch_size: int | str = 8,
        **harness: Any,
    ):
        """`harness`: `device` and `max_batch_size`, which lmms-eval passes to every model and JAX does not need."""
        super().__init__()
        if unknown := harness.keys() - {"device", "max_batch_size"}:
            raise InputError(f"--model_args has {', '.join(sorted(unknown))}, which llamavid_jax does not know")
        keep_programs()
        self.model = LLaMAVIDLlavaForConditionalGeneration.from_pretrained(
            checkpoint, dtype=dtype, quantize=quantize, mesh=make_mesh(**parse_mesh(mesh)) if mesh else None
        )
        self.image_processor = LLaMAVIDLlavaImageProcessor.from_pretrained(checkpoint)
        self.fps, self.template, self.batch = fps, template, int(batch_size)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The answers in the requests' order."""
        asked = [self._read(request.args) for request in requests]
        answers, waiting = [""] * len(requests), collections.defaultdict(list)
        with tqdm(total=len(requests), desc="llamavid_jax") as bar:

            def answer(rows: list[Ready]) -> None:
                for row, text in zip(rows, self._answers(rows, asked[rows[0].place].settings), strict=True):
                    context, _, settings, *_ = requests[row.place].args
                    self.cache_hook.add_partial("generate_until", (context, settings), text)
                    answers[row.place] = text
                bar.update(len(rows))
                rows.clear()

            for places in same_media(asked):
                shown = {"images": asked[places[0]].images, "videos": asked[places[0]].videos, "fps": self.fps}
                more = {"template": self.template, "follow_ups": len(places) > 1}
                session = Session(self.model, self.image_processor, **shown, **more)
                for place in places:
                    try:
                        ids, tokens = session.inputs(asked[place].text)
                    except InputError as error:
                        say(f"request {place} is not asked: {error}")
                        bar.update()
                        continue
                    rows = waiting[asked[place].settings, bucket(len(ids) + sum(map(len, tokens)))]
                    rows.append(Ready(place, ids, tokens))
                    if len(rows) == self.batch:
                        answer(rows)
            for rows in waiting.values():
                if rows:
                    answer(rows)
        return answers

    def _read(self, arguments: tuple) -> Asked:
        _, doc_to_messages, settings, doc_id, task, split = arguments
        messages = ChatMessages(messages=doc_to_messages(self.task_dict[task][split][doc_id]))
        images, videos, audios = messages.extract_media()
        if len(messages.messages) != 1 or audios:
            raise InputError(f"{task} has several turns or sound; llamavid_jax takes one turn of pictures and words")
        parts = messages.messages[0].content
        if any(part.type == "video" and (part.start_time is not None or part.end_time is not None) for part in parts):
            raise InputError(f"{task} asks about a part of a video; llamavid_jax takes whole ones")
        text = "\n".join(part.text for part in parts if part.type == "text")
        return Asked(images, videos, text, tuple(sampling(settings, task).items()))

    def _answers(self, rows: Sequence[Ready], settings: tuple[tuple[str, Any], ...]) -> list[str]:
        """Answers rows together; if one of them cannot be answered, each on its own."""
        try:
            ids, tokens = [row.ids for row in rows], [row.tokens for row in rows]
            output = self.model.generate(ids, visual_tokens=tokens, **dict(settings))
            return [text.strip() for text in output.texts]
        except InputError as error:
            if len(rows) > 1:
                return [text for row in rows for text in self._answers([row], settings)]
            say(f"request {rows[0].place} is not answered: {error}")
            return [""]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError("llamavid_jax answers in words: take a task of output_type generate_until")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise NotImplementedError("llamavid_jax answers one turn: take a task of output_type generate_until")


def sampling(settings: dict[str, Any], task: str) -> dict[str, Any]:
    """The arguments of `generate` for a task's generation_kwargs; greedy unless these sample."""
    if (settings.get("num_beams") or 1) > 1:
        raise InputError(f"{task} searches with {settings['num_beams']} beams; give --gen_kwargs num_beams=1")
    temperature = float(settings.get("temperature") or 0) if settings.get("do_sample", True) else 0.0
    length = int(settings.get("max_new_tokens") or MAX_NEW_TOKENS)
    return {"max_new_tokens": length, "temperature": temperature, "top_p": settings.get("top_p") or 1.0}


def same_media(asked: Sequence[Asked]) -> list[list[int]]:
    """Indices of the requests about the same videos, as groups; a request with images is a group by itself."""
    groups: dict[Hashable, list[int]] = collections.defaultdict(list)
    for place, one in enumerate(asked):
        groups[place if one.images or not one.videos else tuple(map(str, one.videos))].append(place)
    return list(groups.values())
