"""Pictures as the vision tower wants them: file -> RGB -> uint8 [H, W, 3] -> float32 [3, H, W], CLIP's preprocessing.

    open_image      any Pillow format -> upright RGB picture; check_picture looks at its header alone
    pad_to_square   canvas of the mean colour, for stills
    resize_and_crop shortest edge to the size, bicubic, centre crop -> uint8 [H, W, 3], H = W = size
    normalize       uint8 [F, H, W, 3] -> float32 [F, 3, H, W]

A frame stays uint8 until `normalize`: an hour of video at one frame a second is 0.5 GB so, and 2.2 GB after it.
Letters: F frames, H height, W width.

Deviations from the original, which calls `Image.open(...).convert("RGB")`: the EXIF orientation is applied, and
16-bit grey is scaled to 8 bits (Pillow's conversion clips it to white).  As there, an alpha channel is dropped, not
blended, and an animation gives its first picture.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image, ImageOps

from llamavid_jax.media.source import MediaError, check_size, local_file

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def open_image(path: str | Path) -> Image.Image:
    """Reads a picture file as an upright RGB picture.  Raises MediaError naming the file."""
    file = local_file(path)
    try:
        with Image.open(file) as image:
            check_size(*image.size, path)
            image.load()
            return to_rgb(image, path)
    except MediaError:
        raise
    except Image.UnidentifiedImageError:
        raise MediaError(f"{path} is not a picture that Pillow can read; convert it to PNG or JPEG") from None
    except Image.DecompressionBombError:
        raise MediaError(f"{path} has too many pixels (over 178 million); shrink it first") from None
    # Pillow's readers raise whatever their parsing meets in a damaged file: SyntaxError, struct.error, KeyError ...
    except Exception as error:
        raise MediaError(f"{path} is cut short or damaged ({error}); copy or export it again") from None


def check_picture(path: str | Path) -> None:
    """Raises MediaError unless the file's header is that of a picture whose size can be used."""
    try:
        with Image.open(path) as image:
            check_size(*image.size, path)
    except MediaError:
        raise
    except Exception as error:  # as above
        raise MediaError(f"{path} is not a picture that Pillow can read ({error}); convert it to PNG or JPEG") from None


def to_rgb(image: Image.Image, name: object = "the picture") -> Image.Image:
    """Upright RGB copy of a picture of any mode; `name` is for the MediaError."""
    check_size(*image.size, name)
    if image.mode == "F":
        raise MediaError(f"{name} holds floating-point pixels, whose range is unknown; save it as 8-bit PNG")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow also opens as 32-bit "I"
        levels = np.asarray(image).astype(np.int64).clip(0, 65535) >> 8
        image = Image.fromarray(levels.astype(np.uint8))
    return image.convert("RGB")


def pad_to_square(image: Image.Image, mean: Sequence[float] = CLIP_MEAN) -> Image.Image:
    """Centres the picture on a square canvas of the mean colour, cut to whole numbers: (122, 116, 104)."""
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
    frames: UInt8[np.ndarray, "F H W 3"], mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD
) -> Float32[np.ndarray, "F 3 H W"]:
    """(x / 255 - mean) / std per colour, channels first."""
    scaled = frames.astype(np.float32) * np.float32(1 / 255)
    scaled -= np.asarray(mean, np.float32)
    scaled /= np.asarray(std, np.float32)
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))
