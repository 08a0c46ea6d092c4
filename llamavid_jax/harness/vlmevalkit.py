"""The model in VLMEvalKit.  In a clone of it, in the folder of its run.py, or anywhere with ms-vlmeval from PyPI:

    python -m llamavid_jax.harness.vlmevalkit llamavid-7b-336 --data MMBench_DEV_EN --work-dir runs

The options after the checkpoint go to run.py, which knows the model as `llamavid_jax`.
"""

import functools
import importlib.util
import os
import sys
from typing import Any

from llamavid_jax import LLaMAVIDLlavaForConditionalGeneration, LLaMAVIDLlavaImageProcessor
from llamavid_jax.commands.program import keep_programs
from llamavid_jax.errors import InputError, complain
from llamavid_jax.inference.session import Session

try:
    from vlmeval.config import supported_VLM
    from vlmeval.vlm.base import BaseModel
except ModuleNotFoundError as missing:
    error = InputError(f"{missing.name} is not there; run this in a clone of VLMEvalKit with its requirements")
    sys.exit(complain(error, "vlmevalkit"))

NAME = "llamavid_jax"


class LlamaVidJax(BaseModel):
    """Images and videos before the text, greedily; videos at one frame a second, or at the data set's `fps`."""

    VIDEO_LLM = True

    def __init__(self, checkpoint: str, dtype: str = "bfloat16", max_new_tokens: int = 128):
        super().__init__()
        keep_programs()
        self.model = LLaMAVIDLlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=dtype)
        self.image_processor = LLaMAVIDLlavaImageProcessor.from_pretrained(checkpoint)
        self.max_new_tokens, self.fps = max_new_tokens, 1.0

    def generate_inner(self, message: list[dict[str, Any]], dataset: str | None = None) -> str:
        parts = {kind: [part["value"] for part in message if part["type"] == kind] for kind in self.allowed_types}
        shown = {"images": parts["image"], "videos": parts["video"], "fps": self.fps, "follow_ups": False}
        session = Session(self.model, self.image_processor, **shown)
        return session.ask("\n".join(parts["text"]), max_new_tokens=self.max_new_tokens).text


def main() -> None:
    checkpoint, *arguments = sys.argv[1:] or sys.exit(
        "give the folder of a converted checkpoint, then run.py's options"
    )
    supported_VLM[NAME] = functools.partial(LlamaVidJax, os.path.abspath(checkpoint))
    sys.path.insert(0, os.getcwd())
    sys.argv = ["run.py", "--model", NAME, *arguments]
    # ms-vlmeval has it in its package, a clone beside it; another run.py may lie in any folder
    run = importlib.import_module("vlmeval.run" if importlib.util.find_spec("vlmeval.run") else "run")
    run.load_env()
    run.main()


if __name__ == "__main__":
    main()
