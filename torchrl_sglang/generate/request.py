"""Defines requests to ``/generate``, and their bodies. Needs only the standard library."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import ConfigError, EmptyPromptError, InputError, UnsupportedOptionError
from .sampling import SamplingParams, is_text, plain


def new_rid() -> str:
    """A request id that no other request has."""
    return uuid.uuid4().hex


@dataclass(frozen=True, kw_only=True)
class Returns:
    """What a completion brings back beside its tokens.

    Attributes:
        input_log_probs: the log-prob of every prompt token but the first, at temperature 1.
        top_log_probs: the so many most likely tokens of each position, with log-probs.
        sampling_mask: the ids that survived top-k, top-p and min-p at each position, and the
            log-prob of the sampled one among them.
        hidden_states: the last layer's hidden states.
        routed_experts: the experts of a mixture-of-experts model.
    """

    input_log_probs: bool = False
    top_log_probs: int = 0
    sampling_mask: bool = False
    hidden_states: bool = False
    routed_experts: bool = False

    def body(self) -> dict[str, Any]:
        """Fields of SGLang's ``/generate``; what is not asked for is left out."""
        body: dict[str, Any] = {}
        if self.input_log_probs:
            body["logprob_start_len"] = 0
        if self.top_log_probs:
            body["top_logprobs_num"] = self.top_log_probs
        for name in ("sampling_mask", "hidden_states", "routed_experts"):
            if getattr(self, name):
                body[f"return_{name}"] = True
        return body


@dataclass(frozen=True, kw_only=True)
class Media:
    """Images, videos and audio of one prompt: URLs, file names or base64 data.

    Attributes:
        images, videos, audios: in the order of their placeholders in the prompt.
    """

    images: tuple[str, ...] = ()
    videos: tuple[str, ...] = ()
    audios: tuple[str, ...] = ()

    def body(self) -> dict[str, Any]:
        """Fields of SGLang's ``/generate``."""
        fields = {
            "image_data": self.images,
            "video_data": self.videos,
            "audio_data": self.audios,
        }
        return {name: list(values) for name, values in fields.items() if values}


@dataclass(frozen=True, kw_only=True)
class LogitProcessor:
    """A change to the logits that the server makes before it samples.

    Attributes:
        serialized: the class, as SGLang's ``custom_logit_processor`` takes it.
        params: its parameters, as SGLang's ``custom_params``.
    """

    serialized: str
    params: Mapping[str, Any] = field(default_factory=dict)

    def after(self, num_tokens: int) -> LogitProcessor:
        """The processor for a request whose prompt ends with ``num_tokens`` that this one sampled.

        Raises:
            UnsupportedOptionError: nothing is known of it, and it may look at the tokens so far.
        """
        if num_tokens == 0:
            return self
        raise UnsupportedOptionError(
            f"a completion with a processor was aborted after {num_tokens} tokens: it can't go on "
            "from there, since the processor may look at the tokens so far and would begin again. "
            "Generate it anew, or make the processor with this library."
        )


@dataclass(frozen=True, kw_only=True)
class SessionTurn:
    """A request's place in a session that a server holds.

    Attributes:
        session_id: the session.
        worker_url: the server that holds it.
        after: id of the request that this one continues; None starts the session.
        before: token ids that the session holds, which the server puts before the request's.
        branches: it goes on from an earlier request than the last one.
    """

    session_id: str
    worker_url: str
    after: str | None = None
    before: tuple[int, ...] = field(default=(), repr=False)
    branches: bool = False


