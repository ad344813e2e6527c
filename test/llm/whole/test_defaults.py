"""Outputs depend on no default of torch, which is the process's and not this library's."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict, lazy_stack
from torchrl.data.llm import History
from torchrl.modules.llm.policies import ChatHistory, Text, Tokens

import torchrl_sglang
from torchrl_sglang import AsyncSGLang, SGLangWeightSyncScheme, SGLangWrapper, conversations

FOLDER = Path(torchrl_sglang.__file__).parent

# What makes a tensor of nothing but its arguments.
FACTORIES = ("tensor", "empty", "zeros", "ones", "full", "arange", "rand", "randn", "linspace")


def factory_calls(tree: ast.AST) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
            if of_torch and node.func.attr in FACTORIES:
                yield node


def test_every_tensor_is_made_with_a_device_and_a_dtype() -> None:
    unnamed, calls = [], 0
    for path in sorted(FOLDER.rglob("*.py")):
        for call in factory_calls(ast.parse(path.read_text())):
            calls += 1
            if not {"device", "dtype"} <= {keyword.arg for keyword in call.keywords}:
                unnamed.append(f"{path.relative_to(FOLDER)}:{call.lineno}")
    assert calls > 20
    assert unnamed == []


def outputs(service: AsyncSGLang, tokenizer: Any, model: Any) -> list[Any]:
    """Whatever the library makes tensors for."""
    chats = [[{"role": "user", "content": text}] for text in ("hi", "the quick fox")]
    history = TensorDict(history=ChatHistory(prompt=History.from_chats(chats)), batch_size=2)
    text = TensorDict(text=Text(prompt=["hi", "fox"], batch_size=2), batch_size=2)
    ids = [torch.tensor(row, device="cpu") for row in ([5, 6], [7])]
    tokens = lazy_stack([TensorDict(tokens=Tokens(prompt=row)) for row in ids])
    out = []
    for mode, td in (("history", history), ("text", text), ("tokens", tokens)):
        for padded in (False, True):
            policy = SGLangWrapper(
                service,
                tokenizer=tokenizer,
                input_mode=mode,
                pad_output=padded,
                inplace=False,
                generate_kwargs={"max_new_tokens": 4, "temperature": 0.0},
                extras={"top_log_probs": 3, "input_log_probs": True, "latency": True},
            )
            sampled = policy(td)
            out += [sampled, policy.get_new_version(generate=False)(sampled)]
            out.append(policy.get_new_version(partial_rollouts=True).resume(sampled))
    reward = torch.zeros(1, dtype=torch.float32, device="cpu")
    done = torch.ones(1, dtype=torch.bool, device="cpu")
    after = TensorDict({"reward": reward, "done": done}, batch_size=[])
    steps = [row.clone().set("next", after.clone()) for row in out[0].unbind(0)]
    out.append(conversations(lazy_stack(steps)))
    scheme = SGLangWeightSyncScheme(service)
    try:
        scheme.push(model)
    finally:
        scheme.close()
    return out


def tensors_of(td: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    for row in td.reshape(-1).unbind(0):
        for key in row.keys(True, True):
            value = row.get(key)
            if isinstance(value, torch.Tensor) and "latency_s" not in key:
                yield f"{name}{key}", value


@pytest.mark.parametrize(
    ("device", "dtype"),
    [("meta", torch.float32), ("cpu", torch.float64), ("meta", torch.bfloat16)],
)
def test_other_defaults_change_nothing(
    service: AsyncSGLang,
    tokenizer: Any,
    model: Any,
    restore_weights: None,
    device: str,
    dtype: torch.dtype,
) -> None:
    usual = outputs(service, tokenizer, model)
    before = torch.get_default_dtype()
    torch.set_default_device(device)
    torch.set_default_dtype(dtype)
    try:
        others = outputs(service, tokenizer, model)
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)
    for one, other in zip(usual, others, strict=True):
        pairs = zip(tensors_of(one), tensors_of(other), strict=True)
        for (name, value), (_, found) in pairs:
            assert (found.device, found.dtype) == (value.device, value.dtype), name
            if value.dtype.is_floating_point:
                torch.testing.assert_close(found, value, atol=0.02, rtol=0, equal_nan=True)
            elif "version" not in name:
                assert torch.equal(found, value), name
