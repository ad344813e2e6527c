"""Makes the rows that completions become, and remembers them as turns."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

from tensordict import LazyStackedTensorDict

from ...generate.completion import Completion
from ...generate.sampling import SamplingParams
from ..arguments import Settled, text_options
from ..prompts.read import Prompts
from ..prompts.turn_memory import Turn, chat_key
from .extras import build_info
from .tensors import Arrived, build_outputs, make_rows, stacked
from .texts import as_messages, contents


class RowWriter:
    """What one call writes.

    Args:
        settled: the policy's arguments.
        sampling: how the call samples.
    """

    def __init__(self, settled: Settled, sampling: SamplingParams) -> None:
        self._settled = settled
        self._text = text_options(sampling)

    @functools.cached_property
    def _arrived(self) -> Arrived:
        settled = self._settled
        needs_text = settled.outputs.text_key is not None or settled.mode == "history"
        return Arrived(settled.tokenizer if needs_text else None)

    def arrive(self, completions: Sequence[Completion]) -> None:
        """Does what can be done as soon as one request is finished."""
        for completion in completions:
            self._arrived.take(completion)

    def rows(self, prompts: Prompts, completions: Sequence[Completion]) -> LazyStackedTensorDict:
        """One row per completion, whose prompts are given once for each."""
        settled = self._settled
        spec = replace(settled.outputs, text=self._text)
        rows = make_rows(prompts, completions, self._arrived, spec)
        decoded = self._arrived.texts(completions)
        columns = build_outputs(rows, prompts, completions, decoded, spec)
        if settled.info.key is not None:
            columns[settled.info.key] = build_info(rows, completions, settled.info)
        if decoded is not None and prompts.texts is not None:
            given_out = None if spec.text_key is None else columns[spec.text_key]
            self._keep_turns(prompts, completions, decoded, given_out)
        return stacked(columns, len(completions))

    def _keep_turns(
        self,
        prompts: Prompts,
        completions: Sequence[Completion],
        decoded: list[str],
        given_out: Sequence[Any] | None,
    ) -> None:
        """Remembers the tokens of this turn, for prompts that go on from it.

        These go on from the messages, or else from the texts that were given out.
        """
        prompted, outputs = self._settled.prompts, self._settled.outputs
        if prompts.chats is not None:
            decoded = as_messages(decoded, prompts.begun, outputs.tokenizer)
            answers = contents(completions, decoded, outputs.tokenizer, outputs.special)
        elif given_out is not None:
            answers = [text.response for text in given_out]
        else:
            return
        assert prompts.texts is not None
        for row, (completion, said, answer) in enumerate(
            zip(completions, decoded, answers, strict=True)
        ):
            if not completion.output_ids:
                continue
            text = prompts.texts[row] + answer
            turn = Turn(
                ids=[*prompts.ids[row], *completion.output_ids],
                text=text,
                cut=said[len(answer) :] if said.startswith(answer) else self._ending(completion),
                answered=bool(answer),
                chat=text if prompts.chats is None else self._chat(prompts, row, answer),
            )
            prompted.memory.keep(turn)

    def _ending(self, completion: Completion) -> str:
        """The special token that ended a text which was given out without any."""
        last, outputs = completion.output_ids[-1:], self._settled.outputs
        ended = outputs.special.ids.issuperset(last)
        return str(outputs.tokenizer.decode(last, skip_special_tokens=False)) if ended else ""

    @staticmethod
    def _chat(prompts: Prompts, row: int, answer: str) -> Hashable:
        """What identifies the chat that a turn ended."""
        assert prompts.chats is not None
        messages = list(prompts.chats[row])
        begun = prompts.begun[row] if prompts.begun is not None else None
        if begun is not None:
            messages.pop()
        content = (begun or "") + answer
        return chat_key([*messages, {"role": "assistant", "content": content}])
