"""Images, videos and audio in the messages of a chat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import InputError
from ..protocol import Media
from .turns import Message

# How the parts of a message's content name what they hold, in the formats of Hugging Face's
# processors and of OpenAI's API.
_FIELDS = {
    "image": ("images", ("image", "url", "path", "base64")),
    "image_url": ("images", ("image_url",)),
    "video": ("videos", ("video", "url", "path", "base64")),
    "video_url": ("videos", ("video_url",)),
    "audio": ("audios", ("audio", "url", "path", "base64")),
    "audio_url": ("audios", ("audio_url",)),
}

__all__ = ["Media", "media_of"]


def media_of(messages: Sequence[Message]) -> Media | None:
    """What the messages hold beside text, in order; None where that is nothing.

    Raises:
        InputError: a part that says it holds media and does not.
    """
    found: dict[str, list[str]] = {"images": [], "videos": [], "audios": []}
    for message in messages:
        content = message["content"]
        if isinstance(content, str):
            continue
        for part in _parts(content):
            kind = part.get("type")
            if kind in _FIELDS:
                name, fields = _FIELDS[kind]
                found[name].append(_source(part, fields))
    if not any(found.values()):
        return None
    return Media(**{name: tuple(values) for name, values in found.items()})


def _parts(content: Any) -> Sequence[Mapping[str, Any]]:
    if isinstance(content, Mapping):
        return [content]
    return [part for part in content or () if isinstance(part, Mapping)]


def _source(part: Mapping[str, Any], fields: Sequence[str]) -> str:
    for name in fields:
        value = part.get(name)
        if isinstance(value, Mapping):
            value = value.get("url")
        if isinstance(value, str) and value:
            return value
    raise InputError(
        f"a message has a part of type {part.get('type')!r} without what it should hold: give "
        f"one of {list(fields)} as a URL, a file name or base64 data; got {dict(part)!r:.200}."
    )
