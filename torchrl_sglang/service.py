"""`AsyncSGLang`: SGLang servers behind a router, started here or attached to."""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

from .adapters import Adapters
from .admission import check_run_name
from .attach import Cluster, Credentials
from .background import BackgroundLoop
from .client import ControlClient
from .completions import INITIAL_VERSION
from .config import RouterConfig, Timeouts
from .data_client import DataClient
from .errors import ConfigError
from .gate import ServiceState, UpdateGate
from .launch.options import in_our_words
from .live import remember
from .local import LocalResources
from .members import Members
from .sessions import Sessions
from .shared_generation import SharedGeneration
from .start import check_way, start_managed


class AsyncSGLang(Members, SharedGeneration):
    """The rollout service: generates with SGLang servers that it started or attached to.

    Managed (`from_pretrained`): starts servers and one router, and ends them in `shutdown`, on
    leaving the ``with`` block, and whenever this process ends. External (`connect`): uses a running
    router or server and owns nothing. Safe to use from several threads. Picklable: a copy in
    another process attaches on first use, owns nothing and learns the version from the servers.

    Args:
        server_url: URL of a running router or server; same as `connect`.
        model_path: instead of it, folder or hub name of a model to serve; same as
            `from_pretrained`.
        api_key: API key of what runs at the URL, or of what is started.
        admin_api_key: key of the control routes, where they have their own.
        timeouts: every bound on waiting.
        run_name: keeps the cached prefixes of this run's weights apart from those of other runs, of
            which versions have the same numbers: needed where servers keep their prefix cache in a
            storage that runs share (HiCache), or that outlives them. The same in every process of a
            run; a pickled copy has it.
        **start: with ``model_path``, further arguments of `from_pretrained`.

    Raises:
        ConfigError: an argument is wrong; also where both, or none, of ``server_url`` and
            ``model_path`` are given.
        ConnectError: nothing that is known answers at the URL.
        LaunchError: as in `from_pretrained`.
    """

    def __init__(
        self,
        server_url: str | None = None,
        model_path: str | None = None,
        *,
        api_key: str | None = None,
        admin_api_key: str | None = None,
        timeouts: Timeouts | None = None,
        run_name: str | None = None,
        **start: Any,
    ) -> None:
        check_way(server_url, model_path, start)
        self.timeouts = timeouts or Timeouts()
        self.run_name = check_run_name(run_name)
        self._keys = Credentials(api_key=api_key, admin_api_key=admin_api_key)
        local = LocalResources()
        if model_path is not None:
            self._keys = Credentials.chosen(api_key, admin_api_key)
            local.fleet = start_managed(model_path, self._keys, self.timeouts, in_our_words(start))
            server_url = local.fleet.router_url
        self._url = str(server_url)
        try:
            self._set_local(local)
            self.cluster  # noqa: B018  # attaches now, so that a wrong URL raises here
        except BaseException:
            local.close()
            raise
        remember(self)

    def _set_local(self, local: LocalResources) -> None:
        self._own = local
        # Also at interpreter exit: an event loop that still runs then can crash it.
        self._finalizer = weakref.finalize(self, local.close)

    @property
    def _local(self) -> LocalResources:
        """This process's resources; a forked copy makes its own on first use."""
        if self._own.foreign:
            self._finalizer.detach()
            self._set_local(LocalResources())
        return self._own

    @classmethod
    def connect(
        cls,
        url: str,
        *,
        api_key: str | None = None,
        admin_api_key: str | None = None,
        timeouts: Timeouts | None = None,
        run_name: str | None = None,
    ) -> Self:
        """Attaches to a running router or server; arguments and errors as in the constructor."""
        return cls(
            url,
            api_key=api_key,
            admin_api_key=admin_api_key,
            timeouts=timeouts,
            run_name=run_name,
        )

    @classmethod
    def from_pretrained(
        cls,
        model_name: str,
        *,
        num_replicas: int = 1,
        tp_size: int = 1,
        dp_size: int = 1,
        pp_size: int = 1,
        ep_size: int = 1,
        device: str | None = None,
        cuda_devices: Sequence[int] | None = None,
        server_python: str | None = None,
        router: RouterConfig | None = None,
        server_ports: Sequence[int] | None = None,
        api_key: str | None = None,
        admin_api_key: str | None = None,
        log_dir: str | os.PathLike[str] | None = None,
        timeouts: Timeouts | None = None,
        server_env: Mapping[str, str] | None = None,
        run_name: str | None = None,
        **server_args: Any,
    ) -> Self:
        """Starts servers and a router, and returns once they take requests.

        Args:
            model_name: folder or hub name of the model.
            num_replicas: servers behind the router.
            tp_size: tensor-parallel ranks per server.
            dp_size: data-parallel ranks per server; prefer ``num_replicas``, which weights can be
                broadcast to.
            pp_size: pipeline-parallel ranks per server.
            ep_size: expert-parallel ranks per server.
            device: ``"cpu"`` or ``"cuda"``; by default CUDA where a GPU is visible.
            cuda_devices: GPUs to use, divided among the replicas in order.
            server_python: interpreter of an environment that has SGLang; this one by default.
            router: how requests are spread.
            server_ports: fixed ports, one per replica; free ones by default.
            api_key: key of servers and router; random by default, ``""`` for none.
            admin_api_key: key of the control routes; random by default, ``""`` for none.
            log_dir: folder for the logs; a new temporary one by default.
            timeouts: every bound on waiting.
            server_env: variables for the servers' environment, on top of this process's.
            run_name: keeps cached prefixes of other runs apart, see `AsyncSGLang`.
            **server_args: further ``sglang.launch_server`` options, such as
                ``mem_fraction_static=0.8``; vLLM's names for them are understood too.

        Raises:
            ConfigError: an argument is wrong, or unknown to the installed SGLang, or the model's
                folder is; nothing was started.
            LaunchError: something did not start; its argv, exit code and last log lines are in the
                message, and nothing is left running.
        """
        again = [name for name in ("model_path", "server_url") if name in server_args]
        if again:
            raise ConfigError(f"{again} beside model_name: from_pretrained serves that one.")
        sizes = {"tp_size": tp_size, "dp_size": dp_size, "pp_size": pp_size, "ep_size": ep_size}
        given: dict[str, Any] = {name: size for name, size in sizes.items() if size != 1}
        if cuda_devices is not None:
            given["cuda_devices"] = cuda_devices
        return cls(
            model_path=model_name if model_name is not None else "",
            num_replicas=num_replicas,
            device=device,
            server_python=server_python,
            router=router,
            server_ports=server_ports,
            api_key=api_key,
            admin_api_key=admin_api_key,
            run_name=run_name,
            log_dir=log_dir,
            timeouts=timeouts,
            server_env=server_env,
            **given,
            **server_args,
        )

    def _data_plane(self) -> tuple[BackgroundLoop, DataClient]:
        return self._local.data_plane(self.server_url, self._keys.api_key, self.timeouts)

    @property
    def cluster(self) -> Cluster:
        """What answers at the URL; a copy in another process attaches here, on first use."""
        return self._local.attached(self._url, self._keys, self.timeouts)

    @property
    def workers(self) -> tuple[ControlClient, ...]:
        """A control client per server, but for those started here that are dead by now."""
        return self._local.living(self.cluster.workers)

    @property
    def sessions(self) -> Sessions:
        """The sessions that this service opened; closed with it."""
        return self._local.sessions

    @property
    def lora(self) -> Adapters:
        """The LoRA adapters: load, unload, list."""
        return self._local.adapters(self.workers)

    @property
    def openai_base_url(self) -> str:
        """What OpenAI's clients take as ``base_url``; their ``api_key`` is `api_key`.

        Raises:
            UnsupportedOptionError: the servers run without a tokenizer.
        """
        self.info.features.check_openai()
        return self.server_url + "/v1"

    @property
    def gate(self) -> UpdateGate:
        """Holds requests while weights change."""
        return self._local.gate

    @property
    def state(self) -> ServiceState:
        """Whether the servers run whole weights, and live; see `ServiceState`.

        Where they were paused when this object attached to them, they are asked whether they still
        are, which takes seconds then.
        """
        state = self.gate.state
        if state is not ServiceState.SYNCED:
            return state
        if self._local.lost:
            return ServiceState.BROKEN
        return ServiceState.UPDATING if self._local.still_paused() else state

    @property
    def weight_version(self) -> str:
        """Version of the weights that the servers run.

        Known without asking in the process that pushed last; elsewhere the servers are asked. That
        another process has pushed since is seen by the completions, and by the next push here.
        """
        if self.pushed_version is not None and not self._local.others_push:
            return str(self.pushed_version)
        if self._local.lost:
            self._local.recover()
        answer = self.workers[0].get("/model_info")
        version = str(answer.get("weight_version", INITIAL_VERSION))
        self._local.saw([version])
        return version

    @property
    def pushed_version(self) -> int | None:
        """The version that this process pushed last; None before it pushed."""
        return self._local.pushed_version

    @property
    def version_labels(self) -> Mapping[int, str]:
        """Names that pushes of this process gave their numbers; rows and servers have the numbers.

        Example:
            ``service.version_labels.get(int(row["rollout", "policy_version"][0]))``
        """
        return MappingProxyType(self._local.version_labels)

    @property
    def weight_label(self) -> str | None:
        """Name of `weight_version`, if this process pushed it under one."""
        version = self.weight_version
        return self.version_labels.get(int(version)) if version.isdecimal() else None

    def set_version_label(self, version: int, label: str | None) -> None:
        """Called by the weight sync before it pushes ``version``; None: it has no name."""
        self._local.version_labels.pop(version, None)
        if label is not None:
            self._local.version_labels[version] = label

    def set_pushed_version(self, version: int, *, adapter: bool = False) -> None:
        """Called by the weight sync once every server runs ``version``, or has its adapter."""
        first = self._local.pushed_version is None
        self._local.adapters_only = adapter and (first or self._local.adapters_only)
        self._local.pushed_version = version
        self._local.others_push = False
        self._local.saw([str(version)])

    def _noticed(self, version: str) -> None:
        self._local.saw([version])
        pushed = self.pushed_version
        if pushed is not None and version.isdecimal() and int(version) > pushed:
            self._local.others_push = True  # or a push of ours is about to end, and sets it back

    @property
    def api_key(self) -> str | None:
        """The API key that clients of `server_url` need."""
        return self._keys.api_key

    @property
    def log_dir(self) -> Path | None:
        """Folder of the children's logs; None in external mode."""
        return self._local.fleet.log_dir if self._local.fleet else None

    @property
    def router_version(self) -> str | None:
        """Version of the router that was started here; an external one does not tell."""
        return self._local.fleet.router_version if self._local.fleet else None

    # Life

    def shutdown(self) -> None:
        """Ends what this object started, and refuses further use; harmless twice."""
        if self.state is ServiceState.UPDATING:
            self._local.close()  # what is under way ends now, not when a server is up
        self.close_weight_update_group()
        self._local.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.shutdown()

    def __getstate__(self) -> dict[str, Any]:
        return {
            "url": self._url,
            "keys": self._keys,
            "timeouts": self.timeouts,
            "run_name": self.run_name,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.run_name = state["run_name"]
        self._url, self._keys, self.timeouts = state["url"], state["keys"], state["timeouts"]
        self._set_local(LocalResources())
        remember(self)

    def __repr__(self) -> str:
        kind = "managed" if self._local.fleet else "external"
        return f"{type(self).__name__}({self._url!r}, {kind}, {self.gate.state.value})"


def make_sglang_server(model_name: str, **kwargs: Any) -> AsyncSGLang:
    """Same as `AsyncSGLang.from_pretrained`, under TorchRL's name for it."""
    return AsyncSGLang.from_pretrained(model_name, **kwargs)
