"""Sampled ids as text, and as the assistant's turn of a history."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tensordict import NonTensorData, TensorDict, lazy_stack
from torchrl.data.llm import History
from torchrl.modules.llm.policies import ChatHistory, Text

from ..completions import Completion


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


def build_texts(
    prompts: Sequence[str],
    completions: Sequence[Completion],
    decoded: list[str],
    *,
    tokenizer: Any,
    options: TextOptions,
) -> list[Text]:
    """One `Text` per completion."""
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
        for prompt, response in zip(
            prompts, _styled(completions, decoded, tokenizer, options), strict=True
        )
    ]


def non_tensor(value: Any) -> NonTensorData:
    """A value of one row that is no tensor."""
    return NonTensorData(value, batch_size=[])


def build_histories(
    prompts: History, completions: Sequence[Completion], decoded: list[str], tokenizer: Any
) -> list[ChatHistory]:
    """One `ChatHistory` per completion; ``prompts`` is ``[batch, turns]``."""
    role = non_tensor("assistant")
    complete = {True: non_tensor(True), False: non_tensor(False)}
    histories = []
    for prompt, text, completion in zip(prompts.unbind(0), decoded, completions, strict=True):
        turn = History._from_tensordict(
            TensorDict(
                {
                    "role": role,
                    "content": non_tensor(content(text, completion, tokenizer)),
                    "is_complete": complete[completion.finish_type == "stop"],
                },
                batch_size=[],
                device=prompt.device,  # the turns of one history are all on one
            )
        )
        full = lazy_stack([*prompt.unbind(0), turn])
        histories.append(
            ChatHistory._from_tensordict(
                TensorDict(
                    {"prompt": prompt, "response": lazy_stack([turn]), "full": full},
                    batch_size=[],
                )
            )
        )
    return histories


def _styled(
    completions: Sequence[Completion], decoded: list[str], tokenizer: Any, options: TextOptions
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
        responses = tokenizer.batch_decode(ids, **kwargs)
        trimmed = list(map(_before_stop, responses, completions))
    else:
        trimmed = [content(t, c, tokenizer) for t, c in zip(decoded, completions, strict=True)]
    return responses if options.keep_stop else trimmed


def content(text: str, completion: Completion, tokenizer: Any) -> str:
    """A response without the EOS, stop token or stop string that ended it.

    An EOS at the last place that was allowed is one too, of which SGLang 0.5.15 says "length".
    """
    last = completion.output_ids[-1:]
    if _ended_by_id(completion) or last == [tokenizer.eos_token_id]:
        return text.removesuffix(tokenizer.decode(last, skip_special_tokens=False))
    return _before_stop(text, completion)


def _ended_by_id(completion: Completion) -> bool:
    stop = completion.matched_stop
    return isinstance(stop, int) and completion.output_ids[-1:] == [stop]


def _before_stop(text: str, completion: Completion) -> str:
    stop = completion.matched_stop
    return text[: text.rfind(stop)] if isinstance(stop, str) and stop in text else text
