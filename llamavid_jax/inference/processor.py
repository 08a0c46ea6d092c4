"""The documented `LLaMAVIDLlavaProcessor`: text, images, videos and chats -> inputs of the model.

    inputs = processor(text="... USER: <image>\\nWhat is this? ASSISTANT:", images="cat.png")
    inputs = processor.chat([{"role": "user", "content": [{"type": "video", "path": "walk.mp4"}, ...]}])

    input_ids       int32 [B, T], -200 for each placeholder, padded on the right
    attention_mask  bool [B, T], False at padding
    pixel_values    for each sample: float32 [F, 3, S, S]; a list of such arrays; None without visuals
    prompts         for each sample: what the Q-Former reads, one string per placeholder

    answer = model.generate(**inputs)

`inputs.video_metadata` says which frames of each sample's visuals were sampled, `inputs.timestamps` their seconds.

A sample with one visual and n placeholders shows the same frames n times, each time with its own prompt;
otherwise there are as many visuals as placeholders, in order, and `pixel_values` holds their list.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from llamavid_jax.config.schema import LLaMAVIDLlavaConfig
from llamavid_jax.files import find
from llamavid_jax.media.image_processor import LLaMAVIDLlavaImageProcessor, VideoMetadata
from llamavid_jax.shapes import START
from llamavid_jax.text.chat import read_chats
from llamavid_jax.text.chat_template import save_chat_template
from llamavid_jax.text.conversation import (
    IMAGE,
    ConversationError,
    check_text,
    marked,
    movie_text,
    question_per_image,
    template_named,
)
from llamavid_jax.text.qformer_tokenizer import QFormerTokenizer
from llamavid_jax.text.subtitles import TIMES, with_times
from llamavid_jax.text.tokenizer import Tokenizer, encode_with_images, load_tokenizer, pad_with_mask


class ModelInputs(dict):
    """Arguments of `model(**inputs)` and `model.generate(**inputs)`: `inputs["input_ids"]` or `inputs.input_ids`.

    `video_metadata` holds a VideoMetadata for each visual of each sample, `timestamps` the seconds of its frames.
    """

    def __init__(self, video_metadata: list[list[VideoMetadata]], **inputs: Any):
        super().__init__(inputs)
        self.video_metadata = video_metadata
        self.timestamps = [[about.timestamps for about in sample] for sample in video_metadata]

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            known = (*self, "timestamps", "video_metadata")
            raise AttributeError(f"the inputs have no {name!r}; they have {', '.join(known)}")
        return self[name]


class LLaMAVIDLlavaProcessor:
    """Image processor, language model's tokenizer and Q-Former's tokenizer of one checkpoint folder."""

    def __init__(
        self,
        image_processor: LLaMAVIDLlavaImageProcessor,
        tokenizer: Tokenizer,
        qformer_tokenizer: QFormerTokenizer,
        start_end: bool = False,
        tokens_per_frame: int = 2,
    ):
        """`start_end`: the model has tokens for the start and the end of a visual (`mm_use_im_start_end`)."""
        self.image_processor, self.start_end = image_processor, start_end
        self.tokens_per_frame = tokens_per_frame
        self.tokenizer = tokenizer
        self.qformer_tokenizer = qformer_tokenizer

    def __repr__(self) -> str:
        tokens = f"{self.tokenizer.vocab_size} tokens, {self.qformer_tokenizer.vocab_size} of the Q-Former"
        return f"LLaMAVIDLlavaProcessor({tokens}, {self.image_processor})"

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> "LLaMAVIDLlavaProcessor":
        """Reads a converted checkpoint folder.  Raises ConversationError or ConfigError, naming the file and remedy."""
        images, path = LLaMAVIDLlavaImageProcessor.from_pretrained(directory), Path(directory)
        has_config = (find(path) / "config.json").is_file()
        config = LLaMAVIDLlavaConfig.from_pretrained(find(path)) if has_config else LLaMAVIDLlavaConfig()
        tokenizer = load_tokenizer(directory, config.added_tokens)
        qformer_tokenizer = QFormerTokenizer(path / QFormerTokenizer.FOLDER)
        return cls(images, tokenizer, qformer_tokenizer, config.mm_use_im_start_end, config.tokens_per_frame)

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes preprocessor_config.json, the tokenizer's files, qformer_tokenizer/vocab.txt, chat_template.jinja."""
        save_chat_template(directory)
        for part in (self.image_processor, self.tokenizer, self.qformer_tokenizer):
            part.save_pretrained(directory)

    def __call__(
        self,
        text: str | Sequence[Any],
        images: Any = None,
        videos: Any = None,
        prompts: Any = None,
        *,
        fps: Any = None,
        num_frames: int | None = None,
        timestamps: bool | str | None = None,
        template: str = "vicuna_v1",
        return_tensors: str = "np",
        progress: Any = None,
    ) -> ModelInputs:
        """One sample; or a list of texts and a list for each other argument, None where a sample has none.

        `text` is a complete prompt with one `<image>` per visual.  For a sample with both images and videos, both lists
        are as long as its placeholders, None where the other list has the visual.  `prompts`: one string per
        placeholder, or one for all; by default the words of the `template`'s user turn around the placeholder.
        `fps`: a number; or for each sample a number, or a list as long as its images and videos.  `num_frames`: of
        each video, evenly spaced.  Without both, the image processor decides.  `timestamps` puts the time of each
        frame of a video into the text, or with "minute" of each minute, like `times` in a `Session`, for models that
        were trained this way.  `return_tensors`: "np" or "jax".
        Raises ConversationError for text and counts, MediaError for media.
        """
        if isinstance(text, str):
            text, images, videos, prompts = [text], [images], [videos], [prompts]
        if not isinstance(text, Sequence) or not text:
            raise ConversationError(f"text is {text!r}; give a string, or a list of one or more")
        if return_tensors not in ("np", "jax"):
            raise ConversationError(f"return_tensors is {return_tensors!r}; use 'np' or 'jax'")
        if timestamps not in (None, False, True, *TIMES):
            raise ConversationError(f"timestamps is {timestamps!r}; use True or one of {', '.join(TIMES)}")
        times = TIMES[0] if timestamps in (True,) else timestamps or None
        rates = fps if isinstance(fps, list | tuple) else [fps] * len(text)
        given = {"images": images, "videos": videos, "prompts": prompts, "fps": rates}
        for name, values in given.items():
            if values is None:
                given[name] = [None] * len(text)
            elif not isinstance(values, list | tuple) or len(values) != len(text):
                raise ConversationError(f"text is a list of {len(text)}; give {name} as a list of that length too")
        load = functools.partial(self.image_processor, num_frames=num_frames, progress=progress)
        samples = [self._sample(*sample, times, template, load) for sample in zip(text, *given.values(), strict=True)]
        input_ids, attention_mask = pad_with_mask([sample.pop("ids") for sample in samples], self.tokenizer.pad_id)
        columns = {name: [sample[name] for sample in samples] for name in samples[0]}
        inputs = ModelInputs(input_ids=input_ids, attention_mask=attention_mask, **columns)
        return inputs if return_tensors == "np" else _on_device(inputs)

    def chat(
        self,
        messages: Sequence[Any],
        *,
        add_generation_prompt: bool = True,
        template: str = "vicuna_v1",
        fps: float | int | None = None,
        num_frames: int | None = None,
        timestamps: bool | str | None = None,
        return_tensors: str = "np",
        progress: Any = None,
    ) -> ModelInputs:
        """The same for role/content messages (`text/chat.py`), one conversation or a list of them.

        Each user turn has its own visual tokens, also if it asks about an earlier visual, as in training and in a
        `Session`.  `add_generation_prompt` asks for the answer to the last message, which must be the user's.  `fps`
        applies to parts that name none.
        """
        chats = read_chats(messages, add_generation_prompt)
        return self(
            [chat.text(template, add_generation_prompt) for chat in chats],
            images=[chat.images for chat in chats],
            videos=[chat.videos for chat in chats],
            prompts=[chat.prompts for chat in chats],
            fps=[[fps if rate is None else rate for rate in chat.fps] for chat in chats],
            num_frames=num_frames,
            timestamps=timestamps,
            template=template,
            return_tensors=return_tensors,
            progress=progress,
        )

    def apply_chat_template(
        self,
        messages: Sequence[Any],
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        *,
        template: str = "vicuna_v1",
        **settings: Any,
    ) -> str | list[str] | np.ndarray | ModelInputs:
        """transformers' name for `chat`: the text; with `tokenize` its ids `[B, T]`; with `return_dict` all inputs.

        Text and ids alone read no media, so that media parts need no source.  `settings` are those of `chat`.
        """
        if tokenize and return_dict:
            return self.chat(messages, add_generation_prompt=add_generation_prompt, template=template, **settings)
        chats = read_chats(messages, add_generation_prompt, need_sources=False)
        texts = [chat.text(template, add_generation_prompt) for chat in chats]
        if tokenize:
            return pad_with_mask([encode_with_images(self.tokenizer, text) for text in texts], self.tokenizer.pad_id)[0]
        return texts if isinstance(messages[0], list | tuple) else texts[0]

    def decode(self, ids: Any, skip_special_tokens: bool = True) -> str:
        """The text of one row of ids, such as `model.generate(...).token_ids[0]`, without special tokens."""
        if not skip_special_tokens:
            raise ConversationError("special tokens are not decoded; leave skip_special_tokens at True")
        return self.tokenizer.decode(np.asarray(ids).astype(int).reshape(-1).tolist())

    def batch_decode(self, rows: Sequence[Any], skip_special_tokens: bool = True) -> list[str]:
        """The text of each row."""
        return [self.decode(row, skip_special_tokens) for row in rows]

    def _sample(self, text, images, videos, prompts, fps, times: str | None, template: str, load) -> dict[str, Any]:
        check_text(text)
        slots = text.count(IMAGE)
        pixels, metadata = self._media(images, videos, fps, load)
        if all(array is pixels[0] for array in pixels):
            pixels = pixels[:1]
        if len(pixels) != slots and not (len(pixels) == 1 and slots > 0):
            raise ConversationError(
                f"the text has {slots} {IMAGE} placeholders, but {len(pixels)} images and videos were given; "
                "give one placeholder for each"
            )
        if prompts is None:
            prompts = question_per_image(template_named(template), text)
        if not isinstance(prompts, str | list | tuple):
            raise ConversationError(f"prompts is {prompts!r}; give a string, or a list of one per {IMAGE}")
        prompts = [prompts] * slots if isinstance(prompts, str) else list(prompts)
        if len(prompts) != slots:
            raise ConversationError(f"the text has {slots} {IMAGE} placeholders, but {len(prompts)} prompts were given")
        for index, question in enumerate(prompts):
            check_text(question, f"prompt {index}")
        start_end = self.start_end and START not in text
        if times and any(about.duration for about in metadata):
            text = self._with_times(text, pixels, metadata, times, start_end)
        else:
            text = text.replace(IMAGE, marked(IMAGE, start_end))
        return {
            "ids": encode_with_images(self.tokenizer, text),
            "pixel_values": pixels[0] if len(pixels) == 1 else pixels or None,
            "prompts": prompts,
            "video_metadata": metadata,
        }

    def _with_times(
        self, text: str, pixels: list[np.ndarray], metadata: list[VideoMetadata], times: str, start_end: bool
    ) -> str:
        """The text with one placeholder per visual token, and the times between a video's frames."""
        found = dict(zip(dict.fromkeys(map(id, pixels)), metadata, strict=True))
        before, *rest = text.split(IMAGE)
        for place, words in enumerate(rest):
            about = found[id(pixels[place if len(pixels) > 1 else 0])]
            film, image = with_times(None, about.timestamps, times), IMAGE * self.tokens_per_frame
            shown = movie_text(film, self.tokens_per_frame, start_end) if about.duration else marked(image, start_end)
            before += shown + words
        return before

    def _media(self, images: Any, videos: Any, fps, load) -> tuple[list[np.ndarray], list[VideoMetadata]]:
        """Pixels and metadata of one sample's visuals, in the placeholders' order."""
        if images is None or videos is None:
            media = load(images=images, videos=videos, fps=fps)
            return media["pixel_values"], media["video_metadata"]
        if not isinstance(images, list | tuple) or not isinstance(videos, list | tuple) or len(images) != len(videos):
            raise ConversationError(
                "images and videos of one sample must be lists of one length, None where the other has it"
            )
        rates = fps if isinstance(fps, list | tuple) else [fps] * len(images)
        if len(rates) != len(images):
            raise ConversationError(f"fps is {fps!r}; give a number, or one for each of the {len(images)} visuals")
        pixels, metadata, read = [], [], {}
        for index, (image, video, rate) in enumerate(zip(images, videos, rates, strict=True)):
            if (image is None) == (video is None):
                which = "neither an image nor a video" if image is None else "an image and a video"
                raise ConversationError(f"visual {index} is {which}; give one of them, and None for the other")
            source = id(image if video is None else video), rate
            if source in read:  # a later turn about an earlier visual
                pixels.append(read[source])
                continue
            media = load(images=None if image is None else [image], videos=None if video is None else [video], fps=rate)
            (read[source],) = media["pixel_values"]
            pixels.append(read[source])
            metadata += media["video_metadata"]
        return pixels, metadata


def _on_device(inputs: ModelInputs) -> ModelInputs:
    """Converts NumPy arrays to JAX arrays; an array that occurs twice is converted once."""
    arrays: dict[int, Any] = {}

    def convert(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            if id(value) not in arrays:
                arrays[id(value)] = jnp.asarray(value)
            return arrays[id(value)]
        return [convert(one) for one in value] if isinstance(value, list) else value

    return ModelInputs(inputs.video_metadata, **{name: convert(value) for name, value in inputs.items()})
