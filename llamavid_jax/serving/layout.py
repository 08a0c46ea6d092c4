"""A chat, its frames' times and the speech between them -> the ids of its prompt, laid out as a Session does."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from llamavid_jax.config.schema import LLaMAVIDLlavaConfig
from llamavid_jax.shapes import IMAGE_TOKEN
from llamavid_jax.text.chat import Chat
from llamavid_jax.text.conversation import IMAGE, long_video_text, marked
from llamavid_jax.text.subtitles import Cue, interleave, with_times
from llamavid_jax.text.tokenizer import Tokenizer, encode_with_images


def lay_out(
    config: LLaMAVIDLlavaConfig,
    tokenizer: Tokenizer,
    chat: Chat,
    frame_times: Sequence[np.ndarray],
    said: Sequence[Cue] | str | None,
    times: str | None,
    new_tokens: int,
) -> tuple[np.ndarray, int]:
    """The ids, and the index of the chat's first placeholder that they contain.

    `frame_times` has the times `[F]` of each placeholder's frames.  `said` is for the one video that all placeholders
    show: subtitles, or a text that already contains the frames' placeholders.  `times` "frame" or "minute" adds the
    frames' times.  If the prompt and `new_tokens` exceed the positions that the model was trained for, earlier turns
    keep only their words.
    """

    def ids_of(turns: list[str]) -> list[int]:
        return encode_with_images(tokenizer, dataclasses.replace(chat, turns=turns).text("vicuna_v1"))

    start_end, width, text = config.mm_use_im_start_end, config.tokens_per_frame, config.text_config
    words = [turn.replace(IMAGE + "\n", "").replace(IMAGE, "") for turn in chat.turns]
    film = said if said is None or isinstance(said, str) else interleave(frame_times[0].tolist(), said)
    if times is not None:
        film = with_times(film, frame_times[0].tolist(), times)
    if film is None:
        turns = [turn.replace(IMAGE, marked(IMAGE, start_end)) for turn in chat.turns]
    else:
        turns = [
            long_video_text(film, own, width, start_end) if IMAGE in turn else own
            for turn, own in zip(chat.turns, words, strict=True)
        ]
    ids = ids_of(turns)
    length = len(ids) - ids.count(IMAGE_TOKEN) + width * sum(map(len, frame_times))
    if length <= min(text.max_length - new_tokens, text.max_position_embeddings):
        return np.array(ids), 0
    return np.array(ids_of([*words[:-1], turns[-1]])), len(frame_times) - chat.turns[-1].count(IMAGE)
