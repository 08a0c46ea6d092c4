"""CLIP's preprocessing for the vision tower: image file -> RGB -> uint8 [H, W, 3] -> float32 [3, H, W].

    open_image      image file -> upright RGB image; check_picture reads only its header
    pad_to_square   canvas of the mean colour, for stills
    resize_and_crop shortest edge to the size, bicubic, centre crop -> uint8 [H, W, 3], H = W = size
    normalize       uint8 [F, H, W, 3] -> float32 [F, 3, H, W]

A frame stays uint8 until `normalize`: an hour of video at one frame a second has 0.5 GB before it, 2.2 GB after it.
Letters: F frames, H height, W width.

Deviations from the original, which calls `Image.open(...).convert("RGB")`: the EXIF orientation is applied, and
16-bit grey is scaled to 8 bits (Pillow's conversion clips it to white); 32-bit and floating-point pixels, whose range
is unknown, and images of more than MAX_PIXELS are refused.  As in Pillow, an alpha channel is dropped, not blended,
and an animation gives its first image.
"""

import contextlib
import math
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import ExifTags, Image, ImageOps

from llamavid_jax.media.source import MAX_PIXELS, MediaError, check_size, local_file

# Pillow would start Ghostscript for an EPS, and has readers for formats that nobody uses
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "PSD", "QOI", "SGI", "TGA")
FORMATS += ("TIFF", "WEBP")
# Pillow warns programmers about large images and alpha: its pixel limit is not ours, and alpha is dropped
warnings.filterwarnings("ignore", module=r"PIL\.")
LARGE, LARGE_PIXELS = threading.Lock(), 2**24  # a process decodes one image of more pixels at a time


@contextlib.contextmanager
def open_picture(path: str | Path) -> Iterator[Image.Image]:
    """Yields an image whose header was read and is usable.  Raises MediaError, also for errors in the body."""
    file = local_file(path)
    try:
        with Image.open(file, formats=FORMATS) as image:
            _check(image, path)
            yield image
    except MediaError:
        raise
    except Image.UnidentifiedImageError:
        with file.open("rb") as opened:
            is_drawing = opened.read(4) in (b"%!PS", b"\xc5\xd0\xd3\xc6")
        kind = "an EPS drawing, a program that has no pixels" if is_drawing else "not a picture that Pillow can read"
        raise MediaError(f"{path} is {kind}; convert it to PNG or JPEG") from None
    except Image.DecompressionBombError:
        raise MediaError(f"{path} has too many pixels, over {MAX_PIXELS // 10**6} million; shrink it first") from None
    # Pillow's readers raise whatever their parsing meets in a damaged file: SyntaxError, struct.error, KeyError ...
    except Exception as error:
        raise MediaError(f"{path} is cut short or damaged ({error}); copy or export it again") from None


def check_picture(path: str | Path) -> None:
    """Raises MediaError unless the file's header is that of a usable image."""
    with open_picture(path):
        pass


def open_image(path: str | Path) -> Image.Image:
    """Reads an image file as an upright RGB image.  Raises MediaError naming the file."""
    with open_picture(path) as image, LARGE if math.prod(image.size) > LARGE_PIXELS else contextlib.nullcontext():
        image.load()
        return to_rgb(image, path)


def to_rgb(image: Image.Image, name: object = "the picture") -> Image.Image:
    """An image of any mode, upright and in RGB; `name` is for the MediaError."""
    _check(image, name)
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # else it would make a needless copy
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow also opens as 32-bit "I"
        levels = np.asarray(image).clip(0, 65535) >> 8
        image = Image.fromarray(levels.astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def _check(image: Image.Image, name: object) -> None:
    check_size(*image.size, name)
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):  # these two hold 16 bits in it
        kind = "floating-point" if image.mode == "F" else "32-bit integer"
        raise MediaError(f"{name} holds {kind} pixels, whose range is unknown; save it as 8-bit PNG")


def pad_to_square(image: Image.Image, mean: Sequence[float]) -> Image.Image:
    """Centres the image on a square canvas of the mean colour, truncated to integers: (122, 116, 104) for CLIP's."""
    if max(image.size) ** 2 > MAX_PIXELS:  # a panorama, whose canvas would be a gigabyte
        image = image.reduce(2)
    width, height = image.size
    side = max(width, height)
    canvas = Image.new("RGB", (side, side), tuple(int(value * 255) for value in mean))
    canvas.paste(image, ((side - width) // 2, (side - height) // 2))
    return canvas


def resize_and_crop(image: Image.Image | UInt8[np.ndarray, "h w 3"], size: int) -> UInt8[np.ndarray, "H W 3"]:
    """Shortest edge to `size` pixels (bicubic, the other edge rounded down), then the central square."""
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    width, height = image.size
    scaled = [size, int(size * max(width, height) / min(width, height))]
    width, height = scaled if width <= height else scaled[::-1]
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    top, left = (height - size) // 2, (width - size) // 2
    return pixels[top : top + size, left : left + size].copy()


def normalize(
    frames: UInt8[np.ndarray, "F H W 3"], mean: Sequence[float], std: Sequence[float]
) -> Float32[np.ndarray, "F 3 H W"]:
    """(x / 255 - mean) / std per colour, channels first."""
    scaled = frames.astype(np.float32) * np.float32(1 / 255)
    scaled -= np.asarray(mean, np.float32)
    scaled /= np.asarray(std, np.float32)
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))
