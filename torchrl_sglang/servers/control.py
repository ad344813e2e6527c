"""Asks one server or router: one method per route, with the key that the route takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import Timeouts
from ..errors import RequestRefusedError, ServiceError
from .http import HTTPClient

Body = Mapping[str, Any]

# What gives servers weights, by the name of the method.
GIVING = {
    "announce": "/update_weights_from_distributed",
    "load_tensors": "/update_weights_from_tensor",
    "load_files": "/update_weights_from_disk",
    "load_adapter": "/load_lora_adapter",
}
NOT_FOR_US = (401, 403, 404, 405)  # what says that a key or a route is wrong, not what was sent


class ControlClient:
    """Everything that is asked of one server or router but to generate. Safe in several threads.

    Every method takes ``timeout_s``, a bound on the whole request, which is ``Timeouts.control_s``
    by default, and ``connect_s`` for what only reads. Every method raises:

    - `RequestRefusedError`: 4xx.
    - `ServerFailedError`: 5xx, or the connection broke.
    - `RequestTimeoutError`: no answer in time.
    - `ConnectError`: nothing listens there.

    Args:
        url: base URL; a path in it is kept.
        api_key: key for info routes.
        admin_api_key: key for control routes; the API key where a server has only one.
        timeouts: bounds on waiting.

    Attributes:
        http: what sends the requests.
    """

    def __init__(
        self, url: str, *, api_key: str | None, admin_api_key: str | None, timeouts: Timeouts
    ) -> None:
        self.http = HTTPClient(url, api_key=api_key, admin_api_key=admin_api_key, timeouts=timeouts)

    @property
    def url(self) -> str:
        """The base URL, without a slash at its end."""
        return self.http.url

    def listens(self, timeout_s: float) -> bool:
        """Whether anything takes connections at the server's address."""
        return self.http.listens(timeout_s)

    # What it says of itself

    def server_info(self, timeout_s: float | None = None) -> Any:
        """How it was started."""
        return self._first_known("/server_info", "/get_server_info", timeout_s)

    def model_info(self, timeout_s: float | None = None) -> Any:
        """What it serves, and the version of its weights; needs no scheduler."""
        return self._first_known("/model_info", "/get_model_info", timeout_s)

    def openapi(self, timeout_s: float | None = None) -> Any:
        """Its routes, and what they take."""
        return self.http.get("/openapi.json", timeout_s=timeout_s)

    def models(self, timeout_s: float | None = None) -> Any:
        """The model and its adapters, as OpenAI's clients list them."""
        return self.http.get("/v1/models", timeout_s=timeout_s)

    def ready(self, timeout_s: float | None = None) -> Any:
        """Refused by a server that is not ready; SGLang has it from 0.5.20 on."""
        return self.http.get("/ready", timeout_s=timeout_s)

    def is_up(self) -> bool:
        """Whether it says right now that it is there."""
        try:
            self.http.get("/health")
        except ServiceError:
            return False
        return True

    def _first_known(self, path: str, old_path: str, timeout_s: float | None) -> Any:
        """GETs a route by its present name, or by the one that older servers know."""
        try:
            return self.http.get(path, timeout_s=timeout_s)
        except RequestRefusedError as error:
            if error.status != 404:
                raise
        return self.http.get(old_path, timeout_s=timeout_s)

    # Requests under way

    def score(self, body: Body, timeout_s: float | None = None) -> Any:
        """Sends one request to ``/generate`` that generates nothing."""
        return self.http.post("/generate", body, timeout_s=timeout_s)

    def abort(self, rid: str | None, timeout_s: float | None = None) -> None:
        """Aborts the requests whose ids begin with ``rid``; None: all."""
        body = {"rid": rid or "", "abort_all": rid is None}
        self.http.post("/abort_request", body, admin=True, timeout_s=timeout_s)

    def pause(self, mode: str, timeout_s: float | None = None) -> None:
        """Pauses it: ``"abort"``, ``"retract"`` or ``"in_place"`` say what requests come to."""
        self.http.post("/pause_generation", {"mode": mode}, admin=True, timeout_s=timeout_s)

    def resume(self, timeout_s: float | None = None) -> None:
        """Has it go on."""
        self.http.post("/continue_generation", admin=True, timeout_s=timeout_s)

    def flush(self, timeout_s: float | None = None) -> None:
        """Empties its prefix cache; refused while requests are in flight."""
        self.http.post("/flush_cache", admin=True, timeout_s=timeout_s)

    # Weights

    def begin(self, timeout_s: float | None = None) -> None:
        """Opens an update; refused where one is open."""
        self.http.post("/begin_weight_update", admin=True, timeout_s=timeout_s)

    def end(self, timeout_s: float | None = None) -> None:
        """Ends the open update."""
        self.http.post("/end_weight_update", admin=True, timeout_s=timeout_s)

    def join(self, body: Body, timeout_s: float | None = None) -> None:
        """Has its ranks join a collective; answers once they have."""
        self.http.post("/init_weights_update_group", body, admin=True, timeout_s=timeout_s)

    def leave(self, group_name: str, timeout_s: float | None = None) -> None:
        """Has its ranks leave a collective."""
        body = {"group_name": group_name}
        self.http.post("/destroy_weights_update_group", body, admin=True, timeout_s=timeout_s)

    def announce(self, body: Body, timeout_s: float | None = None) -> None:
        """Has its ranks take part in a broadcast, and load what comes."""
        self.http.post(GIVING["announce"], body, admin=True, timeout_s=timeout_s)

    def load_tensors(self, body: Body, timeout_s: float | None = None) -> None:
        """Has its ranks load what lies in shared memory."""
        self.http.post(GIVING["load_tensors"], body, admin=True, timeout_s=timeout_s)

    def load_files(self, body: Body, timeout_s: float | None = None) -> None:
        """Has its ranks load a checkpoint from a folder."""
        self.http.post(GIVING["load_files"], body, admin=True, timeout_s=timeout_s)

    def check_allowed(self, method: str, timeout_s: float | None = None) -> None:
        """Finds out whether it lets this process call a method of `GIVING`, without doing so.

        What is sent is empty. Servers look at the key first, and then refuse what is missing.

        Raises:
            RequestRefusedError: it refuses the key, or has no such route. Nothing else is raised:
                who is gone is found out by what follows, which knows what to do about it.
        """
        try:
            self.http.post(GIVING[method], admin=True, timeout_s=timeout_s)
        except RequestRefusedError as error:
            if error.status in NOT_FOR_US:
                raise
        except ServiceError:
            pass

    def checksums(self, timeout_s: float | None = None) -> Any:
        """Its own hashes of its weights; it waits for its GPUs."""
        body = {"action": "checksum"}
        return self.http.post("/weights_checker", body, admin=True, timeout_s=timeout_s)

    def set_version(self, version: str, timeout_s: float | None = None) -> None:
        """Tells it the version of its weights."""
        body = {"new_version": version, "abort_all_requests": False}
        self.http.post("/update_weight_version", body, admin=True, timeout_s=timeout_s)

    # Adapters

    def load_adapter(self, body: Body, timeout_s: float | None = None) -> None:
        """Has it load a LoRA adapter from a folder."""
        self.http.post(GIVING["load_adapter"], body, admin=True, timeout_s=timeout_s)

    def load_adapter_tensors(self, body: Body, timeout_s: float | None = None) -> None:
        """Has it load a LoRA adapter from the request itself."""
        path = "/load_lora_adapter_from_tensors"
        self.http.post(path, body, admin=True, timeout_s=timeout_s)

    def unload_adapter(self, name: str, timeout_s: float | None = None) -> None:
        """Has it unload a LoRA adapter; refused where it has none of that name."""
        body = {"lora_name": name}
        self.http.post("/unload_lora_adapter", body, admin=True, timeout_s=timeout_s)

    # Sessions

    def open_session(self, body: Body, timeout_s: float | None = None) -> Any:
        """Opens a session; its id."""
        return self.http.post("/open_session", body, timeout_s=timeout_s)

    def close_session(self, session_id: str, timeout_s: float | None = None) -> None:
        """Closes a session."""
        self.http.post("/close_session", {"session_id": session_id}, timeout_s=timeout_s)

    # A router's servers

    def workers(self, timeout_s: float | None = None) -> Any:
        """The servers behind a router; a server itself has no such route."""
        return self.http.get("/workers", timeout_s=timeout_s)

    def add_worker(self, url: str, api_key: str | None, timeout_s: float | None = None) -> None:
        """Has a router send to a server, once it has found it healthy."""
        self.http.post("/workers", {"url": url, "api_key": api_key}, timeout_s=timeout_s)

    def remove_worker(self, worker_id: str, timeout_s: float | None = None) -> None:
        """Has a router forget a server, by the id that it has given it."""
        self.http.delete(f"/workers/{worker_id}", timeout_s=timeout_s)
