"""Rows with images, videos and audio, and a policy that takes them."""

from __future__ import annotations

from typing import Any

from tensordict import TensorDict, lazy_stack
from torchrl.data.llm import History
from torchrl.modules.llm.policies import ChatHistory, Text

from torchrl_sglang import SGLangWrapper

# As vision models write it; it knows Hugging Face's names of the parts alone.
TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'text' -%}{{- part['text'] -}}
{%- elif part['type'] in ('image', 'video', 'audio') -%}{{- '<' + part['type'] + '>' -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def said(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def policy_of(service: Any, **kwargs: Any) -> SGLangWrapper:
    if kwargs.get("input_mode", "history") == "history":
        kwargs.setdefault("chat_template", TEMPLATE)
    return SGLangWrapper(service, **{"inplace": False, **kwargs})


def chats(*rows: Any) -> TensorDict:
    """One user's message per row, of these contents."""
    history = History.from_chats([[{"role": "user", "content": content}] for content in rows])
    return TensorDict(
        history=ChatHistory(prompt=history, batch_size=len(rows)), batch_size=len(rows)
    )


def texts(*rows: str) -> TensorDict:
    return lazy_stack(
        [TensorDict(text=Text(prompt=row, batch_size=()), batch_size=()) for row in rows]
    )
