"""`LLaMAVIDLlavaForConditionalGeneration`: the model's public class, with NumPy or JAX arrays in and out.

It lays rows out on the host (`shapes.py`) and calls the compiled functions of `models/llama_vid.py` and
`generate.py`.  `checkpoints/pretrained.py` loads and saves it.
"""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llamavid_jax.checkpoints.pretrained import PretrainedModel
from llamavid_jax.checkpoints.tower import TowerHash
from llamavid_jax.inference.encode import SMALLEST_QUESTION, encode_visuals, frame_features, table_of, token_places
from llamavid_jax.inference.generate import evidence as evidence_of
from llamavid_jax.inference.generate import generate, prefills_at_once
from llamavid_jax.inference.generation_config import read_settings
from llamavid_jax.inference.outputs import ForwardOutput, GenerateOutput
from llamavid_jax.inference.prompt_cache import PromptCache
from llamavid_jax.inference.request import (
    Frames,
    Request,
    RequestError,
    check_row,
    read_request,
    read_visuals,
)
from llamavid_jax.inference.sampling import Sampling
from llamavid_jax.inference.stopping import RowText
from llamavid_jax.models.llama_vid import attend_frames, forward
from llamavid_jax.models.loss import next_token_loss
from llamavid_jax.shapes import FRAME_CHUNK, IGNORE_LABEL, TEXT, Row, bucket, chunk_size, merge_row, pad_rows, pad_to
from llamavid_jax.text.qformer_tokenizer import pad_questions


