"""Chat messages as chat APIs write them -> turns of a conversation, their visuals and the Q-Former's prompts.

    [{"role": "system", "content": "Answer briefly."},
     {"role": "user", "content": [{"type": "video", "path": "walk.mp4"}, {"type": "text", "text": "Who walks?"}]},
     {"role": "assistant", "content": "A man."}, {"role": "user", "content": "Alone?"}]

A turn's placeholders come first, each on its own line, as in training, and its prompt is its text, with newlines kept.
As in training, every later user turn has visual tokens of its own: a turn that shows nothing new repeats the
placeholders of everything shown before.  The part of a video may set the sampling rate: "fps": 0.5.

    USER: <image>\\nWho walks? ASSISTANT: A man.</s>USER: <image>\\nAlone? ASSISTANT:    prompts: "Who walks?", "Alone?"
"""

import dataclasses
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

from llamavid_jax.text.conversation import IMAGE, ConversationError, check_text, prompt, question_turn, template_named

SOURCES = ("path", "url")  # besides the key named like the part's type
# keys of other tools that choose frames, or of a training record, are errors; others are ignored, as clients add some
UNREAD = ("num_frames", "nframes", "min_frames", "max_frames", "video_start", "video_end", "subtitles", "times")


@dataclasses.dataclass(frozen=True)
class Chat:
    """`turns` alternate user, assistant; `images`, `videos`, `prompts` and `fps` have an item for each placeholder.

    One of `images[i]` and `videos[i]` is None; `fps[i]` is None if the part has none.  `system` is None for the
    template's own text.
    """

    system: str | None
    turns: list[str]
    images: list[Any]
    videos: list[Any]
    prompts: list[str]
    fps: list[Any]

    def text(self, template: str, open_answer: bool = True) -> str:
        """The conversation in the format `template`; after a user's last turn, `open_answer` opens the answer."""
        form = template_named(template)
        form = form if self.system is None else dataclasses.replace(form, system=self.system)
        return prompt(form, self.turns, open_answer)


def read_chats(messages: Any, add_generation_prompt: bool, need_sources: bool = True) -> list[Chat]:
    """Reads one conversation or a list of them."""
    if not isinstance(messages, list | tuple) or not messages:
        raise ConversationError(f"messages is {messages!r}; give a list of messages with 'role' and 'content'")
    conversations = messages if isinstance(messages[0], list | tuple) else [messages]
    chats = [read_messages(conversation, need_sources) for conversation in conversations]
    for number, chat in enumerate(chats):
        if add_generation_prompt and len(chat.turns) % 2 == 0:
            raise ConversationError(
                f"conversation {number} ends with the assistant's message; end it with the user's, or set "
                "add_generation_prompt=False"
            )
    return chats


def read_messages(messages: Sequence[Any], need_sources: bool = True) -> Chat:
    """Raises ConversationError that names the message, for wrong roles, contents and parts.

    Without `need_sources` a part may have no source, as when only the text is needed: its image and video are then
    None.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise ConversationError(f"messages is {messages!r}; give a list of messages with 'role' and 'content'")
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise ConversationError(f"message {number} is {message!r}; it needs the keys 'role' and 'content'")
    system = None
    first = 0
    if messages[0]["role"] == "system":
        system, images, *_ = _read_content(messages[0]["content"], 0, need_sources)
        if images:
            raise ConversationError("message 0 shows the system an image or video; put it in a user's message")
        first = 1
    chat, shown = Chat(system, [], [], [], [], []), ([], [], [])
    for number, message in enumerate(messages[first:], first):
        expected = ("user", "assistant")[len(chat.turns) % 2]
        if message["role"] != expected:
            raise ConversationError(
                f"message {number} has the role {message['role']!r}, but {expected!r} is next; "
                "messages go system (optional), user, assistant, user, ..."
            )
        words, images, videos, fps = _read_content(message["content"], number, need_sources)
        if images and expected == "assistant":
            raise ConversationError(
                f"message {number} is the assistant's and has an image or video; only users show them"
            )
        if not words and not images:
            raise ConversationError(f"message {number} is empty; give it text, or leave it out")
        if images:
            shown = shown[0] + images, shown[1] + videos, shown[2] + fps
        elif expected == "user":
            images, videos, fps = shown
        chat.turns.append(question_turn(len(images), words))
        chat.images.extend(images)
        chat.videos.extend(videos)
        chat.fps.extend(fps)
        chat.prompts.extend([words] * len(images))
    if not chat.turns:
        raise ConversationError("messages hold no user's message; give at least one")
    return chat


def _read_content(content: Any, number: int, need_sources: bool) -> tuple[str, list[Any], list[Any], list[Any]]:
    """A message's content -> its text, and images, videos and fps, each list as long as there are visuals."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list | tuple):
        raise ConversationError(f"the content of message {number} is {content!r}; give a string or a list of parts")
    words, images, videos, fps = [], [], [], []
    for index, part in enumerate(parts):
        name = f"part {index} of message {number}"
        if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
            raise ConversationError(f"{name} is {part!r}; it needs a 'type' of 'text', 'image' or 'video'")
        if unread := [key for key in UNREAD if part.get(key) is not None]:
            raise ConversationError(f"{name} has {unread[0]!r}, which is not read here; a video's part may say 'fps'")
        match part["type"].removesuffix("_url"):
            case "text":
                text = part.get("text")
                check_text(text, name)
                if IMAGE in text:
                    raise ConversationError(f"{name} has {IMAGE} in its text; give the visual as a part of its own")
                words.append(text)
            case "image":
                images.append(_source(part, name, need_sources))
                videos.append(None)
                fps.append(None)
            case "video":
                images.append(None)
                videos.append(_source(part, name, need_sources))
                fps.append(part.get("fps"))
            case other:
                raise ConversationError(f"{name} has the type {other!r}; use 'text', 'image' or 'video'")
    return "\n".join(words), images, videos, fps


def _source(part: Mapping[str, Any], name: str, needed: bool) -> Any:
    """Path, URL or pixels: {"type": "image", "path": ...}, {"type": "image_url", "image_url": {"url": ...}}, ..."""
    kind = part["type"].removesuffix("_url")
    found = [part[key] for key in (kind, f"{kind}_url", *SOURCES) if part.get(key) is not None]
    if not found and not needed:
        return None
    if len(found) != 1:
        raise ConversationError(f"{name} names {len(found)} sources; give one of {part['type']!r}, 'path' and 'url'")
    source = found[0].get("url") if isinstance(found[0], Mapping) else found[0]
    if source is None:
        raise ConversationError(f"{name} has no 'url' in its {part['type']!r}; add it")
    if isinstance(source, list | tuple) and all(isinstance(frame, str) for frame in source):
        return [_local(frame) for frame in source]
    return _local(source)


def _local(source: Any) -> Any:
    """The path of a `file://` URL; anything else unchanged."""
    if not isinstance(source, str) or not source.startswith("file://"):
        return source
    return urllib.request.url2pathname(urllib.parse.urlsplit(source).path)
