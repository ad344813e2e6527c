"""Marks that several files of tests have."""

from __future__ import annotations

import pytest

# Of TorchRL's own; an error in ours stays one.
QUIET = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torchrl"),
    pytest.mark.filterwarnings("ignore::FutureWarning:torchrl"),
    pytest.mark.filterwarnings("ignore::UserWarning:torchrl"),
    pytest.mark.filterwarnings("ignore::UserWarning:tensordict"),
]
# The only face of weight syncs that LLMCollector takes is deprecated.
UPDATER = pytest.mark.filterwarnings(
    "ignore:Using WeightUpdaterBase is deprecated:DeprecationWarning"
)
LISTS_STACK = pytest.mark.usefixtures("lists_stack")
IDLE = pytest.mark.usefixtures("idle")
