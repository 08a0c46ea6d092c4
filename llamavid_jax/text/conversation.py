"""Conversations as text: the templates, the prompt for an answer, and how a conversation is prepared for training.

A conversation is a list of turns, strings that alternate user, assistant, user, ...; `<image>` in a turn is the
placeholder of one visual.
Flow:  record or chat -> turns -> `prompt(template, turns)` -> text for the LLaMA tokenizer
                              -> `prompts`: what the Q-Former reads, one string per visual.

Deviations from the original: a later turn of a long-video sample gets no extra `<image>` (a bug of the original: the
placeholders would no longer match the frames); unknown template names are errors instead of another template.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from llamavid_jax.errors import InputError
from llamavid_jax.shapes import END, START

IMAGE = "<image>"  # the original's DEFAULT_IMAGE_TOKEN
MOVIE_START = "Below is a movie. Memorize the content and answer my question after watching this movie."
MOVIE_END = "Now the movie end."


class ConversationError(InputError):
    """Text that cannot be used: a conversation, a template name, a tokenizer file."""


def check_text(text: object, name: str = "the text") -> None:
    """Raises ConversationError for what no tokenizer can read: not a string, or one with half a surrogate pair."""
    if not isinstance(text, str):
        raise ConversationError(f"{name} is {text!r}, of type {type(text).__name__}; a string is needed")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConversationError(f"{name} holds half a surrogate pair at character {error.start}; remove it") from None


@dataclasses.dataclass(frozen=True)
class Role:
    """How one speaker's turn is written: opening + words + closing, or just `empty` if the turn has no words.

    An answer that is still to come is such a turn, so a prompt for inference ends in `empty`.
    """

    opening: str
    closing: str
    empty: str


@dataclasses.dataclass(frozen=True)
class Template:
    """One conversation format.

    `system_form` formats the system text (`{}`); `system_in_turn` puts it inside the first user turn.  `masking`
    selects how labels are made (`data/labels.py`): "rounds" splits at `answer_marker`, "caption" keeps all but the
    placeholder, "turns" counts turn by turn.  `guided`: training gives the Q-Former each user turn's words.
    `image_every_turn`: training repeats the placeholder in every later user turn.  `image_only`: a user turn keeps only
    its placeholders (only the Q-Former gets its words).
    """

    user: Role
    assistant: Role
    masking: str
    answer_marker: str = ""
    system: str = ""
    system_form: str = ""
    system_in_turn: bool = False
    guided: bool = False
    image_every_turn: bool = False
    image_only: bool = False


def _system(person: str) -> str:
    return (
        f"A chat between a curious {person} and an artificial intelligence assistant. "
        f"The assistant gives helpful, detailed, and polite answers to the {person}'s questions."
    )


_VICUNA = Template(
    user=Role("USER: ", " ", "USER:"),
    assistant=Role("ASSISTANT: ", "</s>", "ASSISTANT:"),
    masking="rounds",
    answer_marker=" ASSISTANT: ",
    system=_system("user"),
    system_form="{} ",
)
_PLAIN = Template(user=Role("", "", ""), assistant=Role("", "\n", ""), masking="caption", image_only=True)

TEMPLATES: Mapping[str, Template] = {
    "vicuna_v1": _VICUNA,
    "imgsp_v1": dataclasses.replace(_VICUNA, guided=True, image_every_turn=True),
    "llava_v1": dataclasses.replace(_VICUNA, system=_system("human")),
    "plain": _PLAIN,
    "plain_guided": dataclasses.replace(_PLAIN, guided=True),
    "llava_llama_2": Template(
        user=Role("<s>[INST] ", " [/INST]", ""),
        assistant=Role(" ", " </s>", ""),
        masking="rounds",
        answer_marker="[/INST] ",
        system="You are a helpful language and vision assistant. You are able to understand the visual content that "
        "the user provides, and assist the user with a variety of tasks using natural language.",
        system_form="<<SYS>>\n{}\n<</SYS>>\n\n",
        system_in_turn=True,
    ),
    "llava_v0": Template(
        user=Role("Human: ", "###", "Human:"),
        assistant=Role("Assistant: ", "###", "Assistant:"),
        masking="turns",
        system=_system("human"),
        system_form="{}###",
    ),
}


def template_named(name: str) -> Template:
    """The template called `name`, such as "vicuna_v1"; ConversationError if there is none."""
    if not isinstance(name, str) or name not in TEMPLATES:
        raise ConversationError(f"there is no conversation template {name!r}; the templates are {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def question_turn(visuals: int, words: str) -> str:
    """A user's turn: a placeholder for each visual, each on its own line, as in training, before the words."""
    return "\n".join([IMAGE] * visuals + [words] * bool(words))


