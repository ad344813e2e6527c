"""Parses what servers and routers say of themselves. Needs only the standard library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConnectError, UnsupportedOptionError

INITIAL_VERSION = "default"  # what a server calls the weights that it loaded itself


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What a server can do, read from its list of routes rather than from its version.

    Attributes:
        update_session: updates go between ``begin_weight_update`` and ``end_weight_update``.
        checksum: the server hashes its own weights.
        cache_salt: requests take an ``extra_key`` that separates cached prefixes.
        adapter_tensors: it loads a LoRA adapter from the request itself, not only from a folder.
    """

    update_session: bool
    checksum: bool
    cache_salt: bool
    adapter_tensors: bool = False


def parse_capabilities(openapi: Mapping[str, Any]) -> Capabilities:
    """Reads a server's ``/openapi.json``."""
    routes = set(openapi.get("paths", ()))
    if not {"/generate", "/pause_generation"} <= routes:
        raise ConnectError(
            "the server has no /generate and /pause_generation: it is no SGLang server, or older "
            "than 0.5.10."
        )
    return Capabilities(
        update_session={"/begin_weight_update", "/end_weight_update"} <= routes,
        checksum="/weights_checker" in routes,
        cache_salt="extra_key" in request_fields(openapi),
        adapter_tensors="/load_lora_adapter_from_tensors" in routes,
    )


def request_fields(openapi: Mapping[str, Any]) -> frozenset[str]:
    """Fields of a request to ``/generate``, read from a server's ``/openapi.json``."""
    schemas = openapi.get("components", {}).get("schemas", {})
    return frozenset(schemas.get("GenerateReqInput", {}).get("properties", {}))


# SGLang's own default of --sampling-mask-max-tokens.
DEFAULT_MASK_TOKENS = 4096


@dataclass(frozen=True, kw_only=True)
class Features:
    """What a server was started with, as far as requests depend on it.

    Attributes:
        tokenizer: it has one: text, stop strings and grammars work.
        deterministic: requests with one seed come out identical.
        sampling_mask_tokens: most ids of a sampling mask; 0 where the server has none.
        hidden_states: it returns hidden states.
        routed_experts: it returns the experts of a mixture of experts.
        processors: it runs custom logit processors.
        lora: it runs LoRA adapters.
        max_adapters: how many it holds at once; None: any number.
        sessions: it holds sessions.
        images, audio: the model understands them.
        eos_ids: ids at which a row ends by itself; None where nothing tells.
    """

    tokenizer: bool = True
    deterministic: bool = False
    sampling_mask_tokens: int = 0
    hidden_states: bool = False
    routed_experts: bool = False
    processors: bool = False
    lora: bool = False
    max_adapters: int | None = None
    sessions: bool = False
    images: bool = False
    audio: bool = False
    eos_ids: tuple[int, ...] | None = None

    def check_openai(self) -> None:
        """Raises `UnsupportedOptionError` where chats and texts can't be served."""
        if not self.tokenizer:
            raise UnsupportedOptionError(OPENAI)


OPENAI = (
    "chats and texts of OpenAI's clients need the servers' tokenizer, which these run without "
    "(skip_tokenizer_init): start them with it, or generate from ids, with service.generate or "
    "SGLangWrapper, which has a tokenizer of its own."
)


def parse_features(
    server_info: Mapping[str, Any],
    model_info: Mapping[str, Any],
    *,
    fields: frozenset[str],
    routes: frozenset[str],
) -> Features:
    """Reads ``/server_info`` and ``/model_info``.

    Args:
        server_info: how the server was started.
        model_info: what it serves.
        fields: of its ``/generate``; empty where it does not list them.
        routes: that it has.
    """
    has_mask = "return_sampling_mask" in fields
    mask_tokens = server_info.get("sampling_mask_max_tokens") or DEFAULT_MASK_TOKENS
    return Features(
        tokenizer=not server_info.get("skip_tokenizer_init"),
        deterministic=bool(
            server_info.get("enable_deterministic_inference")
            or server_info.get("rl_on_policy_target")
        ),
        sampling_mask_tokens=mask_tokens if has_mask else 0,
        # SGLang before 0.5.17, which has no masks either, cuts a batch's states by whole prompts,
        # as if no prefix of them had been cached.
        hidden_states=bool(server_info.get("enable_return_hidden_states"))
        and (has_mask or bool(server_info.get("disable_radix_cache"))),
        routed_experts=bool(server_info.get("enable_return_routed_experts")),
        processors=bool(server_info.get("enable_custom_logit_processor")),
        lora=bool(server_info.get("enable_lora")),
        max_adapters=server_info.get("max_loaded_loras"),
        sessions="/open_session" in routes,
        images=bool(model_info.get("has_image_understanding")),
        audio=bool(model_info.get("has_audio_understanding")),
    )


