"""Writes the demo's data: images, clips and long clips of digits, with questions, in LLaVA format.

    python -m demo.make_data OUT [--pictures N] [--align N] [--clips N] [--long N] [--long-seconds S ...] [--long-fps F]
                                 [--side N] [--tests N] [--seed S]

    OUT/{images,clips,long}/*.png, *.mp4
    OUT/{pretrain,refer,align,instruct,long}.json       training
    OUT/{pretrain,refer,instruct,long}_test.json        held out: other digit images; `types` of questions

Every sample has its own random generator, from the seed and its name, so that the files do not depend on the number of
processes.
"""

import functools
import json
import multiprocessing
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
from PIL import Image

from llamavid_jax.errors import Parser, command

from . import digits, questions

CLIP_FPS = 2  # of the files; the loader samples one frame a second
LONG_SECONDS = (30, 60, 60, 120, 120, 240, 600)
TURNS = {"instruct": 3, "instruct_test": 3, "long": 1, "long_test": 3}
# How often each type of question is drawn: the harder, the more often.
WEIGHT = {"digit": 3.0, "count": 1.0, "colour": 1.0, "way": 1.5, "second": 3.0, "after": 3.0, "before": 3.0}


def sample(
    task: tuple[str, int],
    folder: Path,
    seed: int,
    long_seconds: Sequence[int] = LONG_SECONDS,
    long_fps: int = 1,
    side: int = digits.SIDE,
) -> dict:
    """Draws sample `number` of one JSON file, writes its media file and returns its record."""
    name, number = task
    kind, test = name.removesuffix("_test"), name.endswith("_test")
    rng = generator(name, number, seed)
    if kind in ("pretrain", "refer", "align"):
        if kind == "pretrain":
            scene = digits.still(rng, test, side=side)
            asked = [questions.caption(rng, scene)]
        else:
            scene = digits.still(rng, test, int(rng.integers(1, 4)), side)
            asked = [questions.reference(rng, scene)]
        path = f"images/{name}_{number:05}.png"
        seen = side // 2, side // 2  # the model's image size, so that images are read fast
        Image.fromarray(digits.frame(scene, 0)).resize(seen, Image.Resampling.BICUBIC).save(folder / path)
    elif kind == "instruct":
        scene = short_clip(rng, test, side)
        asked = questions.clip_questions(rng, scene)
        path = f"clips/{name}_{number:05}.mp4"
        write_video(folder / path, scene, CLIP_FPS)
    else:
        seconds = long_seconds[-1] if test else int(rng.choice(long_seconds))
        scene = digits.long_clip(rng, test, seconds, side=side)
        asked = questions.long_questions(rng, scene)
        path = f"long/{name}_{number:05}.mp4"
        write_video(folder / path, scene, long_fps)
    chosen = choose(rng, asked, TURNS.get(name, 1))
    if name == "instruct":  # a caption teaches more than single words; it is mostly the last turn
        chosen[rng.integers(len(chosen)) if rng.random() < 0.25 else -1] = questions.clip_caption(rng, scene)
    return record(f"{name}-{number}", path, chosen, test)


def review(number: int, seed: int, side: int = digits.SIDE) -> dict:
    """Further questions about clip `number` of instruct.json, so that stage 3 does not forget short clips."""
    scene = short_clip(generator("instruct", number, seed), test=False, side=side)
    rng = generator("review", number, seed)
    asked = choose(rng, questions.clip_questions(rng, scene), TURNS["instruct"])
    return record(f"review-{number}", f"clips/instruct_{number:05}.mp4", asked, test=False)


def generator(name: str, number: int, seed: int) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(name.encode()), number])


def short_clip(rng: np.random.Generator, test: bool, side: int = digits.SIDE) -> digits.Scene:
    return digits.clip(rng, test, int(rng.choice([1, 2, 3], p=[0.3, 0.4, 0.3])), side)


