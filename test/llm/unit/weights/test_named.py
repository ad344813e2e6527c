"""From whatever a trainer holds to the served model's names."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tensordict import TensorDict
from tiny_model import make_model, make_tokenizer
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from torchrl.modules.llm import TransformersWrapper
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2ForCausalLM

from torchrl_sglang import get_model_metadata
from torchrl_sglang.errors import WeightsError
from torchrl_sglang.weights.source.expected import Expected, expected_model, expected_parameters
from torchrl_sglang.weights.source.named import matched, named_weights, shown, unwrap

TOKENIZER = make_tokenizer(vocab_size=300)

COMPILE = functools.partial(torch.compile, backend="eager")  # the default one warns on import

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_layers": 2}

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def qwen2(*, tied: bool, seed: int = 0) -> Any:
    model = make_model(TOKENIZER, seed=seed, num_heads=2, num_kv_heads=1, **SIZES)
    if tied:
        return model
    model.config.tie_word_embeddings = False
    model.lm_head = nn.Linear(32, len(TOKENIZER), bias=False, dtype=torch.bfloat16)
    return model


def llama(*, tied: bool, seed: int = 0) -> Any:
    config = LlamaConfig(
        vocab_size=len(TOKENIZER),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).to(torch.bfloat16)


MODELS = {
    f"{make.__name__}-{'tied' if tied else 'untied'}": make(tied=tied)
    for make in (qwen2, llama)
    for tied in (True, False)
}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The folder of each model, as the servers have it."""
    made = {}
    for name, model in MODELS.items():
        made[id(model)] = folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
    return made


@pytest.fixture
def served(model: Any, folders: dict[int, Path]) -> Expected:
    return expected_model(str(folders[id(model)]))


@pytest.fixture
def tied_model() -> Any:
    return MODELS["qwen2-tied"]


@pytest.fixture
def tied_served(folders: dict[int, Path], tied_model: Any) -> Expected:
    return expected_model(str(folders[id(tied_model)]))


class Wrapper(nn.Module):
    """What DDP and ``torch.compile`` are, as far as names go."""

    def __init__(self, **inner: nn.Module) -> None:
        super().__init__()
        for name, module in inner.items():
            setattr(self, name, module)


def prefixed(model: Any, *prefixes: str) -> dict[str, torch.Tensor]:
    return {"".join(prefixes) + name: tensor for name, tensor in model.state_dict().items()}


def transformers_wrapper(model: Any) -> TransformersWrapper:
    return TransformersWrapper(
        model, tokenizer=TOKENIZER, input_mode="tokens", generate=False, return_log_probs=True
    )


SOURCES = {
    "module": lambda m: m,
    "state dict": lambda m: m.state_dict(),
    "parameters": lambda m: dict(m.named_parameters()),
    "TensorDict": TensorDict.from_module,
    "nested TensorDict": lambda m: TensorDict.from_module(m).unflatten_keys("."),
    "detached TensorDict": lambda m: TensorDict.from_module(m).data,
    "TransformersWrapper": transformers_wrapper,
    "TensorDict of a TransformersWrapper": lambda m: TensorDict.from_module(
        transformers_wrapper(m)
    ),
    "state dict of a TransformersWrapper": lambda m: transformers_wrapper(m).state_dict(),
    "DDP": lambda m: Wrapper(module=m),
    "torch.compile": COMPILE,
    "DDP of torch.compile": lambda m: Wrapper(module=COMPILE(m)),
    "torch.compile of DDP": lambda m: COMPILE(Wrapper(module=m)),
    "DDP of a TransformersWrapper": lambda m: Wrapper(module=transformers_wrapper(m)),
    "state dict of DDP": lambda m: prefixed(m, "module."),
    "state dict of torch.compile": lambda m: COMPILE(m).state_dict(),
    "state dict of DDP of torch.compile": lambda m: prefixed(m, "module.", "_orig_mod."),
    "state dict of torch.compile of DDP": lambda m: prefixed(m, "_orig_mod.", "module."),
    "state dict of FSDP": lambda m: prefixed(m, "_fsdp_wrapped_module."),
}


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_gives_the_served_models_parameters(
    model: Any, served: Expected, source: str
) -> None:
    weights = matched(named_weights(SOURCES[source](model)), served)
    parameters = dict(model.named_parameters())  # tied ones once
    assert weights.keys() == served.parameters.keys() == parameters.keys()
    for name, tensor in weights.items():
        assert tensor.data_ptr() == parameters[name].data_ptr()  # nothing is copied
        assert torch.equal(tensor, parameters[name])


