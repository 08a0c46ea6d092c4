"""How fast a video's frames are read: the table of docs/long-video.md, each reader in a process of its own.

    python -m benchmarks.decode FILM.mp4 --fps 1 --rounds 2

`in order` decodes every frame on FFmpeg's own threads; `parts` is what a session does, `one decoder` what a training
worker does.  torchcodec is measured if it is installed, with its own threads and with a decoder per core.  All readers
shrink their frames to 224 x 224 with the same function.  `frames` tells whether they equal those of `in order` bit for
bit, or else the mean pixel difference of the worst frame (2 and more: a wrong frame).
"""

import concurrent.futures
import dataclasses
import hashlib
import importlib.util
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from llamavid_jax.errors import Parser, command
from llamavid_jax.media.images import resize_and_crop
from llamavid_jax.media.source import local_file
from llamavid_jax.media.timeline import Sampling, nearest_keys
from llamavid_jax.media.video import cores, iter_frames, plan_video

ROOT = Path(__file__).parent.parent
CHUNK = 16  # frames requested from torchcodec at once


def crop(frame: np.ndarray) -> np.ndarray:
    return resize_and_crop(frame, 224)


def in_order(path: str, sampling: Sampling) -> Iterator[np.ndarray]:
    timeline = dataclasses.replace(sampling.timeline, index=None)
    yield from (frame for _, frame in iter_frames(path, dataclasses.replace(sampling, timeline=timeline), crop))


def parts(path: str, sampling: Sampling) -> Iterator[np.ndarray]:
    yield from (frame for _, frame in iter_frames(path, sampling, crop, decoders=cores()))


def one_decoder(path: str, sampling: Sampling) -> Iterator[np.ndarray]:
    yield from (frame for _, frame in iter_frames(path, sampling, crop))


def key_frames(path: str, sampling: Sampling) -> Iterator[np.ndarray]:
    yield from parts(path, nearest_keys(sampling) or sampling)


def torchcodec(path: str, sampling: Sampling, threads: int = 0) -> Iterator[np.ndarray]:
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(path, dimension_order="NHWC", num_ffmpeg_threads=threads)
    for start in range(0, len(sampling), CHUNK):
        batch = decoder.get_frames_at(indices=sampling.frames[start : start + CHUNK].tolist())
        yield from map(crop, batch.data.numpy())


def torchcodec_on_each_core(path: str, sampling: Sampling) -> Iterator[np.ndarray]:
    pieces = [sampling.only(piece) for piece in np.array_split(np.arange(len(sampling)), cores())]
    with concurrent.futures.ThreadPoolExecutor(cores()) as pool:
        for frames in pool.map(lambda piece: list(torchcodec(path, piece, threads=1)), pieces):
            yield from frames


READERS = {
    "in order": in_order,
    "parts": parts,
    "one decoder": one_decoder,
    "key frames": key_frames,
    "torchcodec": torchcodec,
    "torchcodec on each core": torchcodec_on_each_core,
}


def measure(name: str, path: str, fps: float, small: Path) -> dict:
    """Reads the file once; thumbnails of 28 x 28 pixels go to the file `small`."""
    began, digest, first, thumbs = time.perf_counter(), hashlib.sha256(), None, []
    sampling = plan_video(path, fps)
    for frame in READERS[name](path, sampling):
        first = first or time.perf_counter() - began
        digest.update(frame.tobytes())
        thumbs.append(frame.reshape(28, 8, 28, 8, 3).mean((1, 3)))
    wall, used = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    np.save(small, np.array(thumbs, np.float16))
    return {
        "wall": wall,
        "cpu": used.ru_utime + used.ru_stime,
        "first": first,
        "speed": sampling.timeline.seconds / wall,
        "memory": used.ru_maxrss / 1024,
        "digest": digest.hexdigest(),
    }


def in_own_process(name: str, path: str, fps: float, small: Path) -> dict:
    arguments = [sys.executable, "-m", "benchmarks.decode", path, "--fps", str(fps), "--one", name, str(small)]
    done = subprocess.run(arguments, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


@command("decode")
def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="decode", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("film", metavar="FILM")
    parser.add_argument("--fps", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=1, metavar="N", help="rounds through all readers (1)")
    parser.add_argument("--readers", nargs="*", default=list(READERS), choices=list(READERS), metavar="NAME")
    parser.add_argument("--one", nargs=2, metavar=("NAME", "FILE"), help="run only this reader, in this process")
    options = parser.parse_args(arguments)
    if options.one:
        print(json.dumps(measure(options.one[0], options.film, options.fps, Path(options.one[1]))))
        return 0
    film = str(local_file(options.film))
    has_torchcodec = importlib.util.find_spec("torchcodec") is not None
    readers = ["in order", *(name for name in options.readers if name != "in order")]
    readers = [name for name in readers if has_torchcodec or not name.startswith("torchcodec")]
    print(f"{cores()} cores, {options.fps:g} frames a second")
    print("| reader | wall, s | CPU, s | x real time | first frame, s | memory, MB | frames |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            for name in readers:
                small = Path(folder) / f"{name}.npy"
                row = in_own_process(name, film, options.fps, small)
                if (number, name) == (0, "in order"):
                    expected, right = row["digest"], np.load(small).astype(np.float32)
                if row["digest"] == expected:
                    frames = "equal"
                else:
                    found = np.load(small).astype(np.float32)
                    frames = f"off by {np.abs(found - right).mean((1, 2, 3)).max():.1f}"
                numbers = f"{row['wall']:.1f} | {row['cpu']:.1f} | {row['speed']:.0f} | {row['first']:.2f}"
                print(f"| {name} | {numbers} | {row['memory']:.0f} | {frames} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