@dataclass(frozen=True, kw_only=True)
class GenerateRequest:
    """One prompt on its way to a server.

    Attributes:
        input_ids: the prompt as token ids; or
        text: the prompt as text, which the server tokenises itself (it may add a BOS).
        sampling: how to sample; ``sampling.n`` completions come back.
        return_log_probs: ask for the log-prob of every sampled token.
        returns: what else to ask for.
        processor: a change to the logits.
        lora: name of a loaded LoRA adapter; of one that is pushed, its newest version is meant.
        adapter_version: the version that this turned out to be; set when it is sent.
        media: images, videos and audio.
        session: its place in a session.
        scoring: only log-probs of the prompt, no token is generated.
        partial_allowed: an aborted request returns what it had instead of raising.
        fit_context: ask for what fits into the context where ``max_new_tokens`` does not, which
            then ends with ``"length"``, instead of raising.
        rid: request id, unique per attempt.

    Raises:
        InputError: a prompt that is neither text nor token ids, or empty.
        ConfigError: a field that is of another type, or contradicts another one.
    """

    input_ids: tuple[int, ...] | None = None
    text: str | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    return_log_probs: bool = True
    returns: Returns = field(default_factory=Returns)
    processor: LogitProcessor | None = None
    lora: str | None = None
    adapter_version: int | None = None
    media: Media | None = None
    session: SessionTurn | None = None
    scoring: bool = False
    partial_allowed: bool = False
    fit_context: bool = True
    rid: str = field(default_factory=new_rid)

    def __post_init__(self) -> None:
        if (self.input_ids is None) == (self.text is None):
            raise ConfigError("a GenerateRequest takes exactly one of input_ids and text.")
        object.__setattr__(self, "sampling", SamplingParams.of(self.sampling))
        for name, kind in _FIELD_TYPES.items():
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                raise ConfigError(f"{name}={value!r:.100}: must be a {kind.__name__}.")
        if not self.rid:
            raise ConfigError("rid is empty: leave it out, or give an id that no other one has.")
        if self.input_ids is not None:
            object.__setattr__(self, "input_ids", _token_ids(self.input_ids))
        elif not is_text(self.text):
            raise InputError(f"a text is a string of Unicode characters, got {self.text!r:.200}.")
        if not (self.input_ids or self.text):
            raise EmptyPromptError("a prompt is empty: it needs at least one token.")
        if self.scoring and not self.returns.input_log_probs:
            object.__setattr__(self, "returns", replace(self.returns, input_log_probs=True))
        if self.num_samples > 1 and self.session is not None:
            raise ConfigError("a session goes on from one sample: n must be 1 in a session.")

    @property
    def num_samples(self) -> int:
        """Completions that come back."""
        return 1 if self.scoring else self.sampling.n

    @property
    def asks_log_probs(self) -> bool:
        """Whether any log-prob comes back; the server then sends those of sampled tokens too."""
        returns = self.returns
        return self.return_log_probs or returns.input_log_probs or returns.top_log_probs > 0

    def body(self, cache_salt: str | None = None) -> dict[str, Any]:
        """The JSON object for ``/generate``.

        Args:
            cache_salt: prefixes cached under another salt are not reused; None sends no salt.
        """
        sampling = self.sampling.body()
        body: dict[str, Any] = {
            "rid": self.rid,
            "return_logprob": self.asks_log_probs,
            "stream": False,
            **self.returns.body(),
        }
        if self.scoring:
            sampling = {"max_new_tokens": 0, "temperature": 1.0}
        if self.input_ids is not None:
            body["input_ids"] = self.input_ids
        else:
            body["text"] = self.text
        if cache_salt is not None:
            body["extra_key"] = cache_salt
        if self.processor is not None:
            body["custom_logit_processor"] = self.processor.serialized
            sampling["custom_params"] = dict(self.processor.params)
        if self.lora is not None:
            body["lora_path"] = self.lora
        if self.media is not None:
            body |= self.media.body()
        if self.session is not None:
            body["session_params"] = {"id": self.session.session_id, "rid": self.session.after}
        body["sampling_params"] = sampling
        return body

    def bodies(self, seeded: bool, cache_salt: str | None = None) -> dict[str, Any]:
        """The JSON object for all ``sampling.n`` completions of this prompt.

        The server's own ``n`` computes the prompt once. Its samples share one seed, which makes
        them identical on a server that samples deterministically, and it fails where sampling masks
        are asked for: there each sample gets a request of its own in one batch.

        Args:
            seeded: give each sample an id and a seed of its own; the server gives all the same.
            cache_salt: as in `body`.
        """
        body = self.body(cache_salt)
        count = self.num_samples
        if count == 1:
            if seeded and not self.scoring:
                body["sampling_params"]["sampling_seed"] = self.seeds()[0]
            return body
        if not (seeded or self.returns.sampling_mask):
            for name in ("image_data", "video_data", "audio_data"):
                if name in body:  # else SGLang takes them for those of several prompts
                    body[name] = [body[name]]
            return body
        for name in _PER_REQUEST & body.keys():
            body[name] = [body[name]] * count
        shared = {k: v for k, v in body["sampling_params"][0].items() if k != "n"}
        body["sampling_params"] = [{**shared, "sampling_seed": seed} for seed in self.seeds()]
        body["rid"] = self.sample_rids()
        return body

    def seeds(self) -> list[int]:
        """A seed for each sample; from the request's id where the user gave none."""
        first = self.sampling.sampling_seed
        if first is None:
            first = uuid.uuid5(uuid.NAMESPACE_OID, self.rid).int % 2**31
        return [first + index for index in range(self.sampling.n)]

    def sample_rids(self) -> list[str]:
        """Request ids of the samples, where each has its own."""
        return [f"{self.rid}-s{index}" for index in range(self.sampling.n)]


def _token_ids(given: Any) -> tuple[int, ...]:
    """Ids as Python's own integers.

    Raises:
        InputError: it is no sequence of integers.
    """
    given = plain(given)
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Iterable):
        raise InputError(f"token ids are a sequence of integers, got {given!r:.100}.")
    ids = tuple(given)
    if not set(map(type, ids)) <= {int}:
        ids = tuple(plain(each) for each in ids)
        for position, each in enumerate(ids):
            if type(each) is not int:  # True is an int, and a mask no prompt
                raise InputError(f"token ids are integers, got {each!r:.100} at {position}.")
    return ids


