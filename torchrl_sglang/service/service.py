"""Offers `AsyncSGLang`: SGLang servers behind a router, started here or attached to."""

from __future__ import annotations

import functools
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from ..config import RouterConfig, Timeouts
from ..errors import ConfigError
from ..generate.cache_salt import check_run_name
from ..generate.generator import Generator
from ..generate.sessions import Sessions
from ..launch.fleet import Fleet
from ..launch.options import in_our_words
from ..launch.plan import check_way
from ..servers.attach import Cluster, Credentials
from ..servers.control import ControlClient
from ..servers.gate import ServiceState, UpdateGate
from ..servers.http import normalise_url
from ..servers.info import WorkerInfo
from ..servers.lora import Adapters
from ..servers.members import Servers
from ..servers.restart import restart
from ..servers.start import start_managed
from ..weights.direct import DirectSync
from .engine import RLSGLangEngine
from .local import Local

Args = ParamSpec("Args")
Part = TypeVar("Part")
T = TypeVar("T")


def _via(
    part: Callable[[AsyncSGLang], Part], method: Callable[Concatenate[Part, Args], T]
) -> Callable[Concatenate[AsyncSGLang, Args], T]:
    """A method of the service that a part of it has."""

    @functools.wraps(method)
    def call(service: AsyncSGLang, /, *args: Args.args, **kwargs: Args.kwargs) -> T:
        return method(part(service), *args, **kwargs)

    return call


_servers: Callable[[AsyncSGLang], Servers] = attrgetter("servers")
_generator: Callable[[AsyncSGLang], Generator] = attrgetter("_local.generator")
_sync: Callable[[AsyncSGLang], DirectSync] = attrgetter("_local.sync")


