"""Draws frames side by side, one row per question: brighter patches get more of its context token's attention.

    (text, frames uint8 [F, H, W, 3], attention float32 [F, S, S] or None)  ->  an image, one row for each

The attention is that of `model.context_attention` for the same frames: cropped as the model sees them
(`resize_and_crop`), or already square.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

TILE, GAP, LINE = 144, 6, 22  # pixels: a frame's side, the gap between frames, a line of text


def draw_frames(rows: Sequence[tuple[str, np.ndarray, np.ndarray | None]]) -> Image.Image:
    """Draws each row with its line of text; a row's brightest patch has the most attention in all its frames."""
    columns = max(len(frames) for _, frames, _ in rows)
    canvas = Image.new("RGB", (columns * (TILE + GAP) + GAP, len(rows) * (TILE + LINE + GAP) + GAP), "white")
    pen = ImageDraw.Draw(canvas)
    for row, (text, frames, attention) in enumerate(rows):
        top = GAP + row * (TILE + LINE + GAP)
        pen.text((GAP, top + 2), text, fill="black", font_size=15)
        for column, frame in enumerate(frames):
            tile = Image.fromarray(frame).resize((TILE, TILE), Image.Resampling.BICUBIC)
            if attention is not None:
                tile = _lit(tile, attention[column] / attention.max())
            canvas.paste(tile, (GAP + column * (TILE + GAP), top + LINE))
    return canvas


def draw_evidence(
    text: str,
    seconds: Sequence[float],
    weights: Sequence[float],
    frames: np.ndarray,
    attention: np.ndarray | None,
    places: Sequence[int],
) -> Image.Image:
    """Draws some frames, as `draw_frames` does, each with its second, and a curve of all weights over the video.

    `seconds` and `weights` are of all sampled frames, `places` the indices of those drawn.
    """
    tiles = draw_frames([(text, frames, attention)])
    canvas = Image.new("RGB", (tiles.width, tiles.height + LINE + TILE), "white")
    canvas.paste(tiles)
    pen, left, bottom = ImageDraw.Draw(canvas), GAP, canvas.height - LINE
    across, up = canvas.width - 2 * GAP, TILE - 2 * LINE
    length, top = max(seconds[-1], 1e-9), max(max(weights), 1e-9)
    points = [(left + across * s / length, bottom - up * w / top) for s, w in zip(seconds, weights, strict=True)]
    pen.line([(left, bottom), (left + across, bottom)], fill="silver")
    pen.line(points, fill="black")
    for column, place in enumerate(places):
        under = left + column * (TILE + GAP)
        pen.text((under, tiles.height), f"{clock(seconds[place])}  {weights[place]:.1%}", fill="black", font_size=15)
        pen.line([(under + TILE / 2, tiles.height + LINE), points[place]], fill="orange")
    pen.text((left, bottom + 2), "0:00", fill="gray", font_size=12)
    pen.text((left + across, bottom + 2), clock(length), fill="gray", font_size=12, anchor="ra")
    return canvas


def clock(seconds: float) -> str:
    """3725.5 -> 1:02:05"""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _lit(tile: Image.Image, weights: np.ndarray) -> Image.Image:
    heat = np.asarray(Image.fromarray(weights).resize((TILE, TILE), Image.Resampling.NEAREST))[..., None]
    lit = np.asarray(tile, np.float32) * (0.35 + 0.65 * heat) + 90 * heat
    return Image.fromarray(lit.clip(0, 255).astype(np.uint8))
