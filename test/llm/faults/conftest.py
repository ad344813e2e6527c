"""The table of what was provoked."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def report() -> Iterator[list[str]]:
    """Rows of the table; written where ``FAULTS_REPORT`` names a file."""
    rows: list[str] = []
    yield rows
    if path := os.environ.get("FAULTS_REPORT"):
        head = "| step | bucket | fault | error | after | state | next full push |\n"
        Path(path).write_text(head + "|---" * 7 + "|\n" + "\n".join(rows) + "\n")
