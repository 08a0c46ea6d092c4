"""Coloured handwritten digits on a dark frame: the content of the demo's images and clips.

    split -> events -> Scene -> frame(scene, seconds) uint8 [side, side, 3], 96 pixels unless told otherwise

The digits are the 1,797 images of 8 x 8 pixels of `sklearn.datasets.load_digits`; a fixed fifth of every digit's is
kept for testing and never used in training.  Positions are pixels, x to the right and y down; times are seconds.  All
random draws come from the given generator.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

SIDE = 96  # pixels of a frame of the shipped model's data, which sees it at half that size
COLOURS = {
    "red": (235, 45, 45),
    "green": (50, 205, 60),
    "blue": (60, 100, 255),
    "yellow": (240, 220, 50),
    "white": (240, 240, 240),
    "purple": (200, 60, 225),
}
DIRECTIONS = {"left to right": (1, 0), "right to left": (-1, 0), "down": (0, 1), "up": (0, -1)}
CLIP_SECONDS = 8
SIZE = 32  # pixels of the square that a digit fills
STEP = 16  # pixels of the grid that digits are on at whole seconds: the size of the demo model's patches
CROSSING = (2, 3, 5)  # seconds to cross a frame, so that digits move whole grid steps each second


@dataclasses.dataclass(frozen=True)
class Event:
    """One digit, visible from `start` for `seconds` while it moves from `path[0]` to `path[1]`."""

    digit: int
    picture: int  # index in load_digits
    colour: str
    rgb: tuple[int, int, int]  # a shade of `colour`
    angle: float  # degrees
    path: tuple[tuple[float, float], tuple[float, float]]  # centres
    start: int = 0
    seconds: int = 1
    direction: str = ""  # a key of DIRECTIONS; empty for a still digit

    def centre(self, time: float) -> tuple[float, float] | None:
        """Where the digit is at `time`; None while it is not visible."""
        if not self.start <= time < self.start + self.seconds:
            return None
        (x0, y0), (x1, y1) = self.path
        part = min((time - self.start) / max(self.seconds - 1, 1), 1)
        return x0 + (x1 - x0) * part, y0 + (y1 - y0) * part


@dataclasses.dataclass(frozen=True)
class Scene:
    """Events in order of their starts, no two with the same digit or colour, on a background."""

    events: tuple[Event, ...]
    background: tuple[int, int, int]
    seconds: int = 1
    side: int = SIDE  # pixels


def centres(side: int) -> range:
    """The grid positions of digits' centres along either axis, in pixels."""
    return range(SIZE // 2, side - SIZE // 2 + 1, STEP)


@functools.cache
def pictures() -> tuple[np.ndarray, np.ndarray]:
    """Opacity float32 [1797, 8, 8] in 0..1 and digit [1797] of every image."""
    from sklearn.datasets import load_digits  # here: it takes a second, and comes with the extra `demo`

    digits = load_digits()
    return (digits.images / 16).astype(np.float32), digits.target


@functools.cache
def split(test: bool) -> Mapping[int, np.ndarray]:
    """For every digit, the images that training, or testing, draws from."""
    order = np.random.default_rng(0).permutation(len(pictures()[1]))
    order = [order[pictures()[1][order] == digit] for digit in range(10)]
    return {digit: own[: len(own) // 5] if test else own[len(own) // 5 :] for digit, own in enumerate(order)}


def frame(scene: Scene, time: float) -> np.ndarray:
    """The scene at one time, uint8 [side, side, 3]."""
    side = scene.side
    canvas = np.empty((side, side, 3), np.float32)
    canvas[:] = scene.background
    for event in scene.events:
        centre = event.centre(time)
        if centre is None:
            continue
        opacity = _sprite(event.picture, event.angle)
        half = len(opacity) // 2
        left, top = round(centre[0]) - half, round(centre[1]) - half
        x, y = slice(max(left, 0), min(left + 2 * half, side)), slice(max(top, 0), min(top + 2 * half, side))
        seen = opacity[y.start - top : y.stop - top, x.start - left : x.stop - left, None]
        canvas[y, x] += seen * (np.asarray(event.rgb, np.float32) - canvas[y, x])
    return canvas.round().astype(np.uint8)


@functools.lru_cache(64)
def _sprite(picture: int, angle: float) -> np.ndarray:
    """Opacity [s, s] of an image scaled to SIZE pixels and rotated; s is even and leaves room for the corners."""
    side = 2 * int(np.ceil(SIZE * 0.6))
    image = Image.fromarray(pictures()[0][picture]).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    canvas = Image.new("F", (side, side))
    canvas.paste(image, ((side - SIZE) // 2, (side - SIZE) // 2))
    return np.clip(1.25 * np.asarray(canvas.rotate(angle, Image.Resampling.BILINEAR)), 0, 1)


def still(rng: np.random.Generator, test: bool, count: int = 1, side: int = SIDE) -> Scene:
    """A still scene of `count` digits that do not overlap; one scene in twenty has none."""
    places = []
    while len(places) < count:
        x, y = rng.choice(centres(side), 2).tolist()
        if all(max(abs(x - other[0]), abs(y - other[1])) >= SIZE for other in places):
            places.append((x, y))
    looks = _looks(rng, test, count if rng.random() < 0.95 else 0)
    events = tuple(Event(**look, path=(place, place)) for look, place in zip(looks, places, strict=False))
    return Scene(events, _background(rng), side=side)


def clip(rng: np.random.Generator, test: bool, count: int, side: int = SIDE) -> Scene:
    """A clip of 8 s in which `count` digits (1 to 3) cross the frame one after another, each in 2, 3 or 5 s."""
    while True:
        lengths = rng.choice(CROSSING, count)
        starts = np.sort(rng.choice(CLIP_SECONDS - 1, count, replace=False))
        ends = starts + lengths
        if ends[-1] <= CLIP_SECONDS and (ends[:-1] <= starts[1:]).all():
            return _crossings(rng, test, starts.tolist(), lengths.tolist(), CLIP_SECONDS, side)


def long_clip(rng: np.random.Generator, test: bool, seconds: int, count: int = 1, side: int = SIDE) -> Scene:
    """A clip of `seconds`, empty except while `count` digits cross it one after another, each in 5 s."""
    length = CROSSING[-1]
    starts = np.sort(rng.integers(0, seconds - count * length + 1, count)) + length * np.arange(count)
    return _crossings(rng, test, starts.tolist(), [length] * count, seconds, side)


def _crossings(rng, test: bool, starts: Sequence[int], lengths: Sequence[int], seconds: int, side: int) -> Scene:
    """A clip in which a digit begins to cross the frame at each start, in one of four directions."""
    events, places = [], centres(side)
    for look, start, length in zip(_looks(rng, test, len(starts)), starts, lengths, strict=True):
        direction, lane = list(DIRECTIONS)[rng.integers(4)], int(rng.choice(places))
        x, y = DIRECTIONS[direction]
        ends = places[:: 1 if x + y > 0 else -1]
        path = tuple((end, lane) if x else (lane, end) for end in (ends[0], ends[-1]))
        events.append(Event(**look, path=path, start=start, seconds=length, direction=direction))
    return Scene(tuple(events), _background(rng), seconds, side)


def _looks(rng, test: bool, count: int) -> list[dict]:
    """Digits and colours, all different, each with an image, a shade and an angle."""
    looks = []
    for digit, colour in zip(rng.permutation(10)[:count], rng.permutation(list(COLOURS))[:count].tolist(), strict=True):
        shade = np.clip(np.array(COLOURS[colour]) * rng.uniform(0.85, 1.05) + rng.uniform(-12, 12, 3), 0, 255)
        looks.append(
            {
                "digit": int(digit),
                "picture": int(rng.choice(split(test)[int(digit)])),
                "colour": colour,
                "rgb": tuple(shade.astype(int).tolist()),
                "angle": float(rng.uniform(-12, 12)),
            }
        )
    return looks


def _background(rng) -> tuple[int, int, int]:
    return tuple(rng.integers(0, 45, 3).tolist())
