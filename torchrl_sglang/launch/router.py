"""The command line of the router, as a pure function."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..config import RouterConfig
from .server import flags

SERVE_ROUTER = Path(__file__).parent / "serve_router.py"


def router_argv(
    config: RouterConfig,
    *,
    python: str,
    port: int,
    prometheus_port: int,
    worker_urls: Sequence[str],
    api_key: str | None,
) -> list[str]:
    """The command that starts sglang-router in front of servers that are ready.

    Args:
        config: how it routes.
        python: interpreter that has sglang-router.
        port: HTTP port.
        prometheus_port: its metrics port, which otherwise is the same for every router.
        worker_urls: the servers.
        api_key: key that it asks of clients and shows to the servers.
    """
    options = {
        "host": config.host,
        "port": port,
        "worker_urls": list(worker_urls),
        "policy": config.policy,
        "api_key": api_key,
        "prometheus_host": "127.0.0.1",
        "prometheus_port": prometheus_port,
        "worker_startup_check_interval": 1,
        "health_check_interval_secs": config.health_check_interval_s,
        # Answered by schedulers that are paused too. SGLang's own /health generates a token, so a
        # pause of half a minute would have the router leave a server out, and for longer than that.
        "health_check_endpoint": "/server_info",
        "log_level": "info",
        **config.extra_args,
    }
    return [python, str(SERVE_ROUTER), *flags(options)]