class AsyncSGLang(RLSGLangEngine):
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
        fleet = None
        if model_path is not None:
            self._keys = Credentials.chosen(api_key, admin_api_key)
            fleet = start_managed(model_path, self._keys, self.timeouts, in_our_words(start))
            server_url = fleet.router_url
        self._url = str(server_url)
        try:
            self._make_local(fleet)
            self.servers.attach()  # now, so that a wrong URL raises here
        except BaseException:
            self._own.close()
            raise
        _remember(self)

    def _make_local(self, fleet: Fleet | None = None) -> None:
        servers = Servers(self._url, self._keys, self.timeouts, fleet)
        self._own = Local(servers, self.run_name)
        # Also at interpreter exit: an event loop that still runs then can crash it.
        self._finalizer = weakref.finalize(self, self._own.close)

    @property
    def _local(self) -> Local:
        """This process's resources; a forked copy makes its own on first use."""
        if self._own.foreign:
            self._finalizer.detach()
            self._make_local()
        return self._own

    @property
    def servers(self) -> Servers:
        """The servers as this process knows them, for what pushes weights to them."""
        return self._local.servers

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

    # Generating

    generate = _via(_generator, Generator.generate)
    agenerate = _via(_generator, Generator.agenerate)
    complete = _via(_generator, Generator.complete)
    acomplete = _via(_generator, Generator.acomplete)
    complete_each = _via(_generator, Generator.complete_each)
    as_completed = _via(_generator, Generator.as_completed)
    aas_completed = _via(_generator, Generator.aas_completed)
    check = _via(_generator, Generator.check)
    abort = _via(_generator, Generator.abort)
    open_session = _via(_generator, Generator.open_session)

    @property
    def max_input_len(self) -> int | None:
        """What a prompt has to be shorter than, on every server; None: they don't tell."""
        return self._local.generator.max_input_len

    @property
    def sessions(self) -> Sessions:
        """The sessions that this service opened; closed with it."""
        return self._local.generator.sessions

    @property
    def lora(self) -> Adapters:
        """The LoRA adapters: load, unload, list."""
        return self.servers.lora

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
        return self.servers.gate

    @property
    def state(self) -> ServiceState:
        """Whether the servers run whole weights, and live; see `ServiceState`.

        Where they were paused when this object attached to them, they are asked whether they still
        are, which takes seconds then.
        """
        return self.servers.state

    @property
    def weight_version(self) -> str:
        """Version of the weights that the servers run.

        Known without asking in the process that pushed last; elsewhere the servers are asked. That
        another process has pushed since is seen by the completions, and by the next push here.
        """
        return self.servers.weight_version()

    @property
    def pushed_version(self) -> int | None:
        """The version that this process pushed last; None before it pushed."""
        return self.servers.versions.pushed

    @property
    def version_labels(self) -> Mapping[int, str]:
        """Names that pushes of this process gave their numbers; rows and servers have the numbers.

        Example:
            ``service.version_labels.get(int(row["rollout", "policy_version"][0]))``
        """
        return MappingProxyType(self.servers.versions.labels)

    @property
    def weight_label(self) -> str | None:
        """Name of `weight_version`, if this process pushed it under one."""
        version = self.weight_version
        return self.version_labels.get(int(version)) if version.isdecimal() else None

    @property
    def known_version(self) -> int:
        """The version that was pushed last, or the highest that was seen; 0 if there is none."""
        return self.servers.versions.known

    @property
    def api_key(self) -> str | None:
        """The API key that clients of `server_url` need."""
        return self._keys.api_key

    @property
    def log_dir(self) -> Path | None:
        """Folder of the children's logs; None in external mode."""
        return self.servers.fleet.log_dir if self.servers.fleet else None

    @property
    def router_version(self) -> str | None:
        """Version of the router that was started here; an external one does not tell."""
        return self.servers.fleet.router_version if self.servers.fleet else None

    # Who serves

    @property
    def managed(self) -> bool:
        """Whether this object, in this process, started the servers."""
        return self.servers.managed

    @property
    def managed_urls(self) -> tuple[str, ...]:
        """URLs of the servers that this object started, also of those that are left out."""
        return self.servers.managed_urls

    refresh = _via(_servers, Servers.refresh)
    drop_worker = _via(_servers, Servers.drop)
    restart_workers = _via(_servers, restart)

    @property
    def cluster(self) -> Cluster:
        """What answers at the URL; a copy in another process attaches here, on first use."""
        return self.servers.cluster

    @property
    def workers(self) -> tuple[ControlClient, ...]:
        """A control client per server, but for those started here that are dead by now."""
        return self.servers.workers

    @property
    def info(self) -> WorkerInfo:
        """What the first server says of itself."""
        return self.servers.info

    @property
    def server_url(self) -> str:
        """URL that takes requests: the router's, or the single server's."""
        return self.servers.cluster.url

    @property
    def model_path(self) -> str:
        """Folder or hub name of the model, as the servers know it."""
        return self.servers.model_path

    @property
    def sglang_version(self) -> str:
        """Version of SGLang that serves."""
        return self.info.version

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

    flush_cache = _via(_servers, Servers.flush_cache)

    # Weights, as TorchRL's recipes push them

    get_master_address = _via(_sync, DirectSync.get_master_address)
    get_master_port = _via(_sync, DirectSync.get_master_port)
    get_model_metadata = _via(_sync, DirectSync.get_model_metadata)
    init_weight_update_group = _via(_sync, DirectSync.init_weight_update_group)
    close_weight_update_group = _via(_sync, DirectSync.close_weight_update_group)
    update_weights = _via(_sync, DirectSync.update_weights)
    update_weights_from_distributed = _via(_sync, DirectSync.update_weights_from_distributed)

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
        self._make_local()
        _remember(self)

    def __repr__(self) -> str:
        kind = "managed" if self.servers.managed else "external"
        return f"{type(self).__name__}({self._url!r}, {kind}, {self.gate.state.value})"


_services: list[weakref.ref[AsyncSGLang]] = []


def _remember(service: AsyncSGLang) -> None:
    """Lets `find_service` find ``service`` for as long as it lives."""
    _services[:] = [known for known in _services if known() is not None]
    _services.append(weakref.ref(service))


def find_service(
    url: str, *, api_key: str | None = None, admin_api_key: str | None = None
) -> AsyncSGLang | None:
    """The service of this process that uses ``url``: one that started its servers, if there is one.

    A service made anew would not hold the requests of the one that is there while weights change,
    and would not know the random keys of servers that it started.

    Args:
        url: URL of a router or server.
        api_key: must be the service's, if given.
        admin_api_key: likewise.
    """
    url = normalise_url(url)
    found = [
        service
        for known in list(_services)
        if (service := known()) is not None
        and normalise_url(service._url) == url
        and api_key in (None, service._keys.api_key)
        and admin_api_key in (None, service._keys.admin_api_key)
        and service.state is not ServiceState.CLOSED
    ]
    managed = [service for service in found if service.log_dir is not None]
    return next(iter(managed or found), None)


def make_sglang_server(model_name: str, **kwargs: Any) -> AsyncSGLang:
    """Same as `AsyncSGLang.from_pretrained`, under TorchRL's name for it."""
    return AsyncSGLang.from_pretrained(model_name, **kwargs)
