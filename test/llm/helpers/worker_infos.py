"""What a server says of itself, for tests of pure functions."""

from __future__ import annotations

from typing import Any

from torchrl_sglang.servers.info import Capabilities, WorkerInfo


def worker_info(**changes: Any) -> WorkerInfo:
    """An unquantised Qwen2 on one GPU, with these changes."""
    usual: dict[str, Any] = {
        "url": "http://s",
        "model_path": "/m",
        "tokenizer_path": "/m",
        "model_type": "qwen2",
        "dtype": "auto",
        "device": "cuda",
        "tp_size": 1,
        "dp_size": 1,
        "pp_size": 1,
        "dp_attention": False,
        "max_input_len": None,
        "weight_version": "default",
        "version": "0.5.23",
        "capabilities": Capabilities(update_session=True, checksum=True, cache_salt=True),
    }
    return WorkerInfo(**{**usual, **changes})


HERE, ELSEWHERE = "http://127.0.0.1:1", "http://203.0.113.7:1"  # the second: documentation's own
