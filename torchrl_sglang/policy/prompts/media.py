"""Finds images, videos and audio in the messages of a chat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import InputError
from ...generate.request import Media
from .turn_memory import Message

# What a row can name beside sampling options: one URL, file name or piece of base64, or several.
MEDIA_OPTIONS = ("images", "videos", "audios")

# How the parts of a message's content name what they hold, in the formats of Hugging Face's
# processors and of OpenAI's API.
_FIELDS = {
    "image": ("images", ("image", "url", "path", "base64")),
    "image_url": ("images", ("image_url",)),
    "video": ("videos", ("video", "url", "path", "base64")),
    "video_url": ("videos", ("video_url",)),
    "audio": ("audios", ("audio", "url", "path", "base64")),
    "audio_url": ("audios", ("audio_url",)),
    "input_audio": ("audios", ("input_audio",)),
}

__all__ = ["MEDIA_OPTIONS", "Media", "for_template", "has_parts", "media_of", "row_media"]


def media_of(messages: Sequence[Message]) -> Media | None:
    """What the messages hold beside text, in order; None where that is nothing.

    Raises:
        InputError: a part that says it holds media and does not.
    """
    found: dict[str, list[str]] = {"images": [], "videos": [], "audios": []}
    for message in messages:
        for part in _parts(message["content"]) if has_parts(message) else ():
            kind = part.get("type")
            if kind in _FIELDS:
                name, fields = _FIELDS[kind]
                found[name].append(_source(part, fields))
    if not any(found.values()):
        return None
    return Media(**{name: tuple(values) for name, values in found.items()})


def row_media(chat: Media | None, row: Mapping[str, Any]) -> Media | None:
    """What a row's options name, or else what its chat holds.

    Raises:
        InputError: both, or names that are none.
    """
    given = {name: _names(name, row[name]) for name in MEDIA_OPTIONS if name in row}
    if not any(given.values()):
        return chat
    if chat is not None:
        raise InputError(
            f"the options of a row name {', '.join(given)}, and its messages hold media too: "
            "leave one out."
        )
    return Media(**given)


def _names(option: str, value: Any) -> tuple[str, ...]:
    names = (value,) if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not all(isinstance(n, str) and n for n in names):
        raise InputError(
            f"{option}={value!r:.200}: must be a URL, a file name or base64 data, or a list of "
            "these."
        )
    return tuple(names)


def for_template(messages: Sequence[Message]) -> list[Message]:
    """The messages with media parts named as Hugging Face's templates know them.

    Many of these leave OpenAI's ``image_url`` out of the prompt in silence. SGLang's own chat route
    renames the parts alike.
    """
    return [
        {**message, "content": [_for_template(part) for part in _parts(message["content"])]}
        if has_parts(message)
        else message
        for message in messages
    ]


def has_parts(message: Message) -> bool:
    """Whether the content is a list of parts (or one part) and not a string."""
    return isinstance(message.get("content"), list | tuple | Mapping)


def _for_template(part: Mapping[str, Any]) -> Mapping[str, Any]:
    kind = part.get("type")
    if kind in _FIELDS and kind not in ("image", "video", "audio"):
        return {"type": _FIELDS[kind][0].removesuffix("s")}
    return part


def text_of(content: Any) -> str:
    """What a content says in words."""
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(str(part.get("text") or "") for part in _parts(content))


def _parts(content: Any) -> Sequence[Mapping[str, Any]]:
    if isinstance(content, Mapping):
        return [content]
    return [p if isinstance(p, Mapping) else {"type": "text", "text": str(p)} for p in content]


def _source(part: Mapping[str, Any], fields: Sequence[str]) -> str:
    for name in fields:
        value = part.get(name)
        if isinstance(value, Mapping):
            name, value = ("base64", value["data"]) if "data" in value else (name, value.get("url"))
        if isinstance(value, str) and value:
            return _as_data_url(value) if name == "base64" else value
    raise InputError(
        f"a message has a part of type {part.get('type')!r} without what it should hold: give "
        f"one of {list(fields)} as a URL, a file name or base64 data; got {dict(part)!r:.200}."
    )


def _as_data_url(data: str) -> str:
    """SGLang takes bare base64 for a file name where it is audio, and for either elsewhere."""
    if data.startswith("data:"):
        return data
    return "data:application/octet-stream;base64," + data
