"""README.md of a converted folder: what it is, and how it is used."""

from pathlib import Path

from llamavid_jax.config.schema import LLaMAVIDLlavaConfig
from llamavid_jax.files import write_files

CARD = """\
---
library_name: llamavid_jax
pipeline_tag: video-text-to-text
tags: [llama-vid, jax, flax]
---
# {name}

LLaMA-VID ([arXiv 2311.17043](https://arxiv.org/abs/2311.17043)) for `llamavid_jax`: questions about images and videos,
{config.tokens_per_frame} tokens a frame.  Converted from `{source}`; its licence and that of its language model hold.

| | |
|---|---|
| vision tower | {vision.kind}, {vision.num_hidden_layers} layers of {vision.hidden_size}, {vision.image_size} pixels |
| text decoder | {config.bert_type}, {qformer.num_hidden_layers} layers of {qformer.hidden_size} |
| language model | {text.num_hidden_layers} layers of {text.hidden_size}, {text.max_length} tokens |
| weights | {parameters:,} parameters, {dtype} |

```python
from llamavid_jax import LLaMAVIDLlavaForConditionalGeneration, LLaMAVIDLlavaProcessor

model = LLaMAVIDLlavaForConditionalGeneration.from_pretrained(".")
processor = LLaMAVIDLlavaProcessor.from_pretrained(".")
content = [{{"type": "video", "path": "walk.mp4"}}, {{"type": "text", "text": "What happens?"}}]
inputs = processor.chat([{{"role": "user", "content": content}}])
print(model.generate(**inputs).texts[0])
```
"""


def write_card(out: Path, name: str, source: str, config: LLaMAVIDLlavaConfig, parameters: int, dtype: str) -> None:
    """Writes the model card of the folder `name`, README.md."""
    parts = {"vision": config.vision_tower_config, "qformer": config.qformer_config, "text": config.text_config}
    card = CARD.format(name=name, source=source, config=config, parameters=parameters, dtype=dtype, **parts)
    write_files(out, {"README.md": card.encode()})
