"""CLIP's preprocessing against the original's recorded output and against transformers; all kinds of bad images."""

import io
import random
import struct
import subprocess
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from paths import GOLDEN, ROOT
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llamavid_jax.config.parts import CLIP_MEAN, CLIP_STD
from llamavid_jax.media.images import check_picture, normalize, open_image, pad_to_square, resize_and_crop, to_rgb
from llamavid_jax.media.source import MediaError

EXPECTED = GOLDEN / "preprocess" / "expected.npz"
NOISE = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
TOP_LEFT_RED = np.zeros((32, 48, 3), np.uint8)
TOP_LEFT_RED[:16, :16, 0] = 255


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("aspect", ["crop", "pad"])
def test_recorded_output_of_the_original(number, aspect):
    with np.load(EXPECTED) as arrays:
        image, expected = Image.fromarray(arrays[f"image.{number}"]), arrays[f"{aspect}.{number}"]
    image = pad_to_square(image, CLIP_MEAN) if aspect == "pad" else image
    actual = normalize(resize_and_crop(image, expected.shape[-1])[None], CLIP_MEAN, CLIP_STD)[0]
    assert actual.dtype == np.float32
    assert np.abs(actual - expected).max() < 1e-5 and np.abs(actual - expected).mean() < 1e-6


@pytest.mark.parametrize("size", [56, 224, 336])
@pytest.mark.parametrize(
    "shape", [(60, 80), (80, 60), (333, 500), (501, 334), (224, 224), (225, 1000), (1, 99), (7, 5)]
)
def test_transformers_gives_the_same(size, shape):
    image = np.random.default_rng(size).integers(0, 256, (*shape, 3), dtype=np.uint8)
    reference = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    expected = reference(images=Image.fromarray(image), return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(normalize(resize_and_crop(image, size)[None], CLIP_MEAN, CLIP_STD), expected, atol=1e-5)


@pytest.mark.parametrize(("shape", "top", "left"), [((3, 8), 2, 0), ((8, 3), 0, 2), ((5, 5), 0, 0)])
def test_padding_has_the_means_colour_and_rounds_the_offset_down(shape, top, left):
    image = np.full((*shape, 3), 9, np.uint8)
    padded = np.asarray(pad_to_square(Image.fromarray(image), CLIP_MEAN))
    expected = np.full((max(shape), max(shape), 3), (122, 116, 104), np.uint8)
    expected[top : top + shape[0], left : left + shape[1]] = 9
    np.testing.assert_array_equal(padded, expected)


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tiff", "a.webp", "a.ppm", "a.tga"])
def test_lossless_formats(tmp_path, name):
    Image.fromarray(NOISE).save(tmp_path / name, **({"lossless": True} if name == "a.webp" else {}))
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / name)), NOISE)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "YCbCr", "RGBX", "PA"])
def test_other_modes_are_converted_as_pillow_does(tmp_path, mode):
    image = Image.fromarray(NOISE).convert("RGBA" if mode == "LA" else "RGB").convert(mode)
    path = tmp_path / ("a.tiff" if mode in ("CMYK", "YCbCr", "RGBX", "PA") else "a.png")
    image.save(path)
    with Image.open(path) as stored:
        np.testing.assert_array_equal(np.asarray(open_image(path)), np.asarray(stored.convert("RGB")))


def test_what_pillow_advises_programmers_is_not_printed(tmp_path):
    picture = Image.fromarray(NOISE).quantize(4)
    picture.save(tmp_path / "a.png", transparency=bytes(4))
    read = "import sys; from llamavid_jax.media.images import open_image; open_image(sys.argv[1])"
    command = [sys.executable, "-c", read, str(tmp_path / "a.png")]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stderr == ""


def test_alpha_is_dropped_and_not_blended(tmp_path):
    Image.fromarray(np.dstack([NOISE, np.zeros((60, 80), np.uint8)])).save(tmp_path / "clear.png")
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / "clear.png")), NOISE)


@pytest.mark.parametrize("name", ["grey16.png", "grey16.tiff", "grey16.pgm"])
def test_sixteen_bit_grey_keeps_its_shades(tmp_path, name):
    levels = np.linspace(0, 65535, 60 * 80).reshape(60, 80).astype(np.uint16)
    Image.fromarray(levels).save(tmp_path / name)
    grey = np.asarray(open_image(tmp_path / name))
    np.testing.assert_array_equal(grey, np.repeat((levels >> 8).astype(np.uint8)[..., None], 3, 2))


# For each EXIF orientation, the position of the image's top left corner in the file: (row, column).
STORED = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (-1, 0), 7: (-1, -1), 8: (0, -1)}


@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation_is_applied(tmp_path, orientation):
    stored = TOP_LEFT_RED.swapaxes(0, 1) if orientation >= 5 else TOP_LEFT_RED
    row, column = STORED[orientation]
    stored = stored[:: -1 if row else 1, :: -1 if column else 1]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / "turned.png")), TOP_LEFT_RED)


@pytest.mark.parametrize("name", ["moving.gif", "moving.png", "moving.webp"])
def test_an_animation_gives_its_first_picture(tmp_path, name):
    pictures = [Image.new("RGB", (20, 10), colour) for colour in ("#ff0000", "#00ff00", "#0000ff")]
    options = {} if "gif" in name else {"lossless": 1}
    pictures[0].save(tmp_path / name, save_all=True, append_images=pictures[1:], **options)
    assert open_image(tmp_path / name).getpixel((5, 5)) == (255, 0, 0)


