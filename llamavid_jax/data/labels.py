"""Training examples from text: a record's conversation -> ids [T], labels [T] and the Q-Former's prompts.

Labels are the ids of the answers, and -100 elsewhere.  The masks reproduce the original's, arithmetic included: the
instruction of a round counts as two ids fewer than its own tokenisation gives, and a sample whose rounds do not add up
to its length is ignored as a whole, with a warning.

Deviation: if the template is not guided, the original has no prompts; see `conversation.training_turns`.
"""

import dataclasses
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32

from llamavid_jax.shapes import IGNORE_LABEL
from llamavid_jax.text.conversation import ConversationError, Template, prompt, template_named, training_turns
from llamavid_jax.text.tokenizer import Tokenizer, encode_with_images


@dataclasses.dataclass(frozen=True)
class TextExample:
    """The text of one training sample; prompts[i] belongs to the i-th placeholder if every user turn has one.

    `ignored` says why no token has a label; it is empty if one has.
    """

    input_ids: Int32[np.ndarray, " T"]
    labels: Int32[np.ndarray, " T"]
    prompts: list[str]
    ignored: str = ""


def training_example(
    template_name: str,
    conversations: Sequence[Any],
    tokenizer: Tokenizer,
    has_image: bool,
    image_sides: Iterable[int] = (),
    movie: str | None = None,
    max_length: int | None = None,
    start_end: bool = False,
) -> TextExample:
    """A record's `conversations` -> TextExample (the original's `preprocess`).

    `has_image`: the record has an image or video.  If not, `<image>` is ordinary text, and the ids are cut at
    `max_length` (by default the tokenizer's); otherwise the caller cuts.  `image_sides`, `movie`, `start_end`: see
    `conversation.training_turns`.
    """
    template = template_named(template_name)
    max_length = max_length or tokenizer.max_length
    turns, prompts = training_turns(template, conversations, has_image, image_sides, movie, start_end)

    with_images = has_image or template.masking == "caption"

    def encode(text: str) -> list[int]:
        return encode_with_images(tokenizer, text) if with_images else tokenizer.encode(text)

    spans: list[tuple[int, int]] = []  # what is not an answer
    if template.masking == "caption":
        text = turns[0] + turns[1] + template.assistant.closing
        spans = [(0, len(encode(turns[0])))]
    elif template.masking == "turns":
        text, spans = _marked_turns(template, turns, encode)
    else:
        text = prompt(template, turns, open_answer=False)
    input_ids = np.array(encode(text) if with_images else encode(text)[:max_length], np.int32)
    labels = input_ids.copy()
    for start, stop in spans:
        labels[start:stop] = IGNORE_LABEL
    if template.masking == "rounds":
        _mask_rounds(labels, text, template, encode, tokenizer.pad_id, max_length)
    ignored = why_ignored(template, turns, input_ids, tokenizer.pad_id) if (labels == IGNORE_LABEL).all() else ""
    return TextExample(input_ids, labels, prompts, ignored)


def check_template(template_name: str, tokenizer: Tokenizer) -> None:
    """Raises ConversationError if no sample of this template would have a label with this tokenizer.

    The lengths of rounds add up where `</s>` is one token, as in LLaMA's tokenizer and not in those of other models.
    """
    talk = [{"from": speaker, "value": "What?"} for speaker in ("human", "gpt") * 2]
    if template_named(template_name).masking == "rounds":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            example = training_example(template_name, talk, tokenizer, has_image=False, max_length=10**30)
        if example.ignored:
            raise ConversationError(
                f"with this {tokenizer.FILE} no token would be trained in template {template_name!r}: the lengths of "
                "its rounds do not add up; use llava_v0 or plain_guided, or a language model with Vicuna's tokenizer"
            )


def why_ignored(template: Template, turns: Sequence[str], input_ids: np.ndarray, pad_id: int) -> str:
    """Why a sample with these turns has nothing to train on."""
    marks = ["</s>", template.answer_marker.strip()] if template.masking == "rounds" else []
    for number, turn in enumerate(turns):
        found = next((mark for mark in marks if mark in turn), None)
        if found:
            return f"turn {number} holds {found!r}, which the template writes between turns; remove it"
        if not turn:
            return f"turn {number} is empty; give it words, or remove its round"
    if len(turns) % 2:
        return "its last turn has no answer; remove it, or add one"
    if pad_id in input_ids:
        return "a turn holds the token that stands for padding, <unk>; remove it"
    return "the lengths of its rounds do not add up to that of its text; remove white space around the turns"


def _mask_rounds(labels, text: str, template: Template, encode, pad_id: int, max_length: int) -> None:
    """Masks instructions in place, round by round.  A round is a question and its answer, up to `</s>`."""
    total = int(np.sum(labels != pad_id))
    labels[:1] = IGNORE_LABEL
    position = 1
    for round_text in text.split("</s>"):
        parts = round_text.split(template.answer_marker)
        if len(parts) != 2:  # also for the empty rest after the last answer
            break
        instruction = len(encode(parts[0] + template.answer_marker)) - 2
        labels[position : position + instruction] = IGNORE_LABEL
        position += len(encode(round_text))
    labels[position:] = IGNORE_LABEL
    if position < max_length and position != total:
        labels[:] = IGNORE_LABEL
        warnings.warn(
            f"the sample is ignored: its rounds have {position} tokens, its text {total} (it begins {text[:60]!r})",
            stacklevel=3,
        )


def _marked_turns(template: Template, turns: Sequence[str], encode) -> tuple[str, list[tuple[int, int]]]:
    """LLaVA v0's training text, "### Human: ...", and the spans that are not answers, counted turn by turn."""
    names = [role.opening.removesuffix(": ") for role in (template.user, template.assistant)]
    header = template.system + "\n\n"
    marked = [f"### {names[index % 2]}: {turn}\n" for index, turn in enumerate(turns)]
    position = len(encode(header))
    spans = [(0, position)]
    for index, turn in enumerate(marked):
        end = position + len(encode(turn))
        if index % 2 == 0:
            spans.append((position + 2, end))
        position = end
    return header + "".join(marked) + "### ", spans
