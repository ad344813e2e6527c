"""Makes the cache salt of a version of the weights, which keeps prefixes of versions apart."""

from __future__ import annotations

from typing import Any

from ..errors import ConfigError
from .sampling import is_text


def salt_of(version: str, run_name: str | None = None) -> str:
    """The salt of a version of the weights, and of the run that they are of."""
    salt = f"weights-{version}"
    return salt if run_name is None else f"{run_name}/{salt}"


def check_run_name(name: Any) -> str | None:
    """Raises `ConfigError` for a name that can't be part of a salt."""
    if name is None or (is_text(name) and name):
        checked: str | None = name
        return checked
    raise ConfigError(f"run_name={name!r:.100}: must be a string, not empty, or None.")
