"""The same language model in PyTorch on the questions of `serve_load`: single requests and static batches.

    python -m benchmarks.serve_torch --model demo/model --films 8

Its inputs are precomputed: the videos' visual tokens, from this package's encoder, so that it has no cost for the
server's store and HTTP.  transformers' LLaMA answers greedily with its cache, `--batch` requests at a time, padded to
the longest.  Prints answers a second, the CPU time of one, and how many differ from this package's answers.
"""

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers

from benchmarks.serve_load import chosen_questions, drawn
from llamavid_jax import LLaMAVIDLlavaForConditionalGeneration, LLaMAVIDLlavaImageProcessor
from llamavid_jax.inference.session import Session
from llamavid_jax.shapes import IMAGE_TOKEN
from llamavid_jax.weights.files import to_torch, weight_table

PREFIX = "language_model."


def torch_llama(model: LLaMAVIDLlavaForConditionalGeneration, dtype: torch.dtype) -> transformers.LlamaForCausalLM:
    sizes = dataclasses.asdict(model.config.text_config)
    rope = {"rope_theta": sizes.pop("rope_theta"), "rope_type": "linear", "factor": sizes.pop("rope_factor")}
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**sizes, rope_parameters=rope, attn_implementation="sdpa", pad_token_id=0)
    )
    state = {}
    for weight in weight_table(model.config, "documented"):
        if weight.name.startswith(PREFIX):
            value = np.asarray(model.params[weight.path], np.float32)
            value = value if weight.index is None else value[weight.index]
            state[weight.name.removeprefix(PREFIX)] = torch.tensor(to_torch(value, weight.pattern))
    llama.load_state_dict(state)
    return llama.to(dtype).eval()


def embedded(llama: transformers.LlamaForCausalLM, ids: list[int], blocks: list[np.ndarray]) -> torch.Tensor:
    """A row `[T, D]`: its text's embeddings, with visual tokens in place of -200."""
    parts, left = [], iter(blocks)
    for token in ids:
        own = token == IMAGE_TOKEN
        parts.append(
            torch.tensor(np.asarray(next(left), np.float32)) if own else llama.model.embed_tokens.weight[[token]]
        )
    return torch.cat([part.to(llama.dtype) for part in parts])


def answer(llama: transformers.LlamaForCausalLM, rows: list[torch.Tensor], tokenizer, most: int) -> list[str]:
    longest = max(map(len, rows))
    padded = torch.stack([torch.nn.functional.pad(row, (0, 0, longest - len(row), 0)) for row in rows])
    mask = torch.tensor([[place >= longest - len(row) for place in range(longest)] for row in rows]).long()
    made = llama.generate(inputs_embeds=padded, attention_mask=mask, max_new_tokens=most, do_sample=False)
    eos = llama.config.eos_token_id
    rows = [ids[: ids.index(eos)] if eos in ids else ids for ids in made.tolist()]
    return [tokenizer.decode(ids).strip() for ids in rows]


@torch.inference_mode()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--model", required=True, metavar="DIR")
    parser.add_argument("--films", type=int, default=8, metavar="N")
    parser.add_argument("--questions", type=int, default=40, metavar="N", help="questions about each video (40)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], metavar="N")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    options = parser.parse_args()
    model = LLaMAVIDLlavaForConditionalGeneration.from_pretrained(options.model, dtype=options.dtype)
    images = LLaMAVIDLlavaImageProcessor.from_pretrained(options.model)
    llama = torch_llama(model, getattr(torch, options.dtype))
    rows, alone = [], []
    with tempfile.TemporaryDirectory() as folder:
        for path in drawn(Path(folder), options.films):
            film = Session(model, images, videos=[path])
            film.encode()
            for question in chosen_questions(options.questions):
                ids, blocks = film.inputs(question)
                rows.append(embedded(llama, ids, blocks))
                alone.append(model.generate([ids], visual_tokens=[blocks], max_new_tokens=64).texts[0].strip())
    order = np.random.default_rng(0).permutation(len(rows)).tolist()  # batches mix videos of all lengths
    print(f"{len(rows)} questions about {options.films} films, {options.dtype}, {torch.get_num_threads()} threads")
    print("| batch | answers/s | seconds of a batch: p50 / p95 | CPU, ms | other answers |\n|---|---|---|---|---|")
    for size in options.batch:
        answer(llama, [rows[place] for place in order[:size]], model.tokenizer, 64)
        times, other, started, before = [], 0, time.perf_counter(), time.process_time()
        for at in range(0, len(order), size):
            places, began = order[at : at + size], time.perf_counter()
            texts = answer(llama, [rows[place] for place in places], model.tokenizer, 64)
            times.append(time.perf_counter() - began)
            other += sum(text != alone[place] for text, place in zip(texts, places, strict=True))
        rate = len(order) / (time.perf_counter() - started)
        cpu, (p50, p95) = (time.process_time() - before) / len(order), np.percentile(times, (50, 95))
        print(f"| {size} | {rate:.1f} | {p50:.2f} / {p95:.2f} | {1000 * cpu:.0f} | {other} |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
