"""Asks the shipped model about a clip, prints its answers beside the truth, and draws where each question looked.

    python -m demo.show PICTURE.png

The clip (`held_out.mp4`) and its questions (`held_out.json`) are made like the training data, from pictures of digits
that no training clip shows.  In the picture a row is a question, a column a second; brighter patches have more of the
context token's attention.
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from demo.evaluate import answers
from llamavid_jax import LLaMAVIDLlavaForConditionalGeneration, LLaMAVIDLlavaProcessor
from llamavid_jax.data.video import read_video

HERE = Path(__file__).parent
TILE, GAP, LINE = 144, 6, 22  # pixels: a frame's side, what is between them, a line of text


def draw(rows: list[tuple[str, np.ndarray, np.ndarray]]) -> Image.Image:
    """A row for each (text, frames uint8 [F, H, W, 3], attention [F, S, S])."""
    columns = max(len(frames) for _, frames, _ in rows)
    canvas = Image.new("RGB", (columns * (TILE + GAP) + GAP, len(rows) * (TILE + LINE + GAP) + GAP), "white")
    pen = ImageDraw.Draw(canvas)
    for row, (text, frames, attention) in enumerate(rows):
        top = GAP + row * (TILE + LINE + GAP)
        pen.text((GAP, top + 2), text, fill="black", font_size=15)
        for column, (frame, weights) in enumerate(zip(frames, attention, strict=True)):
            pixels = np.asarray(Image.fromarray(frame).resize((TILE, TILE), Image.Resampling.BICUBIC), np.float32)
            heat = Image.fromarray(weights / attention.max()).resize((TILE, TILE), Image.Resampling.NEAREST)
            light = 0.35 + 0.65 * np.asarray(heat)[..., None]
            lit = pixels * light + 90 * np.asarray(heat)[..., None]
            tile = Image.fromarray(lit.clip(0, 255).astype(np.uint8))
            canvas.paste(tile, (GAP + column * (TILE + GAP), top + LINE))
    return canvas


def main(picture: str) -> None:
    model = LLaMAVIDLlavaForConditionalGeneration.from_pretrained(HERE / "model", dtype="float32")
    processor = LLaMAVIDLlavaProcessor.from_pretrained(HERE / "model")
    record = json.loads((HERE / "held_out.json").read_text())
    frames = read_video(HERE / record["video"]).frames
    (pixels,) = processor.image_processor(videos=HERE / record["video"])["pixel_values"]
    rows = []
    for _, _, question, truth, answer in answers(model, processor, [record], HERE, batch=1):
        print(f"{question}\n  model: {answer}\n  truth: {truth}")
        rows.append((f"{question}  {answer}", frames, model.context_attention(pixels, question)))
    Path(picture).parent.mkdir(parents=True, exist_ok=True)
    draw(rows).save(picture)
    print(f"{picture}: where each question looked in the {len(frames)} frames")


if __name__ == "__main__":
    main(sys.argv[1])
