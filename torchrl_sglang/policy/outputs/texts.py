"""Decodes sampled ids to text, and to the assistant's turn of a history."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tensordict import NonTensorData, TensorDict, lazy_stack
from torchrl.data.llm import History
from torchrl.modules.llm.policies import ChatHistory, Text

from ...generate.completion import Completion
from ..prompts.turn_memory import SpecialTokens


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """How sampled ids become text.

    Attributes:
        skip_special_tokens: leave special tokens out of the response.
        spaces_between_special_tokens: as in Hugging Face's tokenizers; None: their default.
        keep_stop: keep the EOS or stop at the end of the response.
    """

    skip_special_tokens: bool = False
    spaces_between_special_tokens: bool | None = None
    keep_stop: bool = True


def decode(ids: list[list[int]], tokenizer: Any) -> list[str]:
    """Ids as text, special tokens included."""
    if tokenizer.is_fast and not tokenizer.clean_up_tokenization_spaces:
        # What batch_decode ends in; on its way there it looks at every id in Python.
        texts: list[str] = tokenizer.backend_tokenizer.decode_batch(ids, skip_special_tokens=False)
    else:
        texts = tokenizer.batch_decode(ids, skip_special_tokens=False)
    return texts


def decode_answers(ids: list[list[int]], tokenizer: Any, **kwargs: Any) -> list[str]:
    """Ids that follow a prompt as text; see `decode`.

    Tokenizers of SentencePiece's kind leave out the space before what begins a text. An answer
    begins none, so it is decoded behind something, as SGLang does it too.

    Args:
        ids: one list per row.
        tokenizer: decodes them.
        kwargs: of its ``batch_decode``.
    """
    anchor = _anchor(tokenizer)
    rows = ids if anchor is None else [[anchor], *([anchor, *row] for row in ids)]
    texts = tokenizer.batch_decode(rows, **kwargs) if kwargs else decode(rows, tokenizer)
    return texts if anchor is None else [text[len(texts[0]) :] for text in texts[1:]]


@functools.lru_cache(maxsize=8)
def _anchor(tokenizer: Any) -> int | None:
    """A plain token, where what is decoded behind it differs from what is decoded alone."""
    ids = tokenizer("x x", add_special_tokens=False)["input_ids"]
    starts = [ids[start:] for start in range(len(ids))]
    for first in dict.fromkeys(ids):
        if first in tokenizer.all_special_ids:
            continue
        alone = tokenizer.decode([first])
        if any(tokenizer.decode([first, *r]) != alone + tokenizer.decode(r) for r in starts):
            return int(first)
    return None


def as_messages(
    decoded: list[str], begun: Sequence[str | None] | None, tokenizer: Any
) -> list[str]:
    """Answers as messages say them: without the space that their tokenizer writes first.

    Args:
        decoded: from `decode_answers`.
        begun: what the message says already that a row goes on with, or None.
        tokenizer: decoded them.
    """
    if _anchor(tokenizer) is None:
        return decoded
    return [
        text if before and before.strip() else text.removeprefix(" ")
        for text, before in zip(decoded, begun or [None] * len(decoded), strict=True)
    ]


def build_texts(
    prompts: Sequence[str],
    completions: Sequence[Completion],
    decoded: list[str],
    *,
    tokenizer: Any,
    special: SpecialTokens,
    options: TextOptions,
) -> list[Text]:
    """One `Text` per completion."""
    styled = _styled(completions, decoded, tokenizer, special, options)
    return [
        Text._from_tensordict(
            TensorDict(
                {
                    "prompt": non_tensor(prompt),
                    "response": non_tensor(response),
                    "full": non_tensor(prompt + response),
                },
                batch_size=[],
            )
        )
        for prompt, response in zip(prompts, styled, strict=True)
    ]


def non_tensor(value: Any) -> NonTensorData:
    """A value of one row that is no tensor."""
    return NonTensorData(value, batch_size=[])


def build_histories(
    prompts: History, begun: Sequence[str | None], contents: Sequence[str], ended: Sequence[bool]
) -> list[ChatHistory]:
    """One `ChatHistory` per completion.

    Args:
        prompts: ``[batch, turns]``.
        begun: what the last message of a prompt says where it is continued; then the response is
            that message as a whole.
        contents: what was sampled, as text without what ended it.
        ended: whether it ended by itself.
    """
    histories = []
    for prompt, before, content, complete in zip(
        prompts.unbind(0), begun, contents, ended, strict=True
    ):
        turn = History._from_tensordict(
            TensorDict(
                {
                    "role": non_tensor("assistant"),
                    "content": non_tensor((before or "") + content),
                    "is_complete": non_tensor(complete),
                },
                batch_size=[],
                device=prompt.device,  # the turns of one history are all on one
            )
        )
        kept = prompt.unbind(0) if before is None else prompt.unbind(0)[:-1]
        histories.append(
            ChatHistory._from_tensordict(
                TensorDict(
                    {
                        "prompt": prompt,
                        "response": lazy_stack([turn]),
                        "full": lazy_stack([*kept, turn]),
                    },
                    batch_size=[],
                )
            )
        )
    return histories


def _styled(
    completions: Sequence[Completion],
    decoded: list[str],
    tokenizer: Any,
    special: SpecialTokens,
    options: TextOptions,
) -> list[str]:
    """The responses as the sampling options want them to be written."""
    responses, kwargs = decoded, {}
    if options.skip_special_tokens:
        kwargs["skip_special_tokens"] = True
    if options.spaces_between_special_tokens is not None:
        kwargs["spaces_between_special_tokens"] = options.spaces_between_special_tokens
    if kwargs:
        ids = [
            c.output_ids[:-1] if not options.keep_stop and _ended_by_id(c) else c.output_ids
            for c in completions
        ]
        responses = decode_answers(ids, tokenizer, **kwargs)
    if options.keep_stop:
        return responses
    if kwargs:
        return [_before_stop(r, c, special) for r, c in zip(responses, completions, strict=True)]
    return contents(completions, decoded, tokenizer, special)


def contents(
    completions: Sequence[Completion],
    decoded: Sequence[str],
    tokenizer: Any,
    special: SpecialTokens,
) -> list[str]:
    """The responses without the EOS, stop token or stop string that ended them."""
    return [
        _content(text, completion, tokenizer, special)
        for text, completion in zip(decoded, completions, strict=True)
    ]


def _content(text: str, completion: Completion, tokenizer: Any, special: SpecialTokens) -> str:
    """A response without what ended it.

    An EOS at the last place that was allowed is one too, of which SGLang 0.5.15 says "length"; and
    so is a special token that a stop string lies in.
    """
    last = completion.output_ids[-1:]
    ended_by_special = completion.finish_type == "stop" and special.ids.issuperset(last)
    if last and (_ended_by_id(completion) or ended_by_special or last == [tokenizer.eos_token_id]):
        behind = decode_answers([last], tokenizer)[0]
        if behind and text.endswith(behind):
            return text[: -len(behind)]
        return text.removesuffix(tokenizer.decode(last, skip_special_tokens=False))
    return _before_stop(text, completion, special)


def _ended_by_id(completion: Completion) -> bool:
    stop = completion.matched_stop
    return isinstance(stop, int) and completion.output_ids[-1:] == [stop]


def _before_stop(text: str, completion: Completion, special: SpecialTokens) -> str:
    """A response up to the stop string that ended it, where SGLang cuts its own text too.

    That is where the stop stands first: the last token may hold it more than once. SGLang looks for
    it in the text without special tokens; one that names a special token is in the whole text only.
    """
    stop = completion.matched_stop
    if not isinstance(stop, str) or not stop:
        return text
    plain, moved = special.left_out(text)
    at = plain.find(stop)
    if at >= 0:
        return text[: moved(at)]
    at = text.find(stop)
    whole = at >= 0 and not special.divided(text, at) and not special.divided(text, at + len(stop))
    return text[:at] if whole else text
