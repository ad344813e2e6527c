"""Memory that is shared between processes."""

from __future__ import annotations

import pytest
import torch

from torchrl_sglang.weights.carry import shared_memory


@pytest.mark.parametrize(
    ("settings", "inside"),
    [
        ("expandable_segments:True", "expandable_segments:False"),
        (
            "max_split_size_mb:512,expandable_segments:True",
            "max_split_size_mb:512,expandable_segments:False",
        ),
        ("expandable_segments: True", "expandable_segments:False"),
        ("max_split_size_mb:512", "max_split_size_mb:512"),
    ],
)
def test_memory_that_is_shared_is_not_expandable(settings: str, inside: str) -> None:
    """Servers can't fetch what expandable segments are shared by; nothing else changes."""
    read, change = torch._C._accelerator_getAllocatorSettings, shared_memory.change_allocator
    before = read()
    change(settings)
    try:
        with shared_memory.no_expandable_segments():
            assert read() == inside
        assert read() == settings
    finally:
        change(before)
