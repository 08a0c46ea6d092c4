"""`LLaMAVIDLlavaForConditionalGeneration`: the friendly front of the model, NumPy or JAX arrays in and out.

It holds a configuration, parameters and the two tokenizers, lays rows out on the host (`data/batching.py`) and calls
the compiled functions of `models/llama_vid.py` and `generation/`.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from llamavid_jax.checkpoint import load_weights, parse_dtype, save_weights
from llamavid_jax.config import IGNORE_LABEL, IMAGE_TOKEN, LLaMAVIDLlavaConfig
from llamavid_jax.data.batching import TEXT, MergeError, Row, bucket, merge_row, pad_rows, strip_padding
from llamavid_jax.data.qformer_tokenizer import QFormerTokenizer
from llamavid_jax.data.tokenize import Tokenizer
from llamavid_jax.generation.encode import Visual, encode_visuals, frame_features, token_places
from llamavid_jax.generation.generate import generate
from llamavid_jax.generation.sampling import Sampling
from llamavid_jax.generation.stopping import RowText
from llamavid_jax.models.llama_vid import LlamaVid, forward, next_token_loss
from llamavid_jax.processor import load_tokenizers
from llamavid_jax.sharding import param_shardings

Frames = Any  # [F, 3, H, W] pixels or [F, P, E] features: an array, or an iterable of frames
Sample = Frames | list[Frames] | None


@dataclasses.dataclass(frozen=True)
class ForwardOutput:
    """`logits` `[B, T, V]`, T the longest merged row: a row starts at position 0, behind its end is noise.

    `lengths` `[B]` are the merged lengths.  `loss` is None without labels.
    """

    logits: jax.Array
    lengths: np.ndarray
    loss: jax.Array | None


@dataclasses.dataclass(frozen=True)
class GenerateOutput:
    """New ids of every row, without end token; their text where the model has a tokenizer; what the prompts held.

    `seconds` tells how long decoding and encoding the frames took ("encode") and how long the answer ("generate").
    """

    token_ids: list[list[int]]
    texts: list[str] | None
    prompt_tokens: list[int]
    visual_tokens: list[int]
    seconds: dict[str, float]


class LLaMAVIDLlavaForConditionalGeneration:
    """LLaMA-VID with its weights.

    A sample's frames are an array `[F, 3, H, W]` of normalised pixels (`pixel_values`) or `[F, P, E]` of ready
    features (`features`), with as many prompts as its row has placeholders: each placeholder takes the visual tokens
    of these frames for its prompt.  A list of n arrays with n prompts pairs them one by one (several videos in one
    conversation).  None is a text-only sample, which costs no vision work.
    """

    def __init__(
        self,
        config: LLaMAVIDLlavaConfig,
        params: dict[str, Any] | None = None,
        *,
        dtype: Any = "float32",
        mesh: Mesh | None = None,
        seed: int = 0,
        tokenizer: Tokenizer | None = None,
        qformer_tokenizer: QFormerTokenizer | None = None,
    ):
        """Random weights from `seed` where no `params` are given."""
        self.config, self.mesh, self.dtype = config, mesh, parse_dtype(dtype)
        self.tokenizer, self.qformer_tokenizer = tokenizer, qformer_tokenizer

        def make() -> LlamaVid:
            return LlamaVid(config, rngs=nnx.Rngs(seed), dtype=self.dtype, param_dtype=self.dtype)

        self.graphdef, abstract = nnx.split(nnx.eval_shape(make), nnx.Param)
        if params is None:
            shardings = mesh and param_shardings(nnx.to_pure_dict(abstract), config, mesh)
            params = jax.jit(lambda: nnx.to_pure_dict(nnx.state(make(), nnx.Param)), out_shardings=shardings)()
        nnx.replace_by_pure_dict(abstract, params)
        self.params = abstract

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, *, dtype: Any = "bfloat16", mesh: Mesh | None = None
    ) -> "LLaMAVIDLlavaForConditionalGeneration":
        """Loads a converted checkpoint as `dtype`, straight onto `mesh` where one is given, every host its shards.

        Raises ConfigError or WeightsError, naming the file and what to do.
        """
        config = LLaMAVIDLlavaConfig.from_pretrained(directory)
        params = load_weights(directory, config, dtype, mesh)
        tokenizer, qformer_tokenizer = load_tokenizers(directory)
        return cls(config, params, dtype=dtype, mesh=mesh, tokenizer=tokenizer, qformer_tokenizer=qformer_tokenizer)

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes `config.json`, the weights and the tokenizers."""
        self.config.save_pretrained(directory)
        save_weights(directory, nnx.to_pure_dict(self.params))
        for tokenizer in (self.tokenizer, self.qformer_tokenizer):
            if tokenizer is not None:
                tokenizer.save_pretrained(directory)

    def vision_features(self, pixel_values: Frames, progress: Callable[[int], None] | None = None) -> np.ndarray:
        """Features `[F, 1+P, E]` of frames, CLS first, on the host: what `features=` takes with `features_have_cls`."""
        chunks = []
        with self._on_mesh():
            for chunk in frame_features(self.graphdef, self.params, pixel_values, self.config):
                chunks.append(chunk)
                if progress:
                    progress(len(chunk))
        if not chunks:
            raise MergeError("pixel_values hold no frame; give at least one")
        return np.concatenate(chunks)

    def visual_tokens(
        self,
        pixel_values: Frames | None = None,
        prompts: Sequence[str] = (),
        *,
        features: Frames | None = None,
        features_have_cls: bool = False,
    ) -> jax.Array:
        """Visual tokens `[prompts, F·(n+1), D]` of one sample: for each prompt, frame after frame, context first."""
        with self._on_mesh():
            table, places = self._encode([pixel_values], [features], [list(prompts)], features_have_cls, None)
            return table[np.stack(places[0])]

    def __call__(
        self,
        input_ids: Any,
        *,
        pixel_values: Sequence[Sample] | None = None,
        features: Sequence[Sample] | None = None,
        prompts: Sequence[Sequence[str]] | None = None,
        attention_mask: Any = None,
        labels: Any = None,
        features_have_cls: bool = False,
    ) -> ForwardOutput:
        """Logits of whole rows, and the loss where labels are given.

        `input_ids` `[B, t]` (or ragged lists) hold -200 where visual tokens go; one placeholder a prompt, or, for
        ready features of a long video, one for every visual token.  `attention_mask` `[B, t]` marks the tokens of
        rows padded on either side.  `labels` `[B, t]` hold -100 where no loss is wanted; the loss is the mean over all
        other labels (M10).  Raises MergeError when rows, prompts and frames do not fit together.
        """
        with self._on_mesh():
            table, rows = self._merge(
                input_ids, pixel_values, features, prompts, attention_mask, labels, features_have_cls, None
            )
            lengths = np.array([len(row.token_ids) for row in rows])
            batch, length = bucket(len(rows)), bucket(int(lengths.max()))

            def padded(rows: list[np.ndarray], value: int) -> np.ndarray:
                out = pad_rows(rows, length, value)
                return np.pad(out, [(0, batch - len(out)), (0, 0)], constant_values=value)

            token_ids = padded([row.token_ids for row in rows], 0)
            visual_index = padded([row.visual_index for row in rows], TEXT)
            logits = forward(self.graphdef, self.params, token_ids, table[None], visual_index)
            loss = None
            if labels is not None:
                loss = next_token_loss(logits, padded([row.labels for row in rows], IGNORE_LABEL))
            return ForwardOutput(logits[: len(rows), : lengths.max()], lengths, loss)

    def generate(
        self,
        input_ids: Any,
        *,
        pixel_values: Sequence[Sample] | None = None,
        features: Sequence[Sample] | None = None,
        prompts: Sequence[Sequence[str]] | None = None,
        attention_mask: Any = None,
        features_have_cls: bool = False,
        max_new_tokens: int = 512,
        temperature: float | int = 0.0,
        top_p: float | int = 1.0,
        top_k: int = 0,
        stop: Sequence[str] = (),
        seed: int = 0,
        streamer: Callable[[int, str], None] | None = None,
        ignore_eos: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> GenerateOutput:
        """Answers every row, greedily at temperature 0, until its end token, a `stop` string or `max_new_tokens`.

        `streamer(row, text)` is given each row's text as it comes, whole characters only.  The same `seed` draws the
        same answer.  Raises MergeError when a row and its new tokens are longer than the model's positions.
        """
        _check_sampling(max_new_tokens, temperature, top_p, top_k)
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if self.tokenizer is None and (stop or streamer):
            raise MergeError("stop strings and streaming need the tokenizer; convert with --tokenizer FOLDER")
        start = time.perf_counter()
        with self._on_mesh():
            table, rows = self._merge(
                input_ids, pixel_values, features, prompts, attention_mask, None, features_have_cls, progress
            )
            table.block_until_ready()
            encoded = time.perf_counter()
            for number, row in enumerate(rows):
                if len(row.token_ids) + max_new_tokens > self.config.text_config.max_length:
                    raise MergeError(
                        f"row {number} holds {len(row.token_ids)} tokens, which with {max_new_tokens} new ones is more "
                        f"than the {self.config.text_config.max_length} positions of this model; sample fewer frames "
                        "(a lower fps), ask for fewer new tokens, or use a long-video checkpoint"
                    )
            texts = [RowText(self.tokenizer, stop) for _ in rows] if self.tokenizer else None

            def on_tokens(row: int, ids: list[int]) -> bool:
                new = texts[row].push(ids)
                if streamer and new:
                    streamer(row, new)
                return texts[row].stopped

            token_ids = generate(
                self.graphdef,
                self.params,
                rows,
                table,
                max_new_tokens=max_new_tokens,
                eos=-1 if ignore_eos else self.config.text_config.eos_token_id,
                sampling=Sampling(temperature, top_k, top_p),
                seed=seed,
                on_tokens=on_tokens if texts else None,
            )
        for number, text in enumerate(texts or ()):
            if (rest := text.finish()) and streamer:
                streamer(number, rest)
        return GenerateOutput(
            token_ids=[text.ids for text in texts] if texts else token_ids,
            texts=[text.text for text in texts] if texts else None,
            prompt_tokens=[len(row.token_ids) for row in rows],
            visual_tokens=[int((row.visual_index != TEXT).sum()) for row in rows],
            seconds={"encode": encoded - start, "generate": time.perf_counter() - encoded},
        )

    def _on_mesh(self) -> contextlib.AbstractContextManager:
        return jax.set_mesh(self.mesh) if self.mesh is not None else contextlib.nullcontext()

    def _merge(self, input_ids, pixel_values, features, prompts, attention_mask, labels, features_have_cls, progress):
        """Encodes the visuals and lays the rows out: the table of visual tokens `[N, D]` and one Row a sample."""
        count = len(input_ids)
        if count == 0:
            raise MergeError("input_ids hold no rows; give at least one")
        ids = [_checked_ids(number, row) for number, row in enumerate(input_ids)]
        given = {
            "pixel_values": pixel_values, "features": features, "prompts": prompts,
            "attention_mask": attention_mask, "labels": labels,
        }  # fmt: skip
        for name, values in given.items():
            if values is not None and len(values) != count:
                raise MergeError(f"input_ids hold {count} rows, but {name} {len(values)}; give one entry for each row")
        none = [None] * count
        prompts = [list(p or []) for p in prompts] if prompts is not None else [[] for _ in ids]
        table, places = self._encode(pixel_values or none, features or none, prompts, features_have_cls, progress)
        rows: list[Row] = []
        for number, row in enumerate(ids):
            mask = None if attention_mask is None else np.asarray(attention_mask[number], bool)
            kept = strip_padding(row, mask)
            row = np.where(row == self.config.image_token_index, IMAGE_TOKEN, row)[kept]
            row_labels = None if labels is None else np.asarray(labels[number])[kept]
            self._check_ids(number, row)
            rows.append(merge_row(row, places[number], row_labels))
        return table, rows

    def _check_ids(self, number: int, row: np.ndarray) -> None:
        text = row[row != IMAGE_TOKEN]
        if len(row) == 0:
            raise MergeError(
                f"row {number} of input_ids is all padding; attention_mask must keep at least one position"
            )
        if len(text) and (text.min() < 0 or text.max() >= self.config.text_config.vocab_size):
            raise MergeError(
                f"row {number} of input_ids holds the id {text.min() if text.min() < 0 else text.max()}; ids are 0 to "
                f"{self.config.text_config.vocab_size - 1}, or {IMAGE_TOKEN} for an image"
            )

    def _encode(self, pixel_values, features, prompts, features_have_cls, progress):
        """The table `[N, D]` of all visual tokens, and `places[sample][prompt]`: where each prompt's tokens stand."""
        texts = [prompt for sample in prompts for prompt in sample]
        visuals: list[Visual] = []
        of_prompt: list[list[tuple[int, int]]] = []  # per sample and prompt: (visual, question of that visual)
        question = 0
        for number, (pixels, ready, sample_prompts) in enumerate(zip(pixel_values, features, prompts, strict=True)):
            if pixels is not None and ready is not None:
                raise MergeError(f"sample {number} has both pixel_values and features; give one of them")
            frames = pixels if ready is None else ready
            if (frames is None) != (not sample_prompts):
                raise MergeError(
                    f"sample {number} has {'no frames' if frames is None else 'frames'} but "
                    f"{len(sample_prompts)} prompts; give frames and at least one prompt, or neither"
                )
            kind = {"are_features": ready is not None, "has_cls": ready is None or features_have_cls}
            questions = list(range(question, question + len(sample_prompts)))
            question += len(sample_prompts)
            if isinstance(frames, (list, tuple)) and np.ndim(frames[0]) != (3 if ready is None else 2):
                if len(frames) != len(sample_prompts):
                    raise MergeError(
                        f"sample {number} has {len(frames)} videos but {len(sample_prompts)} prompts; "
                        "give one prompt for each"
                    )
                of_prompt.append([(len(visuals) + i, 0) for i in range(len(frames))])
                visuals += [Visual(f, [q], **kind) for f, q in zip(frames, questions, strict=True)]
            else:
                of_prompt.append([(len(visuals), i) for i in range(len(questions))])
                visuals += [Visual(frames, questions, **kind)] if frames is not None else []
        if not visuals:
            return jnp.zeros((1, self.config.text_config.hidden_size), self.dtype), [[] for _ in prompts]
        if self.qformer_tokenizer is None:
            raise MergeError("prompts need the Q-Former's tokenizer; convert with --bert-tokenizer FOLDER")
        text_ids, text_mask = self.qformer_tokenizer(texts)
        table, slots = encode_visuals(
            self.graphdef, self.params, self.config, visuals, text_ids, text_mask, self.dtype, progress
        )
        width = self.config.tokens_per_frame
        places = [[token_places(slots[v][q], width) for v, q in sample] for sample in of_prompt]
        if any(len(place) == 0 for sample in places for place in sample):
            raise MergeError("a video holds no frame; give at least one")
        return table.reshape(-1, table.shape[-1]), places


def _checked_ids(number: int, row: Any) -> np.ndarray:
    ids = np.asarray(row)
    if ids.ndim != 1 or len(ids) == 0 or not np.issubdtype(ids.dtype, np.integer):
        raise MergeError(
            f"row {number} of input_ids is {ids.dtype} of shape {ids.shape}; give a row of one or more whole numbers"
        )
    return ids


def _check_sampling(max_new_tokens: int, temperature: float | int, top_p: float | int, top_k: int) -> None:
    for name, value, fits, needed in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "1 or more"),
        ("temperature", temperature, temperature >= 0, "0 (greedy) or more"),
        ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1"),
        ("top_k", top_k, top_k >= 0, "0 (off) or more"),
    ):
        if not fits:
            raise MergeError(f"{name} is {value}; it must be {needed}")
