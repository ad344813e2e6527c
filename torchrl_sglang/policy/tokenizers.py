"""Finds a tokenizer and a chat template, and what they are asked to do."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment
from torchrl.data.llm.history import _CHAT_TEMPLATES

from ..errors import ConfigError, TokenizerError
from .prompts.turn_memory import SpecialTokens


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


def special_tokens(tokenizer: Any) -> SpecialTokens:
    """The special tokens of a tokenizer: those with a name, and all that its file calls special."""
    if tokenizer is None:
        return SpecialTokens()
    ids = {index for index in tokenizer.all_special_ids if index is not None}
    added = getattr(tokenizer, "added_tokens_decoder", {})
    ids |= {index for index, token in added.items() if getattr(token, "special", False)}
    texts = {tokenizer.decode([index], skip_special_tokens=False) for index in ids}
    return SpecialTokens(ids=frozenset(ids), texts=tuple(sorted(filter(None, texts))))


def choose_template(
    mode: str, tokenizer: Any, template: Any, template_name: str | None, tools: bool = False
) -> str | None:
    """The chat template to render with: the user's, else the tokenizer's own.

    Args:
        mode: text and tokens need none.
        tokenizer: may have several templates, of which ``"tool_use"`` is for chats with tools.
        template: the user's, or the name of one of the tokenizer's.
        template_name: name of one of TorchRL's.
        tools: whether tools are given.

    Raises:
        ConfigError: both a template and a name, an unknown name, or no template at all.
        TokenizerError: history mode without any template, or with several and no default.
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
    own = getattr(tokenizer, "chat_template", None)
    if template is not None:
        named = own.get(template) if isinstance(own, Mapping) and _is_name(template) else template
        if not isinstance(named, str):
            raise ConfigError(f"chat_template={template!r:.200}: must be a template in Jinja.")
        return named
    if own is None:
        raise TokenizerError(
            "input_mode='history' renders chats, but the tokenizer has no chat template: pass "
            "chat_template= or chat_template_name= (such as 'chatml_format')."
        )
    return _own_template(own, tools)


def _is_name(template: Any) -> bool:
    return isinstance(template, str) and "{" not in template


def _own_template(own: Any, tools: bool) -> str:
    """The tokenizer's template, or the one of several that Hugging Face's tokenizers choose."""
    if isinstance(own, Mapping):
        name = "tool_use" if tools and "tool_use" in own else "default"
        if name not in own:
            raise TokenizerError(
                f"the tokenizer has several chat templates and none is the default: pass "
                f"chat_template= with one of these names: {sorted(own)}."
            )
        own = own[name]
    if not isinstance(own, str):
        raise TokenizerError(
            f"the tokenizer's chat_template is a {type(own).__name__}: must be a template in "
            "Jinja, or a mapping of names to such templates."
        )
    return own


# What the tokenizer is not asked for: rows are made, and padded, elsewhere.
_SHAPES = ("padding", "return_tensors", "padding_side", "return_attention_mask", "return_dict")
# What TorchRL's own wrappers are given here too, and other arguments say.
_RENDERING = (
    "tokenize",
    "add_generation_prompt",
    "continue_final_message",
    "return_assistant_tokens_mask",
    "chat_template",
    "chat_template_name",
)


def tokenizer_options(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Options for tokenising text; padding and tensors are made in `outputs`, not here.

    Raises:
        ConfigError: an option that would change the shape of what the tokenizer returns.
    """
    kwargs = {name: value for name, value in (given or {}).items() if name not in _SHAPES}
    shaped: Sequence[str] = [n for n in ("return_overflowing_tokens", "text_pair") if n in kwargs]
    if shaped:
        raise ConfigError(f"tokenizer_kwargs can't have {shaped}: one prompt is one row.")
    return kwargs


def template_options(
    given: Mapping[str, Any] | None, template: str, generate: bool
) -> dict[str, Any]:
    """Options for rendering chats: ``tools``, ``documents``, and what the template itself reads.

    Raises:
        ConfigError: an option that nothing would read, that would cut chats, or that contradicts
            ``generate``.
    """
    kwargs = {name: value for name, value in (given or {}).items() if name not in _SHAPES}
    if kwargs.get("add_generation_prompt", generate) != generate:
        raise ConfigError(
            f"tokenizer_kwargs has add_generation_prompt={kwargs['add_generation_prompt']!r} with "
            f"generate={generate}: leave it out; continue_final_message=True continues a message."
        )
    if kwargs.pop("add_special_tokens", False):
        raise ConfigError(
            "tokenizer_kwargs has add_special_tokens=True with input_mode='history': the template "
            "writes the special tokens itself, and there would be two of them."
        )
    for name in _RENDERING:
        kwargs.pop(name, None)
    cut = [name for name in ("truncation", "max_length") if kwargs.pop(name, None)]
    if cut:
        raise ConfigError(
            f"tokenizer_kwargs can't have {' or '.join(cut)} with input_mode='history': a chat "
            "that is cut is no longer the history. Serve with a longer context_length, or leave "
            "messages out."
        )
    known = {"tools", "documents"} | _variables(template)
    for name in kwargs:
        if name not in known:
            raise ConfigError(
                f"tokenizer_kwargs has {name!r}, which the chat template does not read: it reads "
                f"{sorted(_variables(template) - _GIVEN)}."
            )
    return kwargs


_GIVEN = {"messages", "add_generation_prompt", "raise_exception", "strftime_now"}


def _variables(template: str) -> set[str]:
    """The names that a template expects to be given."""
    # As Hugging Face's own environment reads it; `generation` marks what an assistant writes.
    plain = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)
    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    try:
        return meta.find_undeclared_variables(environment.parse(plain))
    except TemplateError as error:
        raise ConfigError(f"the chat template is no Jinja that can be read: {error}") from error
