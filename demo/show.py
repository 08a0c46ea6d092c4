"""Asks the shipped model about a clip, prints its answers beside the truth, and draws where each question looked.

    python -m demo.show [PICTURE.png]

The clip (`held_out.mp4`) and its questions (`held_out.json`) are made like the training data, from images of digits
that no training clip shows.  In the drawing a row is a question, a column a second; brighter patches get more of the
context token's attention.
"""

import json
from pathlib import Path

from llamavid_jax import LLaMAVIDLlavaForConditionalGeneration, LLaMAVIDLlavaProcessor
from llamavid_jax.commands.program import keep_programs, run
from llamavid_jax.errors import Parser, command
from llamavid_jax.inference.draw import draw_frames
from llamavid_jax.media.video import read_video

from .evaluate import answers

HERE = Path(__file__).parent


@command()
def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="show", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("picture", nargs="?", type=Path, default=Path("demo.png"), metavar="PICTURE.png")
    picture = parser.parse_args(arguments).picture
    if picture.suffix != ".png":
        parser.error(f"the picture is {picture}; give a name that ends in .png")
    keep_programs()
    model = LLaMAVIDLlavaForConditionalGeneration.from_pretrained(HERE / "model", dtype="float32")
    processor = LLaMAVIDLlavaProcessor.from_pretrained(HERE / "model")
    record = json.loads((HERE / "held_out.json").read_text())
    frames = read_video(HERE / record["video"]).frames
    (pixels,) = processor.image_processor(videos=HERE / record["video"])["pixel_values"]
    rows = []
    for _, _, question, truth, answer in answers(model, processor, [record], HERE, batch=1):
        print(f"{question}\n  model: {answer}\n  truth: {truth}")
        rows.append((f"{question}  {answer}", frames, model.context_attention(pixels, question)))
    picture.parent.mkdir(parents=True, exist_ok=True)
    draw_frames(rows).save(picture)
    print(f"{picture}: where each question looked in the {len(frames)} frames")
    return 0


if __name__ == "__main__":
    run(main)
