"""Which tokens of a chat its assistant wrote: all of them and no others, whatever the template."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torchrl.data.llm import History
from torchrl.modules.llm.policies import ChatHistory
from transformers import AutoTokenizer

from helpers.servers import hf_log_probs
from helpers.spans import GO, HI, TEMPLATES, chatml, says
from torchrl_sglang import AsyncSGLang, SGLangWrapper
from torchrl_sglang.errors import InputError, TokenizerError


def scored(service: AsyncSGLang, tokenizer: Any, template: str, *chats: Any) -> Any:
    policy = SGLangWrapper(
        service, tokenizer=tokenizer, generate=False, inplace=False, chat_template=template
    )
    history = History.from_chats(list(chats))
    return policy(
        TensorDict(history=ChatHistory(full=history, batch_size=len(chats)), batch_size=len(chats))
    )


def test_masks_of_scored_chats(service: AsyncSGLang, tokenizer: Any, model: Any) -> None:
    """Several rows and templates: what is marked says what the assistant said."""
    for template in ("plain", "trims", "thinks"):
        chats = [[HI, says(" 42")], [says("hello"), GO, says("42\n")]]
        out = scored(service, tokenizer, TEMPLATES[template], *chats)
        for row, chat in zip(out.unbind(0), chats, strict=True):
            ids, mask = row["tokens"].full, row["masks"].all_assistant_mask
            marked = tokenizer.decode(ids[mask])
            said = [m["content"].strip() for m in chat if m["role"] == "assistant"]
            assert marked.replace(" ", "").replace("\n", "") == "".join(
                text + "<|im_end|>" for text in said
            )
            expected = torch.tensor(hf_log_probs(model, ids[:1].tolist(), ids[1:].tolist()))
            torch.testing.assert_close(row["log_probs"].full[1:], expected, atol=0.02, rtol=0)


def test_a_row_that_has_no_span_is_named(service: AsyncSGLang, tokenizer: Any) -> None:
    silent = chatml("(m['content'] if m['role'] == 'user' else '')")
    with pytest.raises(InputError, match="nothing of message 1") as caught:
        scored(service, tokenizer, silent, [HI], [HI, says("42")])
    assert "row 1" in str(caught.value.__notes__)
    generation = chatml("m['content']") + "{% generation %}{% endgeneration %}"
    with pytest.raises(InputError, match="marks nothing"):
        scored(service, tokenizer, generation, [HI, says("42")])


def test_slow_tokenizers_can_not_mark(service: AsyncSGLang, model_path: Any) -> None:
    """Found when the policy is made; they generate all the same."""
    slow = AutoTokenizer.from_pretrained(model_path)
    kind = type("Slow", (type(slow),), {"is_fast": property(lambda self: False)})
    slow.__class__ = kind
    with pytest.raises(TokenizerError, match="fast"):
        SGLangWrapper(service, tokenizer=slow, generate=False)
    out = SGLangWrapper(service, tokenizer=slow, generate_kwargs={"max_new_tokens": 2})(
        TensorDict(
            history=ChatHistory(prompt=History.from_chats([[HI]]), batch_size=1), batch_size=1
        )
    )
    assert len(out[0]["tokens"].response) == 2 or out[0]["tokens"].response[-1] == 2
