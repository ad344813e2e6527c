"""Finding a tokenizer and a chat template, and what they are asked to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torchrl.data.llm.history import _CHAT_TEMPLATES

from ..errors import ConfigError, TokenizerError


def load_tokenizer(tokenizer: Any, served_path: str, mode: str) -> Any:
    """The tokenizer to use.

    Args:
        tokenizer: a Hugging Face tokenizer, a folder or hub name, or None for the served model's.
        served_path: where the servers have theirs.
        mode: tokens can do without one; then None is returned where none is found.

    Raises:
        TokenizerError: none was found, or it can't render chats.
    """
    if tokenizer is None or isinstance(tokenizer, str):
        tokenizer = _load(tokenizer or served_path, optional=tokenizer is None and mode == "tokens")
    if tokenizer is None:
        return None
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise TokenizerError(
                "the tokenizer has neither a pad nor an EOS token: set tokenizer.pad_token."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _load(name: str, *, optional: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if optional:
            return None
        raise TokenizerError(
            f"no tokenizer could be loaded from {name!r} ({type(error).__name__}: {error}). Pass "
            "tokenizer= (a Hugging Face tokenizer, or the folder or hub name of one); without one "
            "only input_mode='tokens' works."
        ) from error


def choose_template(
    mode: str, tokenizer: Any, template: str | None, template_name: str | None
) -> str | None:
    """The chat template to render with: the user's, else the tokenizer's own.

    Raises:
        ConfigError: both a template and a name, or an unknown name.
        TokenizerError: history mode without any template.
    """
    if template is not None and template_name is not None:
        raise ConfigError("chat_template and chat_template_name are both given: leave one out.")
    if mode != "history":
        return None
    if template_name is not None:
        if template_name not in _CHAT_TEMPLATES:
            raise ConfigError(
                f"chat_template_name={template_name!r} is unknown; TorchRL has "
                f"{sorted(_CHAT_TEMPLATES)}."
            )
        return str(_CHAT_TEMPLATES[template_name])
    if template is None:
        template = getattr(tokenizer, "chat_template", None)
    if template is None:
        raise TokenizerError(
            "input_mode='history' renders chats, but the tokenizer has no chat template: pass "
            "chat_template= or chat_template_name= (such as 'chatml_format')."
        )
    return template


def tokenizer_options(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Options for tokenising text; padding and tensors are made in `outputs`, not here.

    Raises:
        ConfigError: an option that would change the shape of what the tokenizer returns.
    """
    kwargs = dict(given or {})
    for name in ("padding", "return_tensors", "padding_side", "return_attention_mask"):
        kwargs.pop(name, None)
    shaped: Sequence[str] = [n for n in ("return_overflowing_tokens", "text_pair") if n in kwargs]
    if shaped:
        raise ConfigError(f"tokenizer_kwargs can't have {shaped}: one prompt is one row.")
    return kwargs
