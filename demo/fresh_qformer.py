"""Gives a checkpoint an untrained Q-Former, with untrained projectors for the context token's attention.

    python -m demo.fresh_qformer MODEL OUT [--bert-type raw_bert] [--tower-alone]

Images of a single digit do not need the question.  From them the attention learns to look at one patch, whatever the
question, with such certainty that no gradient is left to learn anything else; so it is reset before it is needed.
"""

import dataclasses
import sys
from pathlib import Path

from llamavid_jax import LLaMAVIDLlavaForConditionalGeneration, LLaMAVIDLlavaProcessor
from llamavid_jax.errors import Parser, command


@command()
def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="fresh_qformer", description=__doc__, allow_abbrev=False)
    parser.add_argument("model", type=Path, help="checkpoint folder, such as runs/demo/stage0/model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--bert-type", help="another kind of text decoder; the model's by default")
    parser.add_argument("--tower-alone", action="store_true", help="keep the vision tower and nothing else")
    options = parser.parse_args(arguments)
    model = LLaMAVIDLlavaForConditionalGeneration.from_pretrained(options.model, dtype="float32")
    config = dataclasses.replace(model.config, bert_type=options.bert_type or model.config.bert_type)
    fresh = LLaMAVIDLlavaForConditionalGeneration(config).params
    parts = "qformer.", "visual_tokens.query_projector.", "visual_tokens.key_projector."
    parts = ("qformer.", "visual_tokens.", "llama.") if options.tower_alone else parts
    kept = {path: value for path, value in model.params.items() if path in fresh and not path.startswith(parts)}
    params = fresh | kept
    tokenizers = {"tokenizer": model.tokenizer, "qformer_tokenizer": model.qformer_tokenizer}
    LLaMAVIDLlavaForConditionalGeneration(config, params, **tokenizers).save_pretrained(options.out)
    LLaMAVIDLlavaProcessor.from_pretrained(options.model).image_processor.save_pretrained(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
