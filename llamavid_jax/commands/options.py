"""Options that several commands share, and how they are read."""

import argparse
import dataclasses
import math
import os
from typing import Any

from llamavid_jax.errors import InputError, say
from llamavid_jax.files import local
from llamavid_jax.inference.film_text import film_subtitles
from llamavid_jax.inference.request import Settings
from llamavid_jax.media.features import is_features
from llamavid_jax.media.source import is_url
from llamavid_jax.text.conversation import TEMPLATES
from llamavid_jax.text.subtitles import TIMES


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, type=lambda text: str(local(text)), metavar="DIR", help="a converted checkpoint"
    )
    parser.add_argument(
        "--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="data type of the weights (bfloat16)"
    )
    parser.add_argument("--quantize", choices=["int8", "int4"], help="quantise the weights while loading")
    parser.add_argument("--kv-cache", default="float", choices=["float", "int8"], help="type of the KV cache (float)")
    parser.add_argument("--mesh", default="", metavar="AXIS=N", help="shard over devices, such as tensor=4")


def load_model(options: argparse.Namespace) -> Any:
    """Loads the model that the options of `add_model` describe."""
    from llamavid_jax import LLaMAVIDLlavaForConditionalGeneration  # JAX takes seconds to import
    from llamavid_jax.parallel.mesh import local_mesh, parse_mesh

    mesh = local_mesh(**parse_mesh(options.mesh)) if options.mesh else None
    return LLaMAVIDLlavaForConditionalGeneration.from_pretrained(
        options.model, dtype=options.dtype, mesh=mesh, quantize=options.quantize, kv_cache=options.kv_cache
    )


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Options for generation and for the prompt's template."""
    parser.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="longest answer, in tokens (512)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (0)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="nucleus sampling of probability P (1)")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="sample from the K likeliest tokens (0: all)")
    parser.add_argument("--seed", type=int, default=0, help="random seed for sampling (0)")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end the answer before TEXT")
    parser.add_argument(
        "--template", default="vicuna_v1", choices=sorted(TEMPLATES), help="conversation format (vicuna_v1)"
    )


def read_settings(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `generate`; RequestError for a wrong one."""
    names = [field.name for field in dataclasses.fields(Settings)]
    options.stop = [checked(text, "--stop") for text in options.stop]
    settings = Settings(**{name: getattr(options, name) for name in names})
    if not settings.temperature and (settings.top_p < 1 or settings.top_k):
        say("--top-p and --top-k change nothing at temperature 0, which is greedy; give --temperature too")
    return dataclasses.asdict(settings)


def add_fps(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--fps", type=float, help="frames sampled per second of video (the checkpoint's: 1)")


def check_fps(options: argparse.Namespace) -> None:
    if options.fps is not None and not 0 < options.fps < math.inf:
        raise InputError(f"--fps is {options.fps}; give a number above 0, such as 1")


def add_film(parser: argparse.ArgumentParser) -> None:
    """Options for text between the frames of a video."""
    parser.add_argument(
        "--subtitles", metavar="FILE|auto", help="subtitles of the single video: .srt, .vtt, .ass; auto: its own track"
    )
    add_transcribe(parser, "subtitles from the sound of the one video")
    add_times(parser)


def check_film(options: argparse.Namespace) -> None:
    """Reads the file of `--subtitles`.  InputError for options that do not go together."""
    for option in ("subtitles", "transcribe", "times", "evidence"):
        if getattr(options, option) is not None and (len(options.video) != 1 or options.image):
            raise InputError(f"--{option} goes with one --video alone; give that")
    if options.transcribe is not None and options.subtitles is not None:
        raise InputError("--transcribe makes the subtitles that --subtitles gives; leave one of them out")
    if options.subtitles is not None:
        if options.subtitles == "auto" and (is_url(options.video[0]) or is_features(options.video[0])):
            raise InputError(
                f"--subtitles auto reads the track in a file, and --video is {options.video[0]}; give a video file"
            )
        options.subtitles = film_subtitles(options.subtitles, options.video[0], options.like_original)
    if options.transcribe is not None and (is_url(options.video[0]) or is_features(options.video[0])):
        raise InputError(
            f"--transcribe hears the sound in a file, and --video is {options.video[0]}; give a video file"
        )


def add_transcribe(parser: argparse.ArgumentParser, what: str) -> None:
    how = f"{what}, by a model of faster-whisper: a folder or a name (small)"
    parser.add_argument("--transcribe", nargs="?", const="small", metavar="MODEL", help=how)


def add_times(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--times",
        nargs="?",
        const=TIMES[0],
        choices=TIMES,
        help="put the time of each frame (or minute) into the text, for a model trained this way",
    )


def add_cache(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cache",
        metavar="DIR",
        default=os.environ.get("LLAMAVID_CACHE") or None,
        help="folder that keeps features of videos for later questions (LLAMAVID_CACHE)",
    )
    parser.add_argument("--cache-size", type=float, metavar="GB", help="maximum size of that folder (20)")


def read_cache(options: argparse.Namespace) -> Any:
    """The feature cache in the folder that --cache names; None without it."""
    size = 20.0 if options.cache_size is None else options.cache_size
    if not 0 < size < math.inf:
        raise InputError(f"--cache-size is {size}; give a number of GB above 0, such as 20")
    if options.cache is None:
        if options.cache_size is not None:
            say("--cache-size changes nothing where no features are kept; give --cache too")
        return None
    from llamavid_jax.inference.feature_cache import FeatureCache

    return FeatureCache(options.cache, math.ceil(size * 1e9), say)


def checked(text: str, name: str) -> str:
    """Decodes an argument as UTF-8 in any locale; Python passes undecodable bytes as lone surrogates.

    Raises InputError for bytes that are not UTF-8.
    """
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError:
        raise InputError(f"{name} is {text!r}, which is not UTF-8; give it in UTF-8") from None
