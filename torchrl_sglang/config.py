"""Holds the configuration that users pass: frozen, keyword-only, checked when it is made."""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args

from .errors import ConfigError

T = TypeVar("T")

Device = Literal["cpu", "cuda"]
RouterPolicy = Literal["round_robin", "random", "cache_aware", "power_of_two"]
PauseMode = Literal["retract", "in_place", "abort"]
SyncMethod = Literal["auto", "broadcast", "tensor", "disk", "lora"]
SyncLayout = Literal["auto", "flattened", "tensors"]
Verify = Literal["always", "first", "never"]
VerifyMethod = Literal["auto", "checksum", "probe"]
LostEngines = Literal["raise", "drop", "restart"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def is_number(value: object) -> bool:
    """Whether a value is a finite number, and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_count(value: object) -> bool:
    """Whether a value is an integer of at least 1; True is no number."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _check_port(port: object) -> None:
    valid = port is None or (is_count(port) and int(str(port)) < 65536)
    _require(valid, f"port must be an integer from 1 to 65535, or None, got {port!r}.")


def naming_neighbours(config: type[T]) -> type[T]:
    """Has a dataclass refuse an option that it doesn't have with a `ConfigError` that helps."""
    make, known = config.__init__, [*config.__dataclass_fields__]  # type: ignore[attr-defined]

    @functools.wraps(make)
    def checked(self: T, *args: Any, **options: Any) -> None:
        for name in options.keys() - {*known}:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known)}."
            raise ConfigError(f"{config.__name__} has no option {name!r}: {hint}")
        make(self, *args, **options)

    setattr(config, "__init__", checked)  # noqa: B010
    return config


@naming_neighbours
@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """How one managed SGLang server is started.

    Attributes:
        model_path: folder or hub name of the model.
        device: ``"cpu"`` or ``"cuda"``.
        tp_size: tensor-parallel ranks of one server.
        dp_size: data-parallel ranks of one server (a weight broadcast needs 1).
        pp_size: pipeline-parallel ranks of one server (a weight broadcast needs 1).
        ep_size: expert-parallel ranks of one server; adds no process.
        cuda_devices: the GPUs of this server, as numbers; None leaves them to the environment.
        port: a fixed port, or None for a free one.
        host: the address to listen on.
        api_key: key for generate and info routes; None: no key.
        admin_api_key: key for control routes; None: no key.
        cpu_threads: threads that each rank computes with, on CPU; None leaves them to torch (all
            cores).
        cpu_cores: the cores of each rank, on CPU; None leaves the choice to SGLang, which gives
            each rank a NUMA node.
        env: variables for the server's environment, on top of this process's.
        extra_args: further ``sglang.launch_server`` options, ``{"mem_fraction_static": 0.8}``;
            True is a bare flag, False or None leaves the option out.
    """

    model_path: str
    device: Device
    tp_size: int = 1
    dp_size: int = 1
    pp_size: int = 1
    ep_size: int = 1
    cuda_devices: tuple[int, ...] | None = None
    port: int | None = None
    host: str = "127.0.0.1"
    api_key: str | None = None
    admin_api_key: str | None = None
    cpu_threads: int | None = None
    cpu_cores: tuple[tuple[int, ...], ...] | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    extra_args: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require(
            isinstance(self.model_path, str) and bool(self.model_path),
            "the model is a folder or a hub name such as 'Qwen/Qwen2.5-0.5B-Instruct', "
            f"got {self.model_path!r}.",
        )
        for name in ("tp_size", "dp_size", "pp_size", "ep_size"):
            size = getattr(self, name)
            _require(is_count(size), f"{name} must be an integer >= 1, got {size!r}.")
        _check_port(self.port)
        if self.cuda_devices is not None:
            needed = self.num_gpus
            _require(
                len(self.cuda_devices) == needed,
                f"a server of tp_size={self.tp_size}, dp_size={self.dp_size}, "
                f"pp_size={self.pp_size} needs {needed} GPUs, cuda_devices names "
                f"{len(self.cuda_devices)}: {list(self.cuda_devices)}.",
            )

    @property
    def num_gpus(self) -> int:
        """GPUs that one server occupies; DP attention shares the TP ranks' GPUs."""
        shared = bool(self.extra_args.get("enable_dp_attention"))
        return self.tp_size * self.pp_size * (1 if shared else self.dp_size)

    @property
    def num_ranks(self) -> int:
        """Processes of one server that compute, as many as it would have GPUs."""
        return self.num_gpus


