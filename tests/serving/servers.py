"""A server of the tiny model, without a socket."""

from pathlib import Path

from llamavid_jax.media.image_processor import LLaMAVIDLlavaImageProcessor
from llamavid_jax.serving.app import Limits, Server
from llamavid_jax.serving.engine import Engine
from llamavid_jax.serving.prepare import Preparer
from llamavid_jax.serving.sources import Sources
from llamavid_jax.serving.uploads import Uploads


def make_server(model, engine: Engine, folder: Path, limits: Limits | None = None, keys=(), hosts=("*",), **sources):
    """`sources` are settings of Sources."""
    images = LLaMAVIDLlavaImageProcessor.of(model.config)
    preparer = Preparer(model, images, Sources(Uploads(folder, 1 << 20), **sources), max_frames=40)
    return Server("tiny", engine, preparer, limits or Limits(), keys, hosts)
