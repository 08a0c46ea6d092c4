"""Questions about a scene in several phrasings, with their short exact answers.

Scene -> [(type, question, answer)]; every answer follows from the scene's events alone.
"""

import numpy as np

from .digits import COLOURS, DIRECTIONS, Event, Scene, centres

Question = tuple[str, str, str]

# {who} names a digit by its colour or its value: "the red digit", "the 7"
DIGIT = ("Which digit is {who}?", "What digit is the {who} one?", "Name the {who} digit.")
CLIP_DIGIT = ("Which digit crosses the frame?", "Which digit appears?", "What digit is in the video?")
ONLY_COLOUR = ("What colour is the digit?", "Which colour does the digit have?", "Name the colour of the digit.")
COLOUR = ("What colour is the {who}?", "Which colour does the {who} have?", "Name the colour of the {who}.")
CLIP_COUNT = ("How many digits appear?", "How many digits cross the frame?", "Count the digits in the video.")
WAY = ("Which way does the {who} go?", "In which direction does the {who} move?", "Where does the {who} move?")
SECOND = (
    "At which second does the {who} appear?",
    "When does the {who} appear?",
    "At what second do we first see the {who}?",
)
AFTER = (
    "Which digit comes after the {who}?",
    "What digit follows the {who}?",
    "After the {who}, which digit comes next?",
)
BEFORE = (
    "Which digit comes before the {who}?",
    "What digit precedes the {who}?",
    "Which digit is seen just before the {who}?",
)
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")
CLIP_CAPTION = ("Describe the video.", "What happens in the video?")
CAPTION = ("Describe the picture.", "What is in the picture?", "Describe what you see.")
PHRASINGS = (
    *DIGIT, *CLIP_DIGIT, *ONLY_COLOUR, *COLOUR, *CLIP_COUNT, *WAY, *SECOND, *AFTER, *BEFORE, *CLIP_CAPTION, *CAPTION,
)  # fmt: skip


def clip_questions(rng: np.random.Generator, scene: Scene) -> list[Question]:
    """All questions about a short clip, including direction, order and second."""
    events = scene.events
    asked = [("count", _say(rng, CLIP_COUNT), str(len(events)))]
    for index, event in enumerate(events):
        if len(events) == 1:
            asked.append(("digit", _say(rng, CLIP_DIGIT), str(event.digit)))
            asked.append(("colour", _say(rng, ONLY_COLOUR), event.colour))
        asked.append(("digit", _say(rng, DIGIT, event.colour), str(event.digit)))
        asked.append(("colour", _say(rng, COLOUR, str(event.digit)), event.colour))
        asked.append(("way", _say(rng, WAY, _who(rng, scene, event)), event.direction))
        asked.append(("second", _say(rng, SECOND, _who(rng, scene, event)), str(event.start)))
        if index + 1 < len(events):
            asked.append(("after", _say(rng, AFTER, _who(rng, scene, event)), str(events[index + 1].digit)))
            asked.append(("before", _say(rng, BEFORE, _who(rng, scene, events[index + 1])), str(event.digit)))
    return asked


def clip_caption(rng: np.random.Generator, scene: Scene) -> Question:
    """All that happens in a short clip: second, colour, digit and direction of each, in order."""
    words = [f"second {event.start} {event.colour} {event.digit} {event.direction}" for event in scene.events]
    return "caption", _say(rng, CLIP_CAPTION), " ".join(words)


def long_questions(rng: np.random.Generator, scene: Scene) -> list[Question]:
    """The questions about the single event of a long clip."""
    (event,) = scene.events
    return [
        ("digit", _say(rng, CLIP_DIGIT), str(event.digit)),
        ("colour", _say(rng, ONLY_COLOUR), event.colour),
        ("way", _say(rng, WAY, "digit"), event.direction),
    ]


def caption(rng: np.random.Generator, scene: Scene) -> Question:
    """The caption of a scene's one digit: colour, digit, row and column of a 3 x 3 grid; "nothing" without a digit."""
    return "caption", _say(rng, CAPTION), _words(scene, scene.events[0]) if scene.events else "nothing"


def reference(rng: np.random.Generator, scene: Scene) -> Question:
    """Any question that names a digit by colour or value; the answer is its caption, or "nothing" if it is absent.

    From these the model first learns which part of an image a question is about.
    """
    if scene.events and rng.random() < 0.8:
        event = scene.events[rng.integers(len(scene.events))]
        colour, digit, words = event.colour, str(event.digit), _words(scene, event)
    else:
        colour = rng.choice([colour for colour in COLOURS if all(event.colour != colour for event in scene.events)])
        digit = str(rng.choice([n for n in range(10) if all(event.digit != n for event in scene.events)]))
        words = "nothing"
    phrasings, who = (
        (DIGIT, colour),
        (COLOUR, digit),
        *((phrasings, who) for phrasings in (WAY, SECOND, AFTER, BEFORE) for who in (f"{colour} digit", digit)),
    )[rng.integers(10)]
    return "reference", _say(rng, phrasings, who), words


def _words(scene: Scene, event: Event) -> str:
    places = centres(scene.side)
    column, row = (3 * places.index(at) // len(places) for at in event.path[0])
    return f"{event.colour} {event.digit} {ROWS[row]} {COLUMNS[column]}"


def corpus() -> list[str]:
    """Every phrasing with every word that may fill it, and every answer: the tokenizers are trained on these."""
    digits, colours = [str(n) for n in range(10)], list(COLOURS)
    names = digits + [f"{c} digit" for c in colours] + ["digit"]
    lines = [phrasing.format(who=who) for phrasing in PHRASINGS for who in names]
    answers = digits + colours + list(DIRECTIONS) + ["nothing"]
    captions = [f"{c} {d} {y} {x}" for c in colours for d in digits for y in ROWS for x in COLUMNS]
    return lines + answers + captions


def _say(rng: np.random.Generator, phrasings: tuple[str, ...], who: str = "") -> str:
    return phrasings[rng.integers(len(phrasings))].format(who=who)


def _who(rng: np.random.Generator, scene: Scene, event: Event) -> str:
    """A name that distinguishes this digit from the others."""
    names = [f"{event.colour} digit", str(event.digit)] + ["digit"] * (len(scene.events) == 1)
    return names[rng.integers(len(names))]