def test_compiled_layers_inside_a_model(tied_model: Any, tied_served: Expected) -> None:
    weights = {
        name.replace("layers.0.", "layers.0._orig_mod._checkpoint_wrapped_module."): tensor
        for name, tensor in tied_model.state_dict().items()
    }
    assert matched(named_weights(weights), tied_served).keys() == tied_served.parameters.keys()


def test_what_the_served_model_is(model: Any, served: Expected) -> None:
    is_tied = model.config.tie_word_embeddings
    assert served.tied == ({HEAD: EMBEDDING} if is_tied else {})
    assert (HEAD in served.parameters) is not is_tied
    assert served.dtype is torch.bfloat16
    assert expected_parameters(served.model_path) == served.parameters
    for name, parameter in model.named_parameters():
        assert served.parameters[name][1] == parameter.shape


# Tied weights


def test_tied_weights_are_taken_once(tied_model: Any) -> None:
    assert {HEAD, EMBEDDING} <= set(tied_model.state_dict())
    weights = named_weights(tied_model)
    assert (EMBEDDING in weights, HEAD in weights) == (True, False)
    assert len(weights) == len(list(tied_model.parameters()))


def test_equal_values_are_not_tied() -> None:
    one = torch.ones(2)
    assert named_weights({"a": one, "b": one.clone()}).keys() == {"a", "b"}


def test_parts_of_one_memory_are_not_tied() -> None:
    whole = torch.zeros(4, 4)
    parts = {"whole": whole, "rows": whole[:2], "same": whole.view(4, 4), "turned": whole.t()}
    assert named_weights(parts).keys() == {"whole", "rows", "turned"}


def test_a_copy_of_a_tied_weight_is_left_out(tied_model: Any, tied_served: Expected) -> None:
    copied = {name: tensor.clone() for name, tensor in tied_model.state_dict().items()}
    assert HEAD in named_weights(copied)
    assert HEAD not in matched(named_weights(copied), tied_served)


def test_a_head_of_its_own_can_not_go_into_a_tied_model(
    tied_model: Any, tied_served: Expected
) -> None:
    untied = {name: tensor.clone() for name, tensor in tied_model.state_dict().items()}
    untied[HEAD] += 1.0  # the trainer trains it; the servers would never see it
    with pytest.raises(WeightsError, match=HEAD):
        matched(named_weights(untied), tied_served)


# What is refused


def test_no_weights() -> None:
    with pytest.raises(WeightsError, match="register_model"):
        named_weights(None)


@pytest.mark.parametrize("source", [[], "weights.pt", 3, Path("x"), torch.ones(2)], ids=repr)
def test_what_holds_no_weights(source: Any) -> None:
    with pytest.raises(WeightsError, match=f"can't take weights from a {type(source).__name__}"):
        named_weights(source)


@pytest.mark.parametrize("source", [{}, nn.Identity(), TensorDict()], ids=["dict", "module", "td"])
def test_empty(source: Any) -> None:
    with pytest.raises(WeightsError, match="the weights are empty"):
        named_weights(source)


@pytest.mark.parametrize("value", [None, 1.0, [1.0], {"b": 1}], ids=repr)
def test_entries_that_are_no_tensors(value: Any) -> None:
    with pytest.raises(WeightsError, match="these entries are no tensors: bad"):
        named_weights({"good": torch.ones(1), "bad": value})


NORM = "model.norm.weight"


