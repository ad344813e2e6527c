"""Templates of chats that mark what their assistant wrote."""

from __future__ import annotations

from typing import Any

OPEN = "'<|im_start|>' + m['role'] + '\\n'"

ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def chatml(content: str, before: str = "") -> str:
    return (
        before
        + "{% for m in messages %}{{ "
        + OPEN
        + " + "
        + content
        + " + '<|im_end|>\\n' }}{% endfor %}"
        + ASK
    )


# As Qwen3 does: an empty thought before the last answer, none before earlier ones.
THINKS = (
    "{% for m in messages %}{% set c = m['content'] %}{{ " + OPEN + " }}"
    "{% if m['role'] == 'assistant' %}"
    "{% set t = c.split('</think>')[0].split('<think>')[-1].strip() if '</think>' in c else '' %}"
    "{% set c = c.split('</think>')[-1].lstrip() %}"
    "{% if loop.last %}{{ '<think>\\n' + t + '\\n</think>\\n\\n' }}{% endif %}"
    "{% endif %}{{ c + '<|im_end|>\\n' }}{% endfor %}" + ASK
)

# Calls of tools are written after the words, as JSON.
TOOLS = (
    "{% for m in messages %}{{ " + OPEN + " }}{% if m.content %}{{ m.content }}{% endif %}"
    "{% for call in m.tool_calls or [] %}{{ '<tool_call>' + call | tojson + '</tool_call>' }}"
    "{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}" + ASK
)

PLAIN = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}" + (
    "{% if add_generation_prompt %}assistant: {% endif %}"
)

TEMPLATES = {
    "plain": chatml("m['content']"),
    "trims": chatml("m['content'] | trim"),
    "upper": chatml("m['content'] | upper"),
    "counts": chatml("m['content']", "{{ messages | length ~ ' messages\\n' }}"),
    "thinks": THINKS,
    "calls": TOOLS,
    "nothing special": PLAIN,
    "alternates": chatml(
        "m['content']",
        "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}",
    ),
}

SYSTEM, HI, GO = (
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "hi"},
    {"role": "user", "content": "42"},  # what the assistant says too
)


def says(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}
