"""Messages of chats with calls of tools."""

from __future__ import annotations

from typing import Any


def says(role: str, content: Any, *calls: dict[str, Any]) -> dict[str, Any]:
    message = {"role": role, "content": content}
    return {**message, "tool_calls": [*calls]} if calls else message
