"""What is served, and by whom: the part of a service that only asks its cluster."""

from __future__ import annotations

import abc

from .attach import Cluster
from .client import ControlClient
from .engine import RLSGLangEngine
from .info import WorkerInfo


class ServedModel(RLSGLangEngine):
    """A model behind a URL, and the servers that run it."""

    @property
    @abc.abstractmethod
    def cluster(self) -> Cluster:
        """What answers at the URL."""

    @property
    def info(self) -> WorkerInfo:
        """What the first server says of itself."""
        return self.cluster.infos[0]

    @property
    def workers(self) -> tuple[ControlClient, ...]:
        """A control client per server."""
        return self.cluster.workers

    @property
    def server_url(self) -> str:
        """URL that takes requests: the router's, or the single server's."""
        return self.cluster.url

    @property
    def sglang_version(self) -> str:
        """Version of SGLang that serves."""
        return self.info.version

    @property
    def model_path(self) -> str:
        """Folder or hub name of the model, as the servers know it."""
        return self.info.model_path

    @property
    def tp_size(self) -> int:
        """Tensor-parallel ranks per server."""
        return self.info.tp_size

    @property
    def dp_size(self) -> int:
        """Data-parallel ranks per server."""
        return self.info.dp_size

    @property
    def pp_size(self) -> int:
        """Pipeline-parallel ranks per server."""
        return self.info.pp_size

    @property
    def ep_size(self) -> int:
        """Expert-parallel ranks per server, which are among the others."""
        return self.info.ep_size

    def get_tp_size(self) -> int:
        """Tensor-parallel ranks per server."""
        return self.info.tp_size

    def get_dp_size(self) -> int:
        """Data-parallel ranks per server."""
        return self.info.dp_size

    def flush_cache(self) -> bool:
        """Empties the prefix cache of every server; returns True once all are empty.

        Raises:
            ServiceError: a server refused; SGLang does so while requests are in flight.
        """
        for worker in self.workers:
            worker.post("/flush_cache")
        return True
