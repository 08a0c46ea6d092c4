"""Makes training videos of a minute to an hour: one to three digits each, and a question as in `demo.length`.

    python -m demo.films MODEL OUT [--films MINUTES:NUMBER ...] [--review N]

    OUT/films.json     a question per video, and short clips with three questions each, to prevent forgetting
    OUT/features/*.npz the vision tower's features at one frame a second: feats [F, P, E] in 16 bits

The digits are images of the training split.  A video's frames without a digit are all equal: each distinct frame is
encoded once, and an hour's file is small because it is compressed.
"""

import json
import sys
from pathlib import Path

import numpy as np

from llamavid_jax import LLaMAVIDLlavaForConditionalGeneration, LLaMAVIDLlavaProcessor
from llamavid_jax.commands.program import keep_programs
from llamavid_jax.errors import InputError, Parser, command

from . import digits, questions
from .length import KINDS, different_frames, needle
from .make_data import TURNS, choose, generator, record, short_clip

FILMS = ("1:1800", "4:240", "10:400", "30:120", "60:160")


def film_features(model, images, scene: digits.Scene) -> np.ndarray:
    """Features [F, P, E] of one frame a second, the CLS token first, float16."""
    frames, places = different_frames(scene, 1.0)
    (pixels,) = images(videos=frames)["pixel_values"]
    return model.vision_features(pixels).astype(np.float16)[places]


def films(spec: str, seed: int):
    """(name, scene, questions) for the videos of one `spec`; the kinds of questions alternate."""
    minutes, _, count = spec.partition(":")
    if not (minutes.isdecimal() and count.isdecimal() and int(minutes)):
        raise InputError(f"--films has {spec!r}; write MINUTES:NUMBER, such as 10:160")
    for number in range(int(count)):
        kind = KINDS[number % len(KINDS)]
        one = needle(kind, 60 * int(minutes), number // len(KINDS), seed, test=False)
        yield f"film-{minutes}-{number}", one.scene, [(kind, one.question, one.answer)]


def clips(count: int, seed: int):
    """The same for clips of 8 s with three questions each."""
    for number in range(count):
        rng = generator("film review", number, seed)
        scene = short_clip(rng, test=False)
        yield f"clip-{number}", scene, choose(rng, questions.clip_questions(rng, scene), TURNS["instruct"])


@command()
def main(arguments: list[str] | None = None) -> int:
    """Writes the features and the JSON file."""
    parser = Parser(prog="films", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--films", nargs="*", default=FILMS, metavar="MINUTES:NUMBER")
    parser.add_argument("--review", type=int, default=5000, help="number of short clips")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    keep_programs()
    model = LLaMAVIDLlavaForConditionalGeneration.from_pretrained(options.model, dtype="float32")
    images = LLaMAVIDLlavaProcessor.from_pretrained(options.model).image_processor
    (options.out / "features").mkdir(parents=True, exist_ok=True)
    records = []
    for source in [*(films(spec, options.seed) for spec in options.films), clips(options.review, options.seed)]:
        for name, scene, asked in source:
            path = f"features/{name}.npz"
            np.savez_compressed(options.out / path, feats=film_features(model, images, scene))
            made = record(name, path, asked, test=False)
            records.append(made | {"features": made.pop("video")})
    (options.out / "films.json").write_text(json.dumps(records) + "\n")
    print(f"{len(records)} records")
    return 0


if __name__ == "__main__":
    sys.exit(main())
