"""The conversation format as a jinja template, which serving tools read from a checkpoint's folder.

It renders the same text as `Chat.text`: a turn's placeholders come before its words, and a later user turn that shows
nothing new repeats the placeholders of everything shown before.
"""

import json
import re
from pathlib import Path

from llamavid_jax.files import write_files
from llamavid_jax.text.conversation import IMAGE, template_named

FILE = "chat_template.jinja"
FORM = """\
{%- set chat = namespace(system=SYSTEM, shown=0) -%}
{%- if messages and messages[0].role == 'system' -%}
  {%- set chat.system = messages[0].content if messages[0].content is string
      else messages[0].content | map(attribute='text') | join('\\n') -%}
{%- endif -%}
{{- chat.system + ' ' -}}
{%- for message in messages if message.role != 'system' -%}
  {%- set turn = namespace(visuals=0, lines=[]) -%}
  {%- set parts = [{'type': 'text', 'text': message.content}] if message.content is string else message.content -%}
  {%- for part in parts -%}
    {%- if part.type == 'text' -%}
      {%- set turn.lines = turn.lines + [part.text] -%}
    {%- else -%}
      {%- set turn.visuals = turn.visuals + 1 -%}
    {%- endif -%}
  {%- endfor -%}
  {%- set words = turn.lines | join('\\n') -%}
  {%- if message.role == 'user' -%}
    {%- set chat.shown = chat.shown + turn.visuals -%}
    {%- set places = ([IMAGE] * (turn.visuals or chat.shown)) | join('\\n') -%}
    {{- USER + places + ('\\n' if places and words else '') + words + USER_END -}}
  {%- else -%}
    {{- ASSISTANT + words + ASSISTANT_END -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- ANSWER -}}{%- endif -%}
"""


def chat_template() -> str:
    """The template of `vicuna_v1`."""
    form = template_named("vicuna_v1")
    values = {
        "SYSTEM": form.system,
        "IMAGE": IMAGE,
        "USER_END": form.user.closing,
        "ASSISTANT_END": form.assistant.closing,
        "USER": form.user.opening,
        "ASSISTANT": form.assistant.opening,
        "ANSWER": form.assistant.empty,
    }
    return re.sub(r"\b[A-Z_]+\b", lambda name: json.dumps(values[name[0]]), FORM)


def save_chat_template(directory: str | Path) -> None:
    """Writes `chat_template.jinja`."""
    write_files(directory, {FILE: chat_template().encode()})
