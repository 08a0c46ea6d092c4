"""How long a video the demo model can answer about: needles of 5 s in an empty video of a minute to eight hours.

    python -m demo.length MODEL ANSWERS.jsonl [--minutes 1 10 60 180 480] [--questions N] [--every SECONDS]
                                                [--beyond HOW] [--picture OUT]

A needle is a digit that crosses the frame.  Three kinds of questions: `locate` (one needle: which digit, what colour,
which way), `order` (two: which comes before or after) and `count` (one to three).  A video's frames without a needle
are all equal, so each distinct frame is encoded once and its visual tokens are repeated.  Answers are appended to the
file as they come, and those in it are not asked again.  The file is for one model; the table and the figure show all
of it.

Three ways to go beyond the positions that the model was trained for:

    extend    the positions continue
    stretch   they are divided, as in the long-video checkpoints (but without training for it)
    thin      fewer frames a second, as with `infer.py --fit`
"""

import collections
import dataclasses
import math
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llamavid_jax import LLaMAVIDLlavaForConditionalGeneration, LLaMAVIDLlavaProcessor
from llamavid_jax.commands.program import keep_programs
from llamavid_jax.errors import Parser, command
from llamavid_jax.evaluation.answers import llm_prompt
from llamavid_jax.evaluation.identity import model_identity
from llamavid_jax.evaluation.items import mean
from llamavid_jax.evaluation.store import open_store, read_rows
from llamavid_jax.text.tokenizer import encode_with_images

from . import digits, questions
from .make_data import generator

KINDS, BEYOND = ("locate", "order", "count"), ("extend", "stretch", "thin")
WORDS = 64  # positions kept for the question and its answer
MAX_NEW_TOKENS = 8


@dataclasses.dataclass(frozen=True)
class Needle:
    """A question about a video that is never written to disk."""

    scene: digits.Scene
    question: str
    answer: str


def needle(kind: str, seconds: int, number: int, seed: int = 0, test: bool = True, side: int = digits.SIDE) -> Needle:
    """Question `number` of a kind about a video of `seconds`; both depend on the arguments alone."""
    rng = generator(f"{kind} {seconds}" if test else f"train {kind} {seconds}", number, seed)
    scene = digits.long_clip(rng, test, seconds, {"locate": 1, "order": 2, "count": 1 + number % 3}[kind], side)
    if kind == "locate":
        asked = questions.long_questions(rng, scene)
    else:
        wanted = ("before", "after") if kind == "order" else ("count",)
        asked = [one for one in questions.clip_questions(rng, scene) if one[0] in wanted]
    return Needle(scene, *asked[number % len(asked)][1:])


def different_frames(scene: digits.Scene, every: float) -> tuple[np.ndarray, list[int]]:
    """The distinct frames of a video sampled every `every` seconds, the empty one first, and each sample's index."""
    taken = np.arange(0, scene.seconds, every).tolist()
    shown = [second for second in taken if any(event.centre(second) for event in scene.events)]
    empty = [second for second in taken if second not in shown][:1]
    index = {second: place for place, second in enumerate(shown, len(empty))}
    return np.stack([digits.frame(scene, at) for at in empty + shown]), [index.get(second, 0) for second in taken]


def film_tokens(model, images, needle: Needle, every: float) -> np.ndarray:
    """Visual tokens `[F·(n+1), D]` of one frame every `every` seconds."""
    frames, places = different_frames(needle.scene, every)
    (pixels,) = images(videos=frames)["pixel_values"]
    tokens = model.visual_tokens(pixels, [needle.question])[0].reshape(len(frames), model.config.tokens_per_frame, -1)
    return tokens[places].reshape(-1, tokens.shape[-1])


def answers(model, images, needles: Sequence[Needle], every: float) -> Iterator[dict[str, Any]]:
    """Yields a row for each needle; all are answered together."""
    started = time.perf_counter()
    tokens = [film_tokens(model, images, one, every) for one in needles]
    ids = [encode_with_images(model.tokenizer, llm_prompt(one.question, "vicuna_v1", 1)) for one in needles]
    output = model.generate(ids, visual_tokens=[[own] for own in tokens], max_new_tokens=MAX_NEW_TOKENS)
    seconds = (time.perf_counter() - started) / len(needles)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    for one, text, count in zip(needles, output.texts, output.visual_tokens, strict=True):
        said = {"question": one.question, "truth": one.answer, "answer": text.strip()}
        yield {**said, "tokens": count, "seconds": round(seconds, 3), "peak_mb": peak}