@naming_neighbours
@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """How the managed router is started.

    Attributes:
        policy: how requests are spread. ``"round_robin"`` splits evenly; ``"cache_aware"`` of
            sglang-router 0.3.2 ignores ``input_ids`` and sends them all to one worker.
        port: a fixed port, or None for a free one.
        host: the address to listen on.
        health_check_interval_s: seconds between the router's own checks of a worker.
        extra_args: further ``sglang_router.launch_router`` options.
    """

    policy: RouterPolicy = "round_robin"
    port: int | None = None
    host: str = "127.0.0.1"
    health_check_interval_s: int = 10
    extra_args: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        policies = get_args(RouterPolicy)
        _require(self.policy in policies, f"policy must be one of {policies}, got {self.policy!r}.")
        _require(
            is_count(self.health_check_interval_s),
            "health_check_interval_s must be an integer >= 1, got "
            f"{self.health_check_interval_s!r}.",
        )
        _check_port(self.port)
        decided = {"port", "host", "policy", "worker_urls", "api_key", "prometheus_port"}
        own = sorted(decided & set(self.extra_args))
        _require(not own, f"router options {own} are decided by the service: leave them out.")


@naming_neighbours
@dataclass(frozen=True, kw_only=True)
class Timeouts:
    """Every bound on waiting, in seconds.

    Attributes:
        start_s: from spawning a server until it is ready; large models load for minutes.
        stop_s: from SIGTERM until a child is killed.
        connect_s: opening a connection, and info requests while attaching.
        control_s: one control request. In a push these are the steps that take longer the larger
            the model is (see `whole_s`): end (quantised weights are packed then) and verify.
        step_s: one of a push's short steps (pause, flush, begin, version, continue), which take
            milliseconds: a server makes them between two forward passes. Raise it where one pass
            takes seconds.
        request_s: one ``generate`` call, retries included.
        retry_s: how long a request that met a broken connection, 5xx, 408 or 429 is tried again.
        paused_s: how long a request is left with servers that stay paused, but not by a push of
            this process; more than such a push takes.
        group_s: the collective's rendezvous.
        probe_s: the first broadcast after it, in which NCCL connects.
        transfer_s: most for what is transferred at once, whatever its size.
        bytes_per_s: the slowest transfer that is not given up, in bytes per second instead of
            seconds: see `bucket_s`. Lower it where a network is slower than 100 MB/s.
    """

    start_s: float = 600.0
    stop_s: float = 15.0
    connect_s: float = 10.0
    control_s: float = 30.0
    step_s: float = 3.0
    request_s: float = 1800.0
    retry_s: float = 30.0
    paused_s: float = 120.0
    group_s: float = 3.0
    probe_s: float = 10.0
    transfer_s: float = 300.0
    bytes_per_s: float = 1e8

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            unit = "bytes per second" if name == "bytes_per_s" else "seconds"
            _require(
                number and value > 0, f"Timeouts.{name} must be positive {unit}, got {value!r}."
            )

    def bucket_s(self, num_bytes: int) -> float:
        """One bucket of a broadcast, from its announcement until the servers have loaded it.

        Args:
            num_bytes: its size.
        """
        return min(self.transfer_s, self.step_s + num_bytes / self.bytes_per_s)

    def whole_s(self, num_bytes: int, device: str) -> float:
        """End, or verify, of so many bytes; a GPU may have to compile its kernels first."""
        return min(self.control_s, self.bucket_s(num_bytes)) if device == "cpu" else self.control_s