def choose(rng: np.random.Generator, asked: list[questions.Question], count: int) -> list[questions.Question]:
    """Draws `count` of the questions, or all if there are fewer."""
    weights = np.array([WEIGHT.get(question, 1.0) for question, _, _ in asked])
    count = min(count, len(asked))
    return [asked[i] for i in rng.choice(len(asked), count, replace=False, p=weights / weights.sum())]


def record(name: str, path: str, asked: list[questions.Question], test: bool) -> dict:
    """A LLaVA record with one question and answer per turn."""
    turns = []
    for index, (_, question, answer) in enumerate(asked):
        turns.append({"from": "human", "value": question if index else "<image>\n" + question})
        turns.append({"from": "gpt", "value": answer})
    result = {"id": name, "image" if path.endswith("png") else "video": path, "conversations": turns}
    return result | ({"types": [question for question, _, _ in asked]} if test else {})


def write_video(path: Path, scene: digits.Scene, fps: int) -> None:
    """Writes the scene as H.264, where equal frames take almost no space."""
    with av.open(str(path), "w", options={"movflags": "faststart"}) as output:
        stream = output.add_stream("libx264", rate=fps)
        stream.width = stream.height = scene.side
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "18", "preset": "veryfast", "threads": "1", "g": "64"}
        empty = None
        for number in range(scene.seconds * fps):
            time = number / fps
            if any(event.centre(time) for event in scene.events):
                pixels = digits.frame(scene, time)
            else:
                pixels = empty = digits.frame(scene, time) if empty is None else empty
            output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        output.mux(stream.encode())


@command()
def main(arguments: list[str] | None = None) -> int:
    """Writes all files, by default with two processes."""
    parser = Parser(prog="make_data", description=__doc__, allow_abbrev=False)
    parser.add_argument("out", type=Path)
    parser.add_argument("--pictures", type=int, default=30000, help="images of pretrain.json, and of refer.json")
    parser.add_argument("--align", type=int, default=6000, help="images of align.json")
    parser.add_argument("--clips", type=int, default=16000, help="short clips of instruct.json")
    parser.add_argument("--long", type=int, default=800, help="long clips of long.json")
    parser.add_argument(
        "--long-seconds", type=int, nargs="+", default=LONG_SECONDS, help="lengths to draw from; held out: the last"
    )
    parser.add_argument("--long-fps", type=int, default=1, help="frames a second in the files of long clips")
    parser.add_argument("--review", type=int, default=6400, help="short clips of long.json, taken from instruct.json")
    parser.add_argument(
        "--tests", type=int, default=400, help="held-out short clips, as many images, a quarter as many long clips"
    )
    parser.add_argument("--side", type=int, default=digits.SIDE, help="pixels of a frame: twice what the model sees")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(arguments)
    digits.pictures()  # before the processes start, which then share them
    for name in ("images", "clips", "long"):
        (options.out / name).mkdir(parents=True, exist_ok=True)
    counts = {
        "pretrain": options.pictures,
        "refer": options.pictures,
        "align": options.align,
        "instruct": options.clips,
        "long": options.long,
        "pretrain_test": options.tests,
        "refer_test": options.tests,
        "instruct_test": options.tests,
        "long_test": options.tests // 4,
    }
    with multiprocessing.Pool(options.processes) as pool:
        for name, count in counts.items():
            drawn = {"seed": options.seed, "side": options.side}
            long = {"long_seconds": options.long_seconds, "long_fps": options.long_fps}
            draw = functools.partial(sample, folder=options.out, **drawn, **long)
            records = pool.map(draw, [(name, number) for number in range(count)], chunksize=16)
            if name == "long":
                short = range(min(options.review, options.clips))
                records += pool.map(functools.partial(review, **drawn), short)
            (options.out / f"{name}.json").write_text(json.dumps(records) + "\n")
            print(f"{name}: {len(records)} records", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