def fitted(model, seconds: int, beyond: str, every: float = 1.0) -> tuple[Any, float]:
    """The model with positions for a video of `seconds`, and the seconds from one frame to the next."""
    text, needed = model.config.text_config, math.ceil(seconds / every) * model.config.tokens_per_frame + WORDS
    if needed <= text.max_length:
        return model, every
    if beyond == "thin":
        return model, every * math.ceil(needed / (0.9 * text.max_length))
    if beyond == "stretch":
        text = dataclasses.replace(text, rope_factor=float(math.ceil(needed / text.max_position_embeddings)))
    else:
        text = dataclasses.replace(text, max_position_embeddings=math.ceil(needed / text.rope_factor))
    config = dataclasses.replace(model.config, text_config=text)
    tokenizers = {"tokenizer": model.tokenizer, "qformer_tokenizer": model.qformer_tokenizer}
    return type(model)(config, model.params, dtype=model.dtype, **tokenizers), every


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line per length and way, longest last; accuracy with its standard error."""
    heads = ["film", "a frame every", "beyond its positions", "tokens", *KINDS, "s a question", "memory, GB"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for (minutes, beyond, every), own in sorted(grouped(rows, "minutes", "beyond", "every").items()):
        kinds = grouped(own, "kind")
        cells = [f"{minutes} min", f"{every:g} s", beyond or "–", f"{own[0]['tokens']:,}"]
        cells += [percent(kinds[kind,]) if (kind,) in kinds else "–" for kind in KINDS]
        seconds = float(np.median([row["seconds"] for row in own]))
        lines.append(f"| {' | '.join(cells)} | {seconds:.3g} | {max(row['peak_mb'] for row in own) / 1024:.1f} |")
    return "\n".join(lines)


def percent(rows: Sequence[dict[str, Any]]) -> str:
    found = mean([float(row["answer"] == row["truth"]) for row in rows], 100.0)
    return f"{found.value:.0f} % ± {found.error or 0:.0f} ({found.count})"


def grouped(rows: Sequence[dict[str, Any]], *names: str) -> dict[tuple, list[dict[str, Any]]]:
    groups = collections.defaultdict(list)
    for row in rows:
        groups[tuple(row[name] for name in names)].append(row)
    return groups


def draw(rows: Sequence[dict[str, Any]], picture: Path) -> None:
    import matplotlib.pyplot as plt  # here: it comes with the extra `demo`

    plt.switch_backend("agg")
    figure, axes = plt.subplots(1, len(KINDS), figsize=(11, 3.2), sharey=True, layout="constrained")
    for axis, kind in zip(axes, KINDS, strict=True):
        for beyond in BEYOND:
            lengths = grouped([row for row in rows if row["kind"] == kind and row["beyond"] in ("", beyond)], "minutes")
            found = [mean([float(row["answer"] == row["truth"]) for row in lengths[key]], 100.0) for key in lengths]
            points = sorted((key[0], one.value, one.error or 0) for key, one in zip(lengths, found, strict=True))
            if points:
                minutes, values, errors = zip(*points, strict=True)
                axis.errorbar(minutes, values, errors, marker="o", capsize=3, label=beyond)
        axis.set(title=kind, xlabel="minutes of film", xscale="log", ylim=(-3, 103))
        axis.set_xticks(ticks := sorted({row["minutes"] for row in rows}), ticks)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("exact answers, %")
    axes[-1].legend(title="beyond the positions")
    figure.savefig(picture, dpi=110)


@command()
def main(arguments: list[str] | None = None) -> int:
    """Asks the questions that the file lacks and prints the table."""
    parser = Parser(prog="length", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("model", type=Path)
    parser.add_argument("answers", type=Path, help="a .jsonl to begin or continue")
    parser.add_argument("--minutes", type=int, nargs="*", default=[1, 10, 60, 180, 480])
    parser.add_argument("--questions", type=int, default=20, help="number for each kind and length")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--every", type=float, default=1.0, help="seconds from one frame to the next")
    parser.add_argument("--beyond", choices=BEYOND, default="extend")
    parser.add_argument("--batch", type=int, default=1, help="videos answered together")
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args(arguments)
    keep_programs()
    model = LLaMAVIDLlavaForConditionalGeneration.from_pretrained(options.model, dtype="float32")
    images = LLaMAVIDLlavaProcessor.from_pretrained(options.model).image_processor
    side = 2 * model.config.vision_tower_config.image_size  # as in `make_data`
    with open_store(options.answers, {"set": "needles", "model": model_identity(options.model)}, []) as store:
        for minutes in sorted(options.minutes):
            roomy, every = fitted(model, 60 * minutes, options.beyond, options.every)
            beyond = "" if roomy is model and every == options.every else options.beyond
            named = [
                {"minutes": minutes, "every": every, "beyond": beyond, "kind": kind, "number": number}
                for number in range(options.questions)
                for kind in options.kinds
            ]
            named = [{"id": " ".join(map(str, name.values()))} | name for name in named]
            left = [name for name in named if name["id"] not in store.done]
            for start in range(0, len(left), options.batch):
                names = left[start : start + options.batch]
                asked = [needle(name["kind"], 60 * minutes, name["number"], side=side) for name in names]
                found = answers(roomy, images, asked, every)
                store.write([name | row for name, row in zip(names, found, strict=True)])
    _, rows, _ = read_rows(options.answers)
    print(table(rows))
    if options.picture:
        draw(rows, options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