def png_of_size(width, height):
    """A PNG whose header claims a size: a decompression bomb without the data."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(10))) + chunk(b"IEND", b"")


def encoded(kind, **options):
    buffer = io.BytesIO()
    Image.fromarray(NOISE).save(buffer, kind, **options)
    return buffer.getvalue()


def floating_point():
    buffer = io.BytesIO()
    Image.fromarray(NOISE[..., 0].astype(np.float32)).save(buffer, "TIFF")
    return buffer.getvalue()


def thirty_two_bits():
    buffer = io.BytesIO()
    Image.fromarray(NOISE[..., 0].astype(np.int32)).save(buffer, "TIFF")
    return buffer.getvalue()


BAD_PICTURES = {
    "empty.png": lambda: b"",
    "text.png": lambda: b"not a picture\n" * 20,
    "zeros.jpg": lambda: bytes(5000),
    "random.jpg": lambda: random.Random(0).randbytes(5000),
    "page.jpg": lambda: b"<!DOCTYPE html><html><body>404</body></html>",
    "drawing.svg": lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    "cut.jpg": lambda: encoded("JPEG")[:900],
    "head.jpg": lambda: encoded("JPEG")[:30],
    "cut.png": lambda: encoded("PNG")[:900],
    "head.png": lambda: encoded("PNG")[:40],
    "cut.gif": lambda: encoded("GIF")[:900],
    "cut.webp": lambda: encoded("WEBP")[:900],
    "cut.tiff": lambda: encoded("TIFF")[:900],
    "cut.bmp": lambda: encoded("BMP")[:900],
    "broken.png": lambda: encoded("PNG")[:60] + bytes(200) + encoded("PNG")[260:],
    "video.png": lambda: b"\x00\x00\x00\x20ftypisom" + bytes(500),
    "bomb.png": lambda: png_of_size(16000, 16000),
    "bigbomb.png": lambda: png_of_size(100_000, 100_000),
    "strip.png": lambda: png_of_size(101, 1),
    "long.png": lambda: png_of_size(20_000, 400),
    "no-rows.png": lambda: png_of_size(10, 0),
    "float.tiff": floating_point,
    "integer.tiff": thirty_two_bits,
    "drawing.eps": lambda: encoded("EPS"),
    "canvas.png": lambda: png_of_size(11_600, 11_600),
}


@pytest.mark.parametrize("name", BAD_PICTURES)
def test_a_bad_picture_is_named_with_a_remedy(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(BAD_PICTURES[name]())
    with pytest.raises(MediaError) as caught:
        open_image(path)
    check_message(caught.value, path)


def test_an_eps_is_named_and_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_: pytest.fail("Ghostscript was started"))
    for name in ("a.eps", "a.png"):
        (tmp_path / name).write_bytes(encoded("EPS"))
        with pytest.raises(MediaError, match=r"is an EPS drawing.*; convert it to PNG"):
            open_image(tmp_path / name)


def test_a_header_tells_of_pixels_that_cannot_be_used(tmp_path):
    for name, content in (("a.tiff", thirty_two_bits()), ("b.tiff", floating_point())):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(MediaError, match=r"pixels, whose range is unknown; save it as 8-bit PNG"):
            check_picture(tmp_path / name)


def test_the_canvas_of_a_panorama_is_no_gigabyte():
    picture = Image.new("RGB", (16_000, 2000), (9, 9, 9))
    padded = pad_to_square(picture, CLIP_MEAN)
    assert padded.size == (8000, 8000)
    small = resize_and_crop(padded, 224)
    assert tuple(small[0, 0]) == (122, 116, 104) and tuple(small[112, 112]) == (9, 9, 9)


@pytest.mark.parametrize("make", [lambda d: d / "missing.png", lambda d: d, lambda d: d / "a\0b.png"])
def test_no_file_there(tmp_path, make):
    with pytest.raises(MediaError) as caught:
        open_image(make(tmp_path))
    check_message(caught.value, make(tmp_path))


def check_message(error, path):
    message = str(error)
    assert str(path) in message or repr(str(path)) in message
    assert message.rpartition("; ")[2].split()[0] in ("give", "copy", "check", "use", "convert", "shrink", "save")
    assert "\n" not in message and error.__cause__ is None


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "TGA", "PPM", "ICO", "JPEG2000"])
def test_random_damage_gives_a_picture_or_a_media_error(tmp_path, kind):
    data, draws, path = encoded(kind), random.Random(2), tmp_path / "damaged"
    for _ in range(60):
        broken = bytearray(data)
        for _ in range(draws.choice((1, 4, 40))):
            broken[draws.randrange(min(len(broken), draws.choice((64, 10**6))))] = draws.randrange(256)
        path.write_bytes(broken[: draws.choice((len(broken), draws.randrange(1, len(broken))))])
        try:
            assert open_image(path).mode == "RGB"
        except MediaError as error:
            assert str(path) in str(error)


def test_threads_leave_the_filters_of_warnings_alone(tmp_path):
    """They are global to the process: a thread that sets and restores them can undo another's."""
    Image.fromarray(NOISE).resize((600, 600)).save(tmp_path / "a.png")
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(open_image, [tmp_path / "a.png"] * 200))
    assert warnings.filters == before


def test_a_picture_object_is_checked_as_a_file_is():
    with pytest.raises(MediaError, match="the picture is 500 x 2 pixels"):
        to_rgb(Image.new("RGB", (500, 2)))