# Types of fields that may be None, or are made by this library.
_FIELD_TYPES: dict[str, type] = {
    "returns": Returns,
    "processor": LogitProcessor,
    "lora": str,
    "media": Media,
    "session": SessionTurn,
    "rid": str,
}

# What sglang-router 0.3.2 leaves out in silence of the requests that it passes on, and, of a batch,
# what it refuses (a list of ids). Such requests go to a server itself.
ROUTER_DROPS = frozenset(
    {
        "return_sampling_mask",
        "sampling_logprobs_mode",
        "return_routed_experts",
        "custom_logit_processor",  # passes, but its parameters do not
    }
)
ROUTER_DROPS_OF_SAMPLING = frozenset(
    {
        "custom_params",
        "logit_bias",
        "structural_tag",
        "stop_regex",
        "spaces_between_special_tokens",
    }
)


def passes_router(body: Mapping[str, Any]) -> bool:
    """Whether a router passes the whole of a request on."""
    sampling = body["sampling_params"]
    return not (
        ROUTER_DROPS & body.keys()
        or isinstance(sampling, list)
        or ROUTER_DROPS_OF_SAMPLING & sampling.keys()
    )


# Fields that a batch in one request gives as lists.
_PER_REQUEST = frozenset(
    {
        "input_ids",
        "text",
        "sampling_params",
        "return_logprob",
        "logprob_start_len",
        "top_logprobs_num",
        "return_sampling_mask",
        "return_hidden_states",
        "lora_path",
        "custom_logit_processor",
        "extra_key",
        "image_data",
        "video_data",
        "audio_data",
    }
)


def to_requests(
    prompts: Any,
    sampling_params: SamplingParams | Mapping[str, Any] | None,
    options: Mapping[str, Any] | None = None,
    *,
    input_ids: Any = None,
    fit_context: bool = True,
) -> tuple[list[GenerateRequest], bool]:
    """The requests, and whether a single prompt was given.

    Args:
        prompts: text, token ids, a `GenerateRequest`, or a sequence of any of these.
        sampling_params: how to sample; not with a `GenerateRequest`.
        options: sampling options, laid over ``sampling_params``.
        input_ids: token ids, or a sequence of such, instead of ``prompts``.
        fit_context: of the requests; False also for a `GenerateRequest`.

    Raises:
        InputError: something that is none of these, or both of them.
        ConfigError: sampling parameters beside a request that brings its own.
    """
    if (prompts is None) == (input_ids is None):
        raise InputError("give prompts or input_ids: one of the two.")
    prompts = plain(input_ids if prompts is None else prompts)
    single = isinstance(prompts, str | GenerateRequest) or _is_ids(prompts)
    if not single and (isinstance(prompts, Mapping | bytes) or not isinstance(prompts, Iterable)):
        raise InputError(
            f"prompts are text, token ids, GenerateRequests or a sequence of these, "
            f"got {prompts!r:.100}."
        )
    sampling = None
    if sampling_params is not None or options:
        sampling = SamplingParams.of(sampling_params).updated(options or {})
    items = [prompts] if single else list(prompts)
    requests = [_to_request(item, sampling) for item in items]
    if not fit_context:
        requests = [replace(request, fit_context=False) for request in requests]
    return requests, single


def requests_of(batch: Any) -> list[GenerateRequest]:
    """A batch that holds nothing but requests.

    Raises:
        InputError: it is none, or holds something else.
    """
    if isinstance(batch, GenerateRequest | str | bytes) or not isinstance(batch, Iterable):
        raise InputError(f"a batch is a sequence of GenerateRequests, got {batch!r:.100}.")
    requests = list(batch)
    for index, request in enumerate(requests):
        if not isinstance(request, GenerateRequest):
            raise InputError(
                f"item {index} of the batch is no GenerateRequest but {request!r:.100}: "
                "`generate` takes texts and token ids too."
            )
    return requests


def _is_ids(value: Any) -> bool:
    """Whether it is one prompt of ids, right or wrong, rather than a sequence of prompts."""
    return isinstance(value, Sequence) and len(value) > 0 and isinstance(plain(value[0]), int)


def _to_request(item: Any, sampling: SamplingParams | None) -> GenerateRequest:
    if isinstance(item, GenerateRequest):
        if sampling is not None:
            raise ConfigError("a GenerateRequest has its own sampling: leave sampling_params out.")
        return item
    sampling = sampling or SamplingParams()
    if isinstance(item, str):
        return GenerateRequest(text=item, sampling=sampling)
    item = plain(item)
    if not isinstance(item, Sequence) or isinstance(item, bytes):
        raise InputError(
            f"a prompt is text, token ids (integers >= 0) or a GenerateRequest, got {item!r:.100}."
        )
    request = GenerateRequest(input_ids=tuple(item), sampling=sampling)
    if min(request.input_ids or (0,)) < 0:
        raise InputError(f"a prompt's token ids are integers >= 0, got {item!r:.100}.")
    return request