@naming_neighbours
@dataclass(frozen=True, kw_only=True)
class WeightSyncConfig:
    """How weights are pushed.

    Attributes:
        method: ``"broadcast"`` sends over a collective; ``"tensor"`` shares memory with servers on
            this machine; ``"disk"`` has them load files; ``"auto"`` picks one of these. ``"lora"``
            pushes a LoRA adapter alone, and pauses nothing.
        folder: where ``"disk"`` writes, as trainer and servers both see it; None for a temporary
            folder, which servers on this machine can read.
        translate: from the trainer's own names to Hugging Face's, for checkpoints in another form
            (Megatron's): takes the trainer's entries by name, returns the served model's tensors by
            name, a mapping or pairs. It may rename, divide and join tensors, and leave some out.
        pause_mode: what happens to requests in flight: ``"retract"`` requeues them, so that they
            go on under the new weights, their prompt and what they have computed anew; in
            ``"in_place"`` they freeze and go on with what they have; ``"abort"`` ends them.
        bucket_bytes: most bytes in one broadcast; the server holds one bucket per rank.
        layout: ``"flattened"`` copies a bucket into one tensor, ``"tensors"`` sends each from where
            it is; ``"auto"`` takes the second where tensors are large and need no copy.
        verify: ``"always"`` proves after each push that the servers hold what was sent, ``"first"``
            after the first one over a connection and after each repair, ``"never"`` trusts the
            servers' answers.
        verify_method: ``"checksum"`` compares the servers' own hashes of their weights with
            ours, ``"probe"`` scores a prompt on every server and compares with the trainer's
            model, ``"auto"`` takes the checksum where server and layout allow it.
        probe_tolerance: largest difference of a log-prob that the probe accepts.
        flush_cache: empty the servers' prefix caches while they are paused, so that no request
            of any client, salted or not, meets a prefix computed by old weights. None: do so,
            except in ``"in_place"``, where servers refuse it and salts alone keep versions apart.
        check_finite: refuse weights with NaN or infinity, before anything is paused. It reads all
            weights once.
        lost_engines: what to do when a server dies in a push: ``"raise"`` at once; ``"drop"`` it,
            report it, and push to the others; or ``"restart"`` it, which only the process that
            started it can, and push to all. Over NCCL its death leaves the others stuck in a
            broadcast. Those, if this process started them, are started again in the last two, and
            in the next push after the first.
        non_blocking: a push returns once it has its own copy of the weights; the next one, and
            ``wait()``, wait for its end.
        adapter_name: with ``"lora"``, what requests call the adapter.
    """

    method: SyncMethod = "auto"
    folder: str | None = None
    translate: Callable[[Mapping[str, Any]], Any] | None = None
    pause_mode: PauseMode = "retract"
    bucket_bytes: int = 2 << 30
    layout: SyncLayout = "auto"
    verify: Verify = "always"
    verify_method: VerifyMethod = "auto"
    probe_tolerance: float = 0.05
    flush_cache: bool | None = None
    check_finite: bool = True
    lost_engines: LostEngines = "raise"
    non_blocking: bool = False
    adapter_name: str = "policy"

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value, known = getattr(self, name), get_args(choices)
            _require(value in known, f"{name} must be one of {known}, got {value!r}.")
        _require(
            self.probe_tolerance >= 0,
            f"probe_tolerance must be a number >= 0, got {self.probe_tolerance!r}.",
        )
        _require(
            is_count(self.bucket_bytes),
            f"bucket_bytes must be an integer >= 1, got {self.bucket_bytes!r}.",
        )
        _require(
            not (self.pause_mode == "in_place" and self.flush_cache),
            "flush_cache=True with pause_mode='in_place': servers don't flush while requests are "
            "frozen; leave flush_cache out, or use pause_mode='retract'.",
        )
        self._check_lora()

    def _check_lora(self) -> None:
        name, lora = self.adapter_name, self.method == "lora"
        _require(
            isinstance(name, str) and bool(name) and "@" not in name,
            "adapter_name must be a string that is not empty and has no '@', which sets a version "
            f"apart, got {name!r}.",
        )
        _require(
            not (lora and self.lost_engines == "restart"),
            "lost_engines='restart' with method='lora': such a push has no base weights to give to "
            "a server that was started again; use 'raise' or 'drop'.",
        )
        _require(
            not (lora and self.non_blocking),
            "non_blocking=True with method='lora': such a push holds no request back, and copies "
            "the adapter before it sends; leave non_blocking out.",
        )
        _require(
            not (lora and self.verify_method == "checksum"),
            "verify_method='checksum' with method='lora': servers have no checksums of adapters; "
            "use 'auto' or 'probe'.",
        )

    @property
    def flushes(self) -> bool:
        """Whether prefix caches are emptied."""
        return self.pause_mode != "in_place" if self.flush_cache is None else self.flush_cache


_CHOICES = {
    "method": SyncMethod,
    "pause_mode": PauseMode,
    "layout": SyncLayout,
    "verify": Verify,
    "verify_method": VerifyMethod,
    "lost_engines": LostEngines,
}