class LLaMAVIDLlavaForConditionalGeneration(PretrainedModel):
    """LLaMA-VID with its weights.

    A sample's frames are an array `[F, 3, H, W]` of normalised pixels (`pixel_values`) or `[F, P, E]` of precomputed
    features (`features`), with one prompt per placeholder in its row: each placeholder takes the visual tokens of
    these frames for its prompt.  A list of n arrays with n prompts pairs them one by one (several videos in one
    conversation; the list may repeat an array).  None is a text-only sample, which costs no vision work.
    """

    tower = functools.cached_property(TowerHash)

    def __repr__(self) -> str:
        config, text = self.config, self.config.text_config
        size = sum(array.size for array in jax.tree.leaves(self.params))
        return (
            f"{type(self).__name__}({size:,} parameters, {self.dtype.name}, {text.num_hidden_layers} layers of "
            f"{text.hidden_size}, {config.tokens_per_frame} tokens a frame, {config.bert_type})"
        )

    def vision_features(self, pixel_values: Frames, progress: Callable[[int], None] | None = None) -> np.ndarray:
        """Features `[F, P, E]` of frames, on the host: what `features=` takes.

        Those of EVA begin with the CLS token (`features_have_cls`), as `vision_tower_config.has_cls` says.
        """
        chunks = []
        for chunk in self.feature_chunks(pixel_values):
            chunks.append(chunk)
            if progress:
                progress(len(chunk))
        if not chunks:
            raise RequestError("pixel_values hold no frame; give at least one")
        return np.concatenate(chunks)

    def feature_chunks(self, pixel_values: Frames) -> Iterator[np.ndarray]:
        """`vision_features` in pieces `[f, P, E]`; frames are read as they are needed."""
        chunks = frame_features(self.structure, self.params, pixel_values, self.config)
        while True:
            with self.on_mesh():  # not held while the caller runs
                chunk = next(chunks, None)
            if chunk is None:
                return
            yield chunk

    def context_attention(
        self, pixel_values: Frames | None = None, prompt: str = "", *, features: np.ndarray | None = None
    ) -> np.ndarray:
        """Where in each frame the question looks: float32 `[F, S, S]` over the S × S patches, summing to 1 a frame.

        The weights of the paper's context token (section 3.2), averaged over the queries.  `features` `[F, P, E]`, as
        `vision_features` returns them, replace the pixels.
        """
        text_ids, text_mask = (array[0] for array in self._question_ids([prompt], [1]))
        features = self.vision_features(pixel_values) if features is None else features
        vision, chunks = self.config.vision_tower_config, []
        with self.on_mesh():
            for start in range(0, len(features), FRAME_CHUNK):
                chunk = features[start : start + FRAME_CHUNK]
                padded = pad_to(chunk, chunk_size(len(chunk)))
                weights = attend_frames(
                    self.structure, self.params, padded, text_ids, text_mask, has_cls=vision.has_cls
                )
                chunks.append(np.asarray(weights)[: len(chunk)])
        weights = np.concatenate(chunks)[:, -vision.num_patches :]  # without the CLS token's, if there is one
        return weights.reshape(-1, vision.side, vision.side)

    def visual_tokens(
        self,
        pixel_values: Frames | None = None,
        prompts: Sequence[str] = (),
        *,
        features: Frames | None = None,
        features_have_cls: bool = False,
    ) -> np.ndarray:
        """Visual tokens `[prompts, F·(n+1), D]` of one sample: for each prompt, frame after frame, context first."""
        with self.on_mesh():
            have_cls = self.config.vision_tower_config.has_cls, features_have_cls
            table, places = self._encode(*read_visuals([pixel_values], [features], [prompts], have_cls), None)
            if len({len(place) for place in places[0]}) != 1:
                raise RequestError("visual_tokens takes one video and at least one prompt; call it for each video")
            return np.asarray(table)[np.stack(places[0])]

    def __call__(
        self,
        input_ids: Any,
        *,
        pixel_values: Any = None,
        features: Any = None,
        prompts: Any = None,
        attention_mask: Any = None,
        labels: Any = None,
        features_have_cls: bool = False,
    ) -> ForwardOutput:
        """Logits of whole rows, and the loss if labels are given.

        `input_ids` `[B, t]` (or ragged lists) hold -200 where visual tokens go: one placeholder per prompt or, for
        precomputed features of a long video, one per visual token.  `attention_mask` `[B, t]` marks the tokens of
        rows padded on either side.  `labels` `[B, t]` hold -100 where no loss is wanted; the loss is the mean over all
        other labels.  Raises RequestError when rows, prompts and frames do not fit together.
        """
        request = read_request(
            self.config,
            input_ids,
            pixel_values=pixel_values,
            features=features,
            prompts=prompts,
            attention_mask=attention_mask,
            labels=labels,
            features_have_cls=features_have_cls,
        )
        with self.on_mesh():
            table, rows = self._merge(request)
            lengths = np.array([len(row.token_ids) for row in rows])
            batch, length = bucket(len(rows)), bucket(int(lengths.max()))

            token_ids = pad_rows([row.token_ids for row in rows], batch, length, 0)
            visual_index = pad_rows([row.visual_index for row in rows], batch, length, TEXT)
            logits = forward(self.structure, self.params, token_ids, table[None], visual_index)
            loss = None
            if labels is not None:
                loss = next_token_loss(logits, pad_rows([row.labels for row in rows], batch, length, IGNORE_LABEL))
            return ForwardOutput(logits[: len(rows), : lengths.max()], lengths, loss)

    def generate(
        self,
        input_ids: Any,
        *,
        pixel_values: Any = None,
        features: Any = None,
        prompts: Any = None,
        visual_tokens: Any = None,
        attention_mask: Any = None,
        features_have_cls: bool = False,
        generation_config: Any = None,
        do_sample: bool | None = None,
        max_new_tokens: int | None = None,
        temperature: float | int | None = None,
        top_p: float | int | None = None,
        top_k: int | None = None,
        stop: str | Sequence[str] | None = None,
        seed: int = 0,
        streamer: Callable[[int, str], None] | None = None,
        ignore_eos: bool = False,
        progress: Callable[[int], None] | None = None,
        cache: PromptCache | None = None,
        evidence: bool = False,
    ) -> GenerateOutput:
        """Answers every row until its end token, a `stop` string or `max_new_tokens` (512).

        Greedily at `temperature` 0, the default; `top_p` 1 and `top_k` 0 are off.  `generation_config`: transformers'
        GenerationConfig or a mapping of its fields, which the other arguments override; `do_sample` is transformers'
        too.  `visual_tokens` replaces frames and prompts: a list for each sample, with an array `[n, D]` for each
        placeholder.  `streamer(row, text)` receives each row's text as it comes, whole characters only.  The same
        `seed` draws the same answer.  `cache`, for a single row, keeps its keys and values for the next prompt.
        `evidence` adds the attention to each visual token, which takes one more step.  Raises RequestError for inputs
        that do not fit together or exceed the model's positions, ConversationError for prompts that cannot be read.
        """
        eos = self.config.text_config.eos_token_id
        drawn = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed, "stop": stop}
        settings = read_settings(generation_config, eos, do_sample, max_new_tokens=max_new_tokens, **drawn)
        if self.tokenizer is None and (settings.stop or streamer):
            raise RequestError("stop strings and streaming need the tokenizer; convert with --tokenizer FOLDER")
        request = read_request(
            self.config,
            input_ids,
            pixel_values=pixel_values,
            features=features,
            prompts=prompts,
            visual_tokens=visual_tokens,
            attention_mask=attention_mask,
            features_have_cls=features_have_cls,
            max_new_tokens=settings.max_new_tokens,
        )
        if cache is not None and (len(request.ids) > 1 or request.tokens is None):
            raise RequestError("cache goes with one row and its visual_tokens; leave it out, or give these")
        start = time.perf_counter()
        with self.on_mesh():
            table, rows = self._merge(request, progress, settings.max_new_tokens)
            jax.block_until_ready(table)
            encoded = time.perf_counter()
            kept = cache.take(rows[0], request.tokens[0]) if cache else None
            if kept and prefills_at_once() and 2 * kept[0] < len(rows[0].token_ids):
                kept = None  # the whole prompt in one piece is faster
            texts = [RowText(self.tokenizer, settings.stop) for _ in rows] if self.tokenizer else None

            def on_tokens(row: int, ids: list[int]) -> bool:
                new = texts[row].push(ids)
                if streamer and new:
                    streamer(row, new)
                return texts[row].stopped

            token_ids, keys_values = generate(
                self.structure,
                self.params,
                rows,
                table,
                max_new_tokens=settings.max_new_tokens,
                eos=-1 if ignore_eos else eos,
                sampling=Sampling(settings.temperature, settings.top_k, settings.top_p),
                seed=seed,
                on_tokens=on_tokens if texts else None,
                kept=kept,
            )
            token_ids = [text.ids for text in texts] if texts else token_ids
            looked_at = evidence_of(self.structure, self.params, rows, token_ids, keys_values) if evidence else None
            if cache:
                cache.put(rows[0], request.tokens[0], keys_values)
        for number, text in enumerate(texts or ()):
            if (rest := text.finish()) and streamer:
                streamer(number, rest)
        return GenerateOutput(
            token_ids=token_ids,
            texts=[text.text for text in texts] if texts else None,
            prompt_tokens=[len(row.token_ids) for row in rows],
            visual_tokens=[int((row.visual_index != TEXT).sum()) for row in rows],
            seconds={"encode": encoded - start, "generate": time.perf_counter() - encoded},
            cached_tokens=kept[0] if kept else 0,
            evidence=looked_at,
        )

    def _merge(
        self, request: Request, progress: Callable[[int], None] | None = None, max_new_tokens: int = 0
    ) -> tuple[jax.Array | np.ndarray, list[Row]]:
        """Encodes the visuals and lays the rows out: the table of visual tokens `[N, D]` and one Row a sample."""
        if request.tokens is None:
            table, places = self._encode(request.questions, request.visuals, request.blocks, progress)
        else:
            table, places = table_of(request.tokens, self.config.text_config.hidden_size, self.dtype)
        for number, (row, blocks) in enumerate(zip(request.ids, places, strict=True)):
            check_row(self.config, number, row, len(blocks), sum(map(len, blocks)), max_new_tokens)
        return table, [merge_row(*row) for row in zip(request.ids, places, request.labels, strict=True)]

    def _encode(self, questions, visuals, blocks, progress) -> tuple[jax.Array, list[list[np.ndarray]]]:
        """The table `[N, D]` of all visual tokens; in `places[row][prompt]`, the indices of a prompt's tokens."""
        if not visuals:
            return jnp.zeros((1, self.config.text_config.hidden_size), self.dtype), [[] for _ in blocks]
        text_ids, text_mask = self._question_ids(questions, [len(block) for block in blocks])
        table, slots = encode_visuals(
            self.structure, self.params, self.config, visuals, text_ids, text_mask, self.dtype, progress
        )
        places = [
            [token_places(slots[v][question], self.config.tokens_of(visuals[v].has_cls)) for v, question in row]
            for row in blocks
        ]
        if any(len(place) == 0 for row in places for place in row):
            raise RequestError("a video holds no frame; give at least one")
        return table, places

    def _question_ids(self, questions: Sequence[str], counts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Ids and mask `[U, T]` of questions for the Q-Former, `counts` of them per sample; T is a bucket.

        A question longer than the Q-Former's positions loses its beginning.
        """
        if self.qformer_tokenizer is None:
            raise RequestError("prompts need the Q-Former's tokenizer; convert with --bert-tokenizer FOLDER")
        positions = self.config.qformer_config.max_position_embeddings
        ids, mask = self.qformer_tokenizer(questions, positions)
        length = min(bucket(ids.shape[1], SMALLEST_QUESTION), positions)
        return pad_questions(ids, mask, counts, len(ids), length)
