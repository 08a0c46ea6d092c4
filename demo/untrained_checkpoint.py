"""Writes a tiny checkpoint with random weights, so that the demo runs without a download.  Its answers are noise.

python demo/untrained_checkpoint.py OUT
"""

import sys
from pathlib import Path

from llamavid_jax import LLaMAVIDLlavaConfig, LLaMAVIDLlavaForConditionalGeneration, LLaMAVIDLlavaImageProcessor
from llamavid_jax.data.qformer_tokenizer import QFormerTokenizer
from llamavid_jax.data.tokenize import load_tokenizer

ROOT = Path(__file__).parent.parent


def main(out: str) -> None:
    config = LLaMAVIDLlavaConfig.from_yaml(ROOT / "configs/models/tiny.yaml")
    model = LLaMAVIDLlavaForConditionalGeneration(
        config,
        tokenizer=load_tokenizer(ROOT / "tests/golden/text"),
        qformer_tokenizer=QFormerTokenizer(ROOT / "tests/golden/short_video_mean/qformer_tokenizer"),
    )
    model.save_pretrained(out)
    LLaMAVIDLlavaImageProcessor(config.vision_tower_config.image_size).save_pretrained(out)
    print(f"{out}: the tiny model with random weights. It is untrained: what it answers is noise.")


if __name__ == "__main__":
    main(sys.argv[1])
