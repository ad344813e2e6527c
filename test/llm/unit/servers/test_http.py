"""Base URLs, and what is no such."""

from __future__ import annotations

import pytest

from torchrl_sglang.errors import ConfigError
from torchrl_sglang.servers.http import normalise_url, path_hint


@pytest.mark.parametrize(
    "url", ["http://h:1?a=b", "http://h:1/#f", "http://h:99999", "http://h:x", "http://h:1/v1?a=b"]
)
def test_what_is_no_base_url(url: str) -> None:
    with pytest.raises(ConfigError, match="at most a port below 65536 and a path"):
        normalise_url(url)


@pytest.mark.parametrize(
    ("url", "hint"),
    [
        ("http://h:1", False),
        ("http://h:1//", False),
        ("http://h:1/v1", True),
        ("https://h/some/base/", True),
    ],
)
def test_only_a_path_is_hinted_at(url: str, hint: bool) -> None:
    assert bool(path_hint(normalise_url(url))) == hint
