"""Makes `space.mp4`, a clip with real pictures: three shots with slow pans and zooms over public-domain photographs.

    pip install --no-deps scikit-image==0.26.0 && python demo/make_clip.py

The pictures come from the scikit-image wheel; README.md beside this file has their sources and licences.
"""

import importlib.util
from pathlib import Path

import av
import numpy as np
from PIL import Image

WIDTH, HEIGHT, FPS, SHOT_SECONDS = 320, 240, 25, 4
# Shot: picture, then centre (x, y) and width of the view at its start and end, as fractions of the picture's width.
SHOTS = [
    ("rocket.jpg", (0.50, 0.45, 0.85), (0.50, 0.22, 0.60)),
    ("astronaut.png", (0.47, 0.45, 0.95), (0.44, 0.25, 0.50)),
    ("hubble_deep_field.jpg", (0.25, 0.30, 0.35), (0.70, 0.55, 0.50)),
]


def view(picture: Image.Image, centre_x: float, centre_y: float, width: float) -> Image.Image:
    """The part of the picture around a centre, at the clip's size; kept inside the picture."""
    scale = picture.width
    width, height = width * scale, width * scale * HEIGHT / WIDTH
    left = min(max(centre_x * scale - width / 2, 0), picture.width - width)
    top = min(max(centre_y * scale - height / 2, 0), picture.height - height)
    box = (left, top, left + width, top + height)
    return picture.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC, box)


def main() -> None:
    """Writes space.mp4 beside this file."""
    package = importlib.util.find_spec("skimage")
    if package is None:
        raise SystemExit("scikit-image is missing: pip install --no-deps scikit-image==0.26.0")
    pictures = Path(package.origin).parent / "data"
    with av.open(str(Path(__file__).with_name("space.mp4")), "w", options={"movflags": "faststart"}) as output:
        stream = output.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.options = {"crf": "25", "preset": "veryslow", "threads": "1"}
        for name, start, end in SHOTS:
            picture = Image.open(pictures / name).convert("RGB")
            for progress in np.linspace(0, 1, SHOT_SECONDS * FPS):
                smooth = progress**2 * (3 - 2 * progress)
                position = [float(a + (b - a) * smooth) for a, b in zip(start, end, strict=True)]
                output.mux(stream.encode(av.VideoFrame.from_image(view(picture, *position))))
        output.mux(stream.encode())


if __name__ == "__main__":
    main()