def broken(model: Any, name: str, tensor: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """The state dict with one entry changed, or left out."""
    weights = {**model.state_dict(), name: tensor}
    return {name: value for name, value in weights.items() if value is not None}


@pytest.mark.parametrize(
    ("name", "tensor", "says"),
    [
        ("model.typo.weight", torch.ones(32), "1 name is not of .*: model.typo.weight. It has"),
        (NORM, None, f"of 26 parameters of .*, 1 is missing: {NORM}. A push takes the whole"),
        (NORM, torch.ones(33), rf"{NORM} has shape \(33,\); .* has \(32,\): is it the same model"),
        (NORM, torch.ones(1, 32), rf"{NORM} has shape \(1, 32\)"),
        (NORM, torch.ones(32, dtype=torch.int64), f"{NORM} has dtype torch.int64"),
        (NORM, torch.ones(32, dtype=torch.bool), f"{NORM} has dtype torch.bool"),
        (NORM, torch.ones(32, dtype=torch.complex64), f"{NORM} has dtype torch.complex64"),
        (NORM, torch.ones(32).to(torch.float8_e4m3fn), f"{NORM} has dtype torch.float8"),
        (NORM, torch.ones(32, device="meta"), f"{NORM} is on the meta device"),
    ],
    ids=["name", "missing", "shape", "ndim", "int", "bool", "complex", "float8", "meta"],
)
def test_one_wrong_entry(
    tied_model: Any, tied_served: Expected, name: str, tensor: torch.Tensor | None, says: str
) -> None:
    with pytest.raises(WeightsError, match=says):
        matched(named_weights(broken(tied_model, name, tensor)), tied_served)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_that_can_be_cast(
    tied_model: Any, tied_served: Expected, dtype: torch.dtype
) -> None:
    weights = broken(tied_model, NORM, torch.ones(32, dtype=dtype))
    assert matched(named_weights(weights), tied_served)[NORM].dtype is dtype


def test_a_model_of_another_size(tied_served: Expected) -> None:
    other = make_model(TOKENIZER, num_heads=2, num_kv_heads=1, **{**SIZES, "hidden_size": 64})
    with pytest.raises(WeightsError, match="is it the same model"):
        matched(named_weights(other), tied_served)


def test_a_model_of_another_depth(tied_served: Expected) -> None:
    deep = make_model(TOKENIZER, num_heads=2, num_kv_heads=1, **{**SIZES, "num_layers": 3})
    flat = make_model(TOKENIZER, num_heads=2, num_kv_heads=1, **{**SIZES, "num_layers": 1})
    with pytest.raises(WeightsError, match=r"names are not of .*model\.layers\.2\."):
        matched(named_weights(deep), tied_served)
    with pytest.raises(WeightsError, match=r"are missing: model\.layers\.1\."):
        matched(named_weights(flat), tied_served)


def test_a_model_of_another_kind(tied_served: Expected) -> None:
    with pytest.raises(
        WeightsError, match=r"2 names are not of .*: weight, bias\. It has names like"
    ):
        matched(named_weights(nn.Linear(2, 2)), tied_served)


def test_a_model_without_values(tied_model: Any, tied_served: Expected) -> None:
    with torch.device("meta"):
        empty = Qwen2ForCausalLM(tied_model.config)
    with pytest.raises(WeightsError, match="meta device"):
        matched(named_weights(empty), tied_served)


def test_the_whole_model_or_nothing(tied_model: Any, tied_served: Expected) -> None:
    with pytest.raises(WeightsError, match=r"of 26 parameters of .* 26 are missing"):
        matched({}, tied_served)
    body = named_weights(tied_model.model)  # without the head, whose names lack `model.`
    with pytest.raises(WeightsError, match="names are not of"):
        matched(body, tied_served)


def test_a_served_model_whose_config_is_not_here(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(WeightsError, match=r"can't be loaded here[\s\S]*model_path="):
            expected_model(str(path))


# Small things


@pytest.fixture
def alone() -> Iterator[None]:
    """A trainer's process group of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_real_ddp(tied_model: Any, tied_served: Expected, alone: None) -> None:
    wrapped = DistributedDataParallel(tied_model)
    for source in (wrapped, wrapped.state_dict(), COMPILE(wrapped)):
        found = matched(named_weights(source), tied_served)
        assert found.keys() == tied_served.parameters.keys()
        assert all(torch.equal(found[n], tied_model.get_parameter(n)) for n in found)


def test_fsdp1_is_refused(tied_model: Any, alone: None) -> None:
    """Reading its state dict on rank 0 alone would wait for the others for ever."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no GPU, that FSDP2 is newer, ...
        wrapped = FullyShardedDataParallel(copy.deepcopy(tied_model), device_id="cpu")
    for source in (wrapped, nn.ModuleDict({"module": wrapped})):
        with pytest.raises(WeightsError, match="assist_push"):
            named_weights(source)
        with pytest.raises(WeightsError, match="assist_push"):
            get_model_metadata(source)


def test_unwrap_stops_at_the_model(tied_model: Any) -> None:
    for wrap in ("module", "TransformersWrapper", "DDP", "torch.compile", "torch.compile of DDP"):
        assert unwrap(SOURCES[wrap](tied_model)) is tied_model
    other = nn.Linear(2, 2)
    assert unwrap(other) is other


@pytest.mark.parametrize(
    ("count", "expected"),
    [(0, ""), (1, "a"), (5, "a, b, c, d, e"), (8, "a, b, c, d, e and 3 more")],
)
def test_shown(count: int, expected: str) -> None:
    assert shown(list("abcdefgh")[:count]) == expected