@dataclass(frozen=True, kw_only=True)
class WorkerInfo:
    """What one server says of itself.

    Attributes:
        url: where its control routes are.
        model_path: folder or hub name of the model, as the server was started with it.
        tokenizer_path: the same for its tokenizer.
        model_type: the ``model_type`` of the model's config; None if the server does not say.
        dtype: ``"auto"`` (the config's own) or a torch name such as ``"bfloat16"``.
        device: ``"cpu"``, ``"cuda"``, ...
        tp_size, dp_size, pp_size, ep_size: its ranks; the last adds none.
        dp_attention: data parallelism happens inside the TP ranks.
        max_input_len: what a prompt has to be shorter than; None if it does not say.
        weight_version: version of the weights that it runs.
        version: SGLang's version.
        capabilities: what it can do for weight updates.
        features: what it can do for generation.
        vocab_size: ids in its vocabulary; None where nothing tells.
        quantization: how its weights are quantised; None if they aren't.
        gpus: numbers of its GPUs, as it counts them; empty on a CPU.
    """

    url: str
    model_path: str
    tokenizer_path: str
    model_type: str | None
    dtype: str
    device: str
    tp_size: int
    dp_size: int
    pp_size: int
    dp_attention: bool
    max_input_len: int | None
    weight_version: str
    version: str
    capabilities: Capabilities
    features: Features = field(default_factory=Features)
    vocab_size: int | None = None
    quantization: str | None = None
    ep_size: int = 1
    gpus: tuple[int, ...] = ()

    @property
    def num_copies(self) -> int:
        """Data-parallel replicas within the server, each of which holds all weights."""
        return 1 if self.dp_attention else self.dp_size


def parse_worker_info(
    url: str,
    server_info: Mapping[str, Any],
    model_info: Mapping[str, Any],
    openapi: Mapping[str, Any],
) -> WorkerInfo:
    """Reads ``/server_info``, ``/model_info`` and ``/openapi.json`` of one server."""
    try:
        return WorkerInfo(
            url=url,
            # As it was started. After a load from files the other one names their folder.
            model_path=server_info.get("model_path") or model_info["model_path"],
            tokenizer_path=model_info.get("tokenizer_path") or model_info["model_path"],
            model_type=model_info.get("model_type"),
            dtype=server_info.get("dtype", "auto"),
            device=server_info.get("device") or "cuda",
            tp_size=int(server_info["tp_size"]),
            dp_size=int(server_info["dp_size"]),
            pp_size=int(server_info.get("pp_size", 1)),
            dp_attention=bool(server_info.get("enable_dp_attention", False)),
            max_input_len=server_info.get("max_req_input_len"),
            weight_version=str(model_info.get("weight_version", INITIAL_VERSION)),
            version=str(server_info.get("version", "unknown")),
            quantization=server_info.get("quantization"),
            ep_size=int(server_info.get("ep_size") or 1),
            gpus=_gpus(server_info),
            capabilities=parse_capabilities(openapi),
            features=parse_features(
                server_info,
                model_info,
                fields=request_fields(openapi),
                routes=frozenset(openapi.get("paths", ())),
            ),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConnectError(
            f"{url} answers, but not as an SGLang server that this library knows "
            f"({type(error).__name__}: {error}). Supported: SGLang 0.5.10 and later."
        ) from error


def _gpus(server_info: Mapping[str, Any]) -> tuple[int, ...]:
    if server_info.get("device") == "cpu":
        return ()
    first, step = int(server_info.get("base_gpu_id") or 0), int(server_info.get("gpu_id_step") or 1)
    count = int(server_info["tp_size"]) * int(server_info.get("pp_size", 1))
    if not server_info.get("enable_dp_attention"):
        count *= int(server_info["dp_size"])
    return tuple(first + step * index for index in range(count))


def parse_worker_urls(answer: object) -> list[str] | None:
    """Worker URLs from a router's ``GET /workers``; None if the answer is not a router's."""
    workers = answer.get("workers") if isinstance(answer, Mapping) else None
    if not isinstance(workers, list):
        return None
    if not all(isinstance(server, Mapping) and "url" in server for server in workers):
        return None
    return [str(server["url"]).rstrip("/") for server in workers]