def prompt(template: Template, turns: Sequence[str], open_answer: bool = True) -> str:
    """Renders turns, user first.  After a user turn, `open_answer` adds the answer's opening, `ASSISTANT:`."""
    if not turns:
        raise ConversationError("the conversation has no turns; give at least one user turn")
    system = template.system_form.format(template.system)
    text = "" if template.system_in_turn else system
    for index, words in enumerate([*turns, ""] if open_answer and len(turns) % 2 else turns):
        role = (template.user, template.assistant)[index % 2]
        if role is template.user and template.image_only:
            words = IMAGE * words.count(IMAGE)
        if index == 0 and template.system_in_turn:
            words = system + words
        text += role.opening + words + role.closing if words else role.empty
    return text.removeprefix("<s>")  # the tokenizer adds the first one itself


def question_per_image(template: Template, text: str) -> list[str]:
    """The user's words around each `<image>` of a finished prompt: by default the Q-Former's prompts at inference.

    Newlines are kept.  Text without the template's role names counts as the words of one turn.
    """
    opening = template.user.opening.removeprefix("<s>")
    closing = (template.user.closing + template.assistant.opening).strip()
    questions, at = [], text.find(IMAGE)
    while at >= 0:
        start = text.rfind(opening, 0, at) if opening else -1
        end = text.find(closing, at) if closing else -1
        words = text[start + len(opening) if start >= 0 else 0 : end if end >= 0 else len(text)]
        if template.system_in_turn:
            words = words.split(template.system_form.split("{}")[1])[-1]
        questions.append(words.replace(IMAGE, "").strip())
        at = text.find(IMAGE, at + len(IMAGE))
    return questions


def long_video_text(frames_and_subtitles: str, question: str, tokens_per_frame: int, start_end: bool = False) -> str:
    """The user turn of a long video at inference (section "movie" of the original's entry points).

    `frames_and_subtitles` holds one `<image>` per frame with the subtitles between them; each becomes
    `tokens_per_frame` placeholders.
    """
    return movie_text(frames_and_subtitles, tokens_per_frame, start_end) + "\n" + question


def movie_text(frames_and_subtitles: str, tokens_per_frame: int, start_end: bool = False) -> str:
    """The part of `long_video_text` before the question."""
    return marked(MOVIE_START + movie_inputs(frames_and_subtitles, tokens_per_frame) + MOVIE_END, start_end)


def marked(text: str, start_end: bool) -> str:
    """`text`, the placeholders of a visual, between start and end tokens if the model has them."""
    return f"{START}{text}{END}" if start_end else text


def movie_inputs(frames_and_subtitles: str, tokens_per_frame: int, training: bool = False) -> str:
    """One placeholder per visual token; training also deletes every '...' of the subtitles."""
    text = frames_and_subtitles.replace("...", "") if training else frames_and_subtitles
    return text.replace(IMAGE, IMAGE * tokens_per_frame)


