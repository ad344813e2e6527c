"""A CPU server pins no memory."""

from __future__ import annotations

from helpers.standins import run
from torchrl_sglang.launch.commands import CPU_SERVE


def told(accelerator: bool) -> str:
    """Code that tells torch whether there is an accelerator."""
    return f"""
import torch
torch.accelerator.is_available = lambda: {accelerator}
def functions():
    return torch.zeros, torch.tensor, torch.empty, torch.Tensor.pin_memory
original = functions()
"""


def test_without_an_accelerator_nothing_is_pinned() -> None:
    code = """
made = [
    torch.zeros(2, dtype=torch.int32, pin_memory=True),
    torch.tensor([0, 0], dtype=torch.int32, pin_memory=True, device="cpu"),
    torch.empty((2,), dtype=torch.int32, pin_memory=True).zero_(),
    torch.zeros(2, dtype=torch.int32).pin_memory(),
]
print([(t.dtype, t.tolist()) for t in made] == [(torch.int32, [0, 0])] * 4)
"""
    assert run(code, before=told(accelerator=False), site_packages=True) == "True"


def test_with_an_accelerator_torch_is_left_alone() -> None:
    code = "print(functions() == original)"
    assert run(code, before=told(accelerator=True), site_packages=True) == "True"
    assert run(code, before=told(accelerator=False), site_packages=True) == "False"


def test_pinning_is_changed_once() -> None:
    code = f"""
once = functions()
runpy.run_path({str(CPU_SERVE)!r}, run_name="__mp_main__")
print(functions() == once)
"""
    assert run(code, before=told(accelerator=False), site_packages=True) == "True"
