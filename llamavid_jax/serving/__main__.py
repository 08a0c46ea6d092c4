"""Serve LLaMA-VID with OpenAI's protocol and a page to try it:

    llamavid-serve --model DIR

The page's address goes to stderr once the programs are compiled.  On SIGTERM the server completes running answers.
"""

import argparse
import gc
import importlib.util
import os
import signal
import sys
import tempfile
import threading
from pathlib import Path

from llamavid_jax.buckets import is_address
from llamavid_jax.commands import program
from llamavid_jax.commands.options import add_cache, add_transcribe, read_cache
from llamavid_jax.errors import InputError, Parser, command, say

LOCAL = ("127.0.0.1", "localhost", "::1")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="llamavid-serve", description="Serve LLaMA-VID with OpenAI's protocol.", allow_abbrev=False)
    parser.add_argument("--model", required=True, metavar="DIR", help="a converted checkpoint")
    parser.add_argument("--name", help="the model's name in requests (the folder's name)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 for all (127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="0 takes a free port (8000)")
    parser.add_argument(
        "--api-key", action="append", default=[], metavar="KEY", help="repeatable; or $LLAMAVID_API_KEY, which ps hides"
    )
    parser.add_argument("--slots", type=int, default=8, metavar="N", help="answers that run at once (8)")
    parser.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="longest answer, in tokens (512)")
    parser.add_argument("--queue", type=int, default=64, metavar="N", help="answers that may wait (64); more get a 429")
    parser.add_argument(
        "--deadline", type=float, default=600, metavar="S", help="seconds for a request (600); then 408"
    )
    parser.add_argument("--uploads", metavar="DIR", help="folder that keeps uploads (a temporary one)")
    parser.add_argument("--max-uploads", type=float, default=20, metavar="GB", help="size of all uploads (20)")
    parser.add_argument("--max-upload", type=float, default=2, metavar="GB", help="size of one file or URL (2)")
    parser.add_argument("--max-body", type=float, default=128, metavar="MB", help="size of one request (128)")
    parser.add_argument("--max-frames", type=int, default=20_000, metavar="N", help="frames of one video (20,000)")
    parser.add_argument("--feature-memory", type=float, default=4, metavar="GB", help="memory for encoded videos (4)")
    add_cache(parser)
    parser.add_argument("--decoder-memory", type=float, default=4, metavar="GB", help="per decoding process (4)")
    add_transcribe(parser, "requests may ask for subtitles from the sound")
    parser.add_argument("--media-root", type=Path, metavar="DIR", help="folder whose files requests may name (none)")
    parser.add_argument("--allow-private", action="store_true", help="fetch URLs of this machine and private networks")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="type of the weights (bfloat16)"
    )
    parser.add_argument("--quantize", choices=["int8", "int4"], help="quantise the weights while they are loaded")
    parser.add_argument("--kv-cache", default="float", choices=["float", "int8"], help="type of the KV cache (float)")
    parser.add_argument("--mesh", default="", metavar="AXIS=N", help="shard over devices, such as tensor=4")
    options = parser.parse_args(arguments)
    for name, least in (("slots", 1), ("max_new_tokens", 1), ("queue", 0), ("max_frames", 1), ("port", 0)):
        if getattr(options, name) < least:
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name)}; give a whole number from {least} on")
    if options.port > 65535:
        parser.error(f"--port is {options.port}; give a number up to 65535")
    for name in ("deadline", "max_uploads", "max_upload", "max_body", "feature_memory", "decoder_memory"):
        if not 0 < getattr(options, name) < 1e9:
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name)}; give a number above 0")
    if options.media_root is not None and not options.media_root.is_dir():
        parser.error(f"--media-root {options.media_root} is no folder; give one")
    options.api_key += [key] if (key := os.environ.get("LLAMAVID_API_KEY")) else []
    if not all(options.api_key):
        parser.error("--api-key is empty; give a key, or leave it out")
    if is_address(options.uploads or ""):
        parser.error(f"--uploads is {options.uploads}; give a folder on a disk")
    if options.transcribe and importlib.util.find_spec("faster_whisper") is None:
        raise ModuleNotFoundError(name="faster_whisper")  # now, and not at the first request
    options.cache = read_cache(options)
    options.name = options.name or Path(os.path.abspath(options.model)).name
    return options


def make_server(options: argparse.Namespace, uploads: str):
    """Loads the model and compiles its programs; reports how long that takes."""
    from llamavid_jax import LLaMAVIDLlavaForConditionalGeneration
    from llamavid_jax.media.image_processor import LLaMAVIDLlavaImageProcessor
    from llamavid_jax.parallel.mesh import make_mesh, parse_mesh
    from llamavid_jax.serving.app import Limits, Server
    from llamavid_jax.serving.engine import Engine
    from llamavid_jax.serving.prepare import Preparer
    from llamavid_jax.serving.sources import Sources
    from llamavid_jax.serving.uploads import Uploads

    images = LLaMAVIDLlavaImageProcessor.from_pretrained(options.model)
    kept = Uploads(uploads, int(options.max_uploads * 1e9))
    mesh = make_mesh(**parse_mesh(options.mesh)) if options.mesh else None
    say(f"loading {options.model}")
    model = LLaMAVIDLlavaForConditionalGeneration.from_pretrained(
        options.model, dtype=options.dtype, mesh=mesh, quantize=options.quantize, kv_cache=options.kv_cache
    )
    longest = model.config.text_config.max_length
    if options.max_new_tokens >= longest:
        raise InputError(
            f"--max-new-tokens is {options.max_new_tokens}, and this model has {longest} positions; give less"
        )
    sources = Sources(kept, options.media_root, options.allow_private, int(options.max_upload * 1e9))
    sizes = int(options.feature_memory * 1e9), options.max_frames, int(options.decoder_memory * 1e9)
    preparer = Preparer(model, images, sources, *sizes, options.cache, options.transcribe)
    engine = Engine(model, options.slots, options.max_new_tokens)
    say("making the programs")
    say(f"the programs took {engine.start() + preparer.warm():.0f} s")
    gc.collect()
    gc.freeze()  # 400,000 objects stay: full collections, due when a quarter as many are new, skip them
    limits = Limits(options.queue, options.deadline, int(options.max_body * 1e6), int(options.max_upload * 1e9))
    hosts = ("127.0.0.1", "localhost", "[::1]") if options.host in LOCAL else ("*",)
    return Server(options.name, engine, preparer, limits, tuple(options.api_key), hosts)


@command("llamavid-serve")
def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    import uvicorn  # `command` reports it if it is not installed

    program.keep_programs()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the temporary folder is deleted
    with tempfile.TemporaryDirectory(prefix="llamavid-uploads-") as temporary:
        server = make_server(options, options.uploads or temporary)
        config = uvicorn.Config(
            server.app,
            host=options.host,
            port=options.port,
            log_level="warning",
            server_header=False,
            timeout_graceful_shutdown=int(options.deadline) + 1,
        )
        socket = config.bind_socket()
        socket.listen(config.backlog)  # clients may connect once they read the address
        host, port = socket.getsockname()[:2]
        say(f"serving {options.name} at http://{f'[{host}]' if ':' in host else host}:{port}")
        uvicorn.Server(config).run(sockets=[socket])
    return 0


def run() -> None:
    """`main` as a process of its own."""
    program.run(main)


if __name__ == "__main__":
    sys.exit(run())
