"""A chat, the times of its frames and what is said between them -> the ids of its prompt, as a Session lays it out."""

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
    """The ids, and the first placeholder of the chat that is shown.

    `frame_times` `[F]` are those of each placeholder.  Of the one film that all of them show, `said` stands between its
    frames (a text has their placeholders), and the time of each, where `times` is "frame" or "minute".  Where the
    prompt and `new_tokens` are more than the positions that the model was trained for, earlier turns keep their words
    alone.
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
