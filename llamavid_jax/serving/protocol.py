"""OpenAI's chat protocol: a request's body -> Asked; answers, their pieces and errors -> its objects."""

import dataclasses
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

from llamavid_jax.errors import InputError, printable
from llamavid_jax.inference.request import Settings
from llamavid_jax.serving.batch import MOST_LIKELY
from llamavid_jax.serving.jobs import Scores
from llamavid_jax.text.conversation import check_text
from llamavid_jax.text.subtitles import TIMES, Cue, parse_subtitles
from llamavid_jax.text.tokenizer import Tokenizer

LARGEST_N = 16
# without effect on the answer; and accepted only with these values
IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
AT_REST = {
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "logit_bias": (None, {}),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "parallel_tool_calls": (None, True, False),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
}
OWN = {"model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "seed", "stop", "n"}
OWN |= {"stream", "stream_options", "logprobs", "top_logprobs", "media_io_kwargs"}
OWN |= {"fps", "subtitles", "transcribe", "times", "evidence"}  # not in OpenAI's protocol


class ApiError(Exception):
    """An error with its own HTTP status."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: Mapping[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, dict(headers or {})


@dataclasses.dataclass(frozen=True)
class Asked:
    """One request for `n` answers."""

    messages: list[Any]
    settings: Settings
    n: int
    stream: bool
    include_usage: bool
    fps: Any
    num_frames: int | None  # of each video, instead of a frame rate
    subtitles: list[Cue] | None
    transcribe: bool  # whether subtitles are made from the sound
    times: str | None  # one of TIMES: the frames whose time the text gives
    room: int  # tokens that an answer must have room for: those asked for, or one
    evidence: bool  # whether to return the frames that the answer rests on
    likely: int | None  # alternatives to each token to return; None: no log-probabilities

    def settings_of(self, choice: int) -> Settings:
        """The settings of one answer, which has its own seed."""
        return dataclasses.replace(self.settings, seed=(self.settings.seed + choice) % 2**32)


def read_asked(body: Mapping[str, Any], max_new_tokens: int) -> Asked:
    """Raises InputError for an unknown field or a wrong value; an answer has up to `max_new_tokens`."""
    for name, value in body.items():  # True is not 1 here, but 0.0 is 0
        if name in AT_REST and not any(value == rest and type(value) is type(rest) for rest in AT_REST[name]):
            if value != 0 or 0 not in AT_REST[name]:
                raise InputError(f"{name} is not done here; leave it out")
        elif name not in OWN | IGNORED | AT_REST.keys():
            raise InputError(f"{name[:100]!r} is no field of a request; use {', '.join(sorted(OWN))}")
    given = {name: value for name, value in body.items() if value is not None}
    messages = given.get("messages")
    if not isinstance(messages, list):
        raise InputError(f"messages is {str(messages)[:100]!r}; give a list of messages with 'role' and 'content'")
    for message in messages:  # newer clients' name for the system's role
        if isinstance(message, dict) and message.get("role") == "developer":
            message["role"] = "system"
    if "max_tokens" in given and given.get("max_completion_tokens", given["max_tokens"]) != given["max_tokens"]:
        raise InputError("max_tokens and max_completion_tokens differ; give one of them")
    tokens = given.get("max_tokens", given.get("max_completion_tokens", max_new_tokens))
    seed = given.get("seed", secrets.randbits(32))
    names = {name: given[name] for name in ("temperature", "top_p", "top_k", "stop") if name in given}
    settings = Settings(tokens, seed=seed % 2**32 if type(seed) is int else seed, **names)
    if settings.max_new_tokens > max_new_tokens:
        raise InputError(f"max_tokens is {tokens}; this server answers with up to {max_new_tokens}")
    if len(settings.stop) > 16 or sum(map(len, settings.stop)) > 4096:
        raise InputError("stop holds more than 16 texts, or more than 4096 characters; give fewer")
    n, stream, options = given.get("n", 1), given.get("stream", False), given.get("stream_options", {})
    if type(n) is not int or not 1 <= n <= LARGEST_N:
        raise InputError(f"n is {n!r}; give a whole number from 1 to {LARGEST_N}")
    for name in ("stream", "evidence", "logprobs", "transcribe"):
        if type(given.get(name, False)) is not bool:
            raise InputError(f"{name} is {given[name]!r}; give true or false")
    if not isinstance(options, dict) or type(options.get("include_usage", False)) is not bool:
        raise InputError(f"stream_options is {options!r}; give {{'include_usage': true}}")
    likely = given.get("top_logprobs", 0)
    if type(likely) is not int or not 0 <= likely <= MOST_LIKELY or (likely and not given.get("logprobs")):
        raise InputError(f"top_logprobs is {likely!r}; give a number up to {MOST_LIKELY}, with logprobs true")
    fps, num_frames = _sampling(given)
    return Asked(
        messages=messages,
        settings=settings,
        n=n,
        stream=stream,
        include_usage=options.get("include_usage", False),
        fps=fps,
        num_frames=num_frames,
        room=tokens if {"max_tokens", "max_completion_tokens"} & given.keys() else 1,
        evidence=given.get("evidence", False),
        likely=likely if given.get("logprobs") else None,
        **_between_frames(given),
    )


def _between_frames(given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that put text between the frames of a video: subtitles and times."""
    cues, transcribe, times = None, given.get("transcribe", False), given.get("times")
    if "subtitles" in given:
        check_text(given["subtitles"], "subtitles")
        cues = parse_subtitles(given["subtitles"])
        if not cues:
            raise InputError(
                "subtitles hold none, such as 00:01,000 --> 00:02,500; give the text of a .srt or .vtt file"
            )
    if transcribe and cues:
        raise InputError("transcribe makes subtitles from the sound; give it without subtitles")
    if times not in (None, *TIMES):
        raise InputError(f"times is {str(times)[:100]!r}; use one of {', '.join(TIMES)}, or leave it out")
    return {"subtitles": cues, "transcribe": transcribe, "times": times}


def _sampling(given: Mapping[str, Any]) -> tuple[Any, int | None]:
    """`fps`, which vLLM's clients put into `media_io_kwargs`, and `num_frames`, which exists only there."""
    media = given.get("media_io_kwargs", {})
    video = media.get("video", {}) if isinstance(media, dict) else None
    if not isinstance(video, dict) or media.keys() - {"video"} or video.keys() - {"fps", "num_frames"}:
        raise InputError(f"media_io_kwargs is {str(media)[:200]}; of it video's fps or num_frames are done here")
    fps = [one["fps"] for one in (given, video) if one.get("fps") is not None]
    count = [video["num_frames"]] if video.get("num_frames") is not None else []
    if len({*map(str, fps)}) + len(count) > 1:
        raise InputError("fps and num_frames say how a video is sampled, and two of them differ; give one")
    if count and (type(count[0]) is not int or not 1 <= count[0] <= 10**6):
        raise InputError(f"num_frames is {str(count[0])[:100]}; give a whole number from 1 on")
    return fps[0] if fps else None, count[0] if count else None


NOT_ENDED = {"finish_reason": None}


def logprobs(tokenizer: Tokenizer, ids: Sequence[int], scores: Scores, likely: int) -> dict[str, Any]:
    """Log-probabilities of an answer's tokens, and of the `likely` most probable tokens at each position."""

    def token(place: int, chosen: int, value: float) -> dict[str, Any]:
        before = ids[max(0, place - 4) : place]  # a character may take so many tokens
        text = tokenizer.decode([*before, chosen])[len(tokenizer.decode(before)) :]
        return {"token": text, "logprob": value, "bytes": None if "\ufffd" in text else list(text.encode())}

    content = []
    for place, (chosen, value, others, values) in enumerate(zip(ids, *scores, strict=True)):
        others = [token(place, *pair) for pair in zip(others[:likely], values[:likely], strict=True)]
        content.append({**token(place, chosen, value), "top_logprobs": others})
    return {"content": content, "refusal": None}


class Reply:
    """The objects of one reply: they share an id, a time and the model's name."""

    def __init__(self, model: str):
        self.common = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    def whole(self, choices: list[tuple[str, dict[str, Any]]], usage: dict[str, Any]) -> dict[str, Any]:
        """The whole reply; `choices` are texts, each with the fields of its end, such as `finish_reason`."""
        made = [
            {
                "index": index,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": None,
                **end,
            }
            for index, (text, end) in enumerate(choices)
        ]
        return {**self.common, "object": "chat.completion", "choices": made, "usage": usage}

    def chunk(self, index: int, delta: dict[str, Any], end: Mapping[str, Any] = NOT_ENDED) -> dict[str, Any]:
        """A piece of an answer; `end` holds the fields of its end, in the last piece."""
        choice = {"index": index, "delta": delta, "logprobs": None, **end}
        return {**self.common, "object": "chat.completion.chunk", "choices": [choice]}

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The last chunk, if the request asks for it."""
        return {**self.common, "object": "chat.completion.chunk", "choices": [], "usage": usage}


def usage(prompt: int, answers: int) -> dict[str, Any]:
    """Token counts."""
    return {"prompt_tokens": prompt, "completion_tokens": answers, "total_tokens": prompt + answers}


def error_object(message: str, status: int, code: str | None = None) -> dict[str, Any]:
    """The error that clients raise; a message may quote the request, even half a surrogate pair of it."""
    kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    text = printable(message)
    text = text if len(text) < 1000 else f"{text[:500]} ... {text[-400:]}"  # the remedy is at its end
    return {"error": {"message": text, "type": kind, "param": None, "code": code}}