def training_turns(
    template: Template,
    conversations: Sequence[Any],
    has_image: bool,
    image_sides: Iterable[int],
    movie: str | None = None,
    start_end: bool = False,
) -> tuple[list[str], list[str]]:
    """A training record's `conversations` -> (turns, prompts for the Q-Former).

    `image_sides` put the later turns' placeholders at the start (0) or the end (1), in order; see `draw_image_sides`.
    `movie` replaces `<image>` in a long-video sample.  `start_end` puts tokens around the first placeholders and around
    a movie.  As in the original, it puts none around the placeholders of later turns and captions, and the prompts keep
    these tokens as words.  If the template is not guided, the original has no prompts; here every user turn with a
    placeholder then gives one.
    """
    speakers, turns = speakers_and_turns(conversations)
    movie_prompt = None
    if movie is not None:
        asked = [turn for turn in turns if IMAGE in turn]
        if not asked:
            raise ConversationError(f"a long-video sample needs {IMAGE} in a turn, but none of its {len(turns)} has it")
        movie_prompt = asked[-1].replace(IMAGE, "").strip()
        turns = [turn.replace(IMAGE, marked(movie, start_end)) for turn in turns]
    elif has_image:
        turns = [_image_first(turn).replace(IMAGE, marked(IMAGE, start_end)) for turn in turns]

    if template.masking == "caption":
        if len(turns) != 2 or speakers != ["human", "gpt"] or IMAGE not in turns[0]:
            raise ConversationError(
                f"a caption sample is one human turn with {IMAGE} and one gpt turn, but this one has {len(turns)} turns"
            )
        turns_with_image = [IMAGE, turns[1]]
    else:
        if speakers[0] != "human":
            speakers, turns = speakers[1:], turns[1:]
        if not turns or speakers != ["human", "gpt"] * (len(turns) // 2) + ["human"] * (len(turns) % 2):
            order = ", ".join(speakers) or "none"
            raise ConversationError(f"turns must alternate human, gpt, human, ..., but these are {order}")
        repeat = template.image_every_turn and movie is None
        turns_with_image = _image_in_later_turns(turns, image_sides) if repeat else turns

    if movie_prompt is not None:
        return turns_with_image, [movie_prompt]
    return turns_with_image, [_training_prompt(turn) for turn in turns[::2] if template.guided or IMAGE in turn]


def draw_image_sides(seed: int, turns: int) -> list[int]:
    """The side at which each later turn of a sample gets its placeholder, drawn from the seed: 0 start, 1 end."""
    return np.random.default_rng(seed).integers(0, 2, turns).tolist()


def speakers_and_turns(conversations: Sequence[Any]) -> tuple[list[str], list[str]]:
    """The speakers and the words of a record's turns.  Raises ConversationError."""
    if isinstance(conversations, str | Mapping) or not isinstance(conversations, Sequence) or not conversations:
        raise ConversationError(f"conversations is {conversations!r}; give a list of turns with 'from' and 'value'")
    for index, turn in enumerate(conversations):
        if isinstance(turn, Mapping) and {"role", "content"} <= set(turn):
            raise ConversationError(
                f"turn {index} has 'role' and 'content', as chat templates write them; a turn of LLaVA's format is "
                '{"from": "human" or "gpt", "value": TEXT}'
            )
        if not isinstance(turn, Mapping) or not {"from", "value"} <= set(turn):
            raise ConversationError(f"turn {index} is {turn!r}; it needs the keys 'from' and 'value'")
        if turn["from"] not in ("human", "gpt"):
            raise ConversationError(f"turn {index} is from {turn['from']!r}; use 'human' or 'gpt'")
        check_text(turn["value"], f"the value of turn {index}")
    return [turn["from"] for turn in conversations], [turn["value"] for turn in conversations]


def _image_first(turn: str) -> str:
    return question_turn(1, turn.replace(IMAGE, "").strip()) if IMAGE in turn else turn


def _image_in_later_turns(turns: Sequence[str], image_sides: Iterable[int]) -> list[str]:
    """After a turn with a placeholder every later user turn gets one, at the drawn side."""
    sides, seen, result = iter(image_sides), False, []
    for index, turn in enumerate(turns):
        seen = seen or IMAGE in turn
        if index % 2 == 0 and seen and IMAGE not in turn:
            side = next(sides, None)
            if side not in (0, 1):
                raise ConversationError(f"image_sides gives {side!r} for turn {index}; give a 0 or a 1 per user turn")
            turn = f"{turn}\n{IMAGE}" if side else f"{IMAGE}\n{turn}"  # with its newline even if the turn is empty
        result.append(turn)
    return result


def _training_prompt(turn: str) -> str:
    """Newlines are deleted, not replaced by spaces, so the words on both sides run together."""
    return turn.replace(IMAGE, "").replace("\n", "")
