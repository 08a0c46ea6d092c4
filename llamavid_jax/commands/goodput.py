"""What a training run's hours went into, as a table and as an image of its wall clock over all restarts:

    python -m llamavid_jax.commands.goodput runs/stage2 stage2.png

The numbers are those of `goodput.jsonl` in the run's folder (`training/goodput.py` explains the parts).
"""

import sys
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw

from llamavid_jax import buckets, uploads
from llamavid_jax.errors import InputError, Parser, command
from llamavid_jax.files import find, local
from llamavid_jax.inference.draw import clock

COLOURS = {  # for PARTS; only steps that count are green
    "steps": "#2e8b57",
    "compile": "#7b68ee",
    "data wait": "#ff8c00",
    "save": "#1e90ff",
    "restore": "#00bfff",
    "evaluation": "#c0a000",
    "start": "#a0522d",
    "lost": "#dc143c",
    "idle": "#c8c8c8",
}
WIDTH, HEIGHT, EDGE, LINE = 1200, 120, 20, 24  # pixels: the band, its margin, a line of the legend

Spans = Sequence[tuple[float, float, dict[str, float]]]


@command("goodput")
def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="goodput", description=__doc__, allow_abbrev=False)
    parser.add_argument("run", type=local, metavar="RUN", help="a run's output folder")
    parser.add_argument("picture", type=local, nargs="?", metavar="PICTURE", help="image to write, such as goodput.png")
    options = parser.parse_args(arguments)
    from llamavid_jax.training.goodput import FILE, PARTS, in_words, spans, tally  # JAX takes seconds to import
    from llamavid_jax.training.log import JsonLines

    rows = JsonLines(find(options.run / FILE), print).rows()
    totals = tally(rows)
    if not sum(totals.values()):
        raise InputError(f"{options.run / FILE} holds no hours; give the output folder of a run that has begun")
    print(in_words(totals))
    for part, what in PARTS.items():
        print(f"{part:12}{clock(totals[part]):>10}  {totals[part] / sum(totals.values()):6.1%}  {what}")
    if options.picture:
        try:
            if buckets.url(options.picture):
                options.picture.parent.mkdir(parents=True, exist_ok=True)
            draw(spans(rows), totals).save(options.picture)
            uploads.put(options.picture)
        except (OSError, ValueError) as error:
            raise InputError(
                f"{options.picture} cannot be written ({error}); give a file such as goodput.png"
            ) from None
    return 0


def draw(found: Spans, totals: Mapping[str, float]) -> Image.Image:
    """Draws the wall clock from left to right, each span's parts from top to bottom, and a legend below."""
    begin, whole = found[0][0], sum(totals.values())
    scale = WIDTH / max(found[-1][1] - begin, 1e-9)
    used = [part for part in COLOURS if totals[part]]
    canvas = Image.new("RGB", (WIDTH + 2 * EDGE, HEIGHT + 3 * EDGE + LINE * len(used)), "white")
    pen = ImageDraw.Draw(canvas)
    for start, end, seconds in found:
        left, right, top = EDGE + (start - begin) * scale, EDGE + (end - begin) * scale, float(EDGE)
        for part in used:
            bottom = top + HEIGHT * seconds.get(part, 0.0) / max(sum(seconds.values()), 1e-9)
            if bottom > top:
                pen.rectangle((left, top, max(right, left), bottom), fill=COLOURS[part])
            top = bottom
    for row, part in enumerate(used):
        top = HEIGHT + 2 * EDGE + row * LINE
        pen.rectangle((EDGE, top, EDGE + 14, top + 14), fill=COLOURS[part])
        text = f"{part}: {clock(totals[part])}, {totals[part] / whole:.1%}"
        pen.text((EDGE + LINE, top), text, fill="black", font_size=15)
    pen.text((EDGE + WIDTH, HEIGHT + EDGE + 2), clock(found[-1][1] - begin), fill="gray", font_size=12, anchor="ra")
    return canvas


if __name__ == "__main__":
    sys.exit(main())
