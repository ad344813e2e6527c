"""What is made of the servers' checksums: proof, refusal, or neither."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers.proofs import Config, make, worker
from torchrl_sglang.errors import VerificationError
from torchrl_sglang.servers.info import WorkerInfo
from torchrl_sglang.weights.layout import EMBEDDING, Heads, Rank
from torchrl_sglang.weights.source.expected import Dtypes
from torchrl_sglang.weights.verify import proof as proof_module
from torchrl_sglang.weights.verify.checksums import RankChecksums, expected_checksums
from torchrl_sglang.weights.verify.proof import ChecksumProof

ATTENTION, MLP = "model.layers.0.self_attn.", "model.layers.0.mlp."

SERVED = [
    EMBEDDING,
    f"{ATTENTION}qkv_proj.weight",
    f"{ATTENTION}o_proj.weight",
    f"{MLP}gate_up_proj.weight",
    f"{MLP}down_proj.weight",
]

HEADS = Heads(queries=4, keys=4)


def answer(
    weights: dict[str, torch.Tensor],
    *,
    tp_size: int = 1,
    on_gpu: bool = False,
    extra: dict[str, str] | None = None,
    without: str = "",
) -> list[RankChecksums]:
    """What an engine with these weights answers."""
    names = [name for name in SERVED if name != without]
    return [
        RankChecksums(
            tp_rank=rank,
            checksums={
                **expected_checksums(
                    names,
                    weights,
                    dtypes=Dtypes(served=torch.bfloat16),
                    rank=Rank(tp_rank=rank, tp_size=tp_size, heads=HEADS),
                    on_gpu=on_gpu,
                ),
                **(extra or {}),
            },
        )
        for rank in range(tp_size)
    ]


def unproved(infos: list[WorkerInfo], answers: list[Any], config: Any = Config) -> dict[str, str]:
    proof = ChecksumProof(make(), Dtypes(served=torch.bfloat16), lambda info: config)
    return proof.unproved(infos, answers)


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize(("device", "on_gpu"), [("cpu", False), ("cuda", True), ("xpu", False)])
def test_each_device_has_its_hash(tp_size: int, device: str, on_gpu: bool) -> None:
    info = worker(tp_size=tp_size, device=device)
    assert unproved([info], [answer(make(), tp_size=tp_size, on_gpu=on_gpu)]) == {}
    with pytest.raises(VerificationError, match="http://a holds other values than were sent in 5"):
        unproved([info], [answer(make(), tp_size=tp_size, on_gpu=not on_gpu)])


def test_one_wrong_engine_of_several_is_named() -> None:
    changed = make()
    changed[f"{MLP}down_proj.weight"][3, 100] += 1
    infos = [worker(url=f"http://{name}", tp_size=2) for name in "abc"]
    answers = [answer(w, tp_size=2) for w in (make(), changed, make())]
    match = r"http://b holds .* in 1 of 5 parameters on ranks \[1\]: .*down_proj"
    with pytest.raises(VerificationError, match=match):
        unproved(infos, answers)


def test_engines_of_several_sizes() -> None:
    infos = [worker(tp_size=size) for size in (1, 2, 4)]
    assert unproved(infos, [answer(make(), tp_size=size) for size in (1, 2, 4)]) == {}


def test_engines_alike_are_hashed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs["rank"].tp_rank)
        return expected_checksums(*args, **kwargs)

    monkeypatch.setattr(proof_module, "expected_checksums", counted)
    infos = [worker(url=f"http://{name}", tp_size=2) for name in "abc"]
    assert unproved(infos, [answer(make(), tp_size=2)] * 3) == {}
    assert asked == [0, 1]


def test_what_a_server_has_no_parameter_for_is_lost() -> None:
    with pytest.raises(VerificationError, match=r"no parameter for 1 .*embed_tokens"):
        unproved([worker()], [answer(make(), without=EMBEDDING)])


UNKNOWN: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "quantised": ({}, {"extra": {"a.weight_scale": "0" * 16}}, "a.weight_scale"),
    "family": ({"model_type": "gpt_neox", "tp_size": 2}, {"tp_size": 2}, "gpt_neox"),
    "dp attention": ({"dp_attention": True, "tp_size": 2}, {"tp_size": 2}, "data-parallel"),
    "an unknown family lacks one": ({"model_type": "x"}, {"without": EMBEDDING}, EMBEDDING),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_where_a_layout_is_unknown_engines_are_compared(case: str) -> None:
    changes, form, reason = UNKNOWN[case]
    infos = [worker(url=f"http://{name}", **changes) for name in "ab"]
    same = unproved(infos, [answer(make(1), **form)] * 2)  # neither holds what was sent
    assert list(same) == ["http://a", "http://b"]
    assert reason in same["http://a"]
    with pytest.raises(VerificationError, match=r"http://a, http://b hold different values"):
        unproved(infos, [answer(make(1), **form), answer(make(2), **form)])


def test_engines_that_must_differ_are_not_compared() -> None:
    changes, form, _ = UNKNOWN["quantised"]
    infos = [worker(**changes), worker(url="http://b", device="cuda", **changes)]
    answers = [answer(make(), **form), answer(make(), on_gpu=True, **form)]
    assert list(unproved(infos, answers)) == ["http://a", "http://b"]


def test_equal_checksums_prove_an_unknown_family_and_others_nothing() -> None:
    info = worker(model_type="gpt_neox")
    assert unproved([info], [answer(make())]) == {}
    assert "gpt_neox" in unproved([info], [answer(make(1))])["http://a"]


def test_without_a_config() -> None:
    """One rank needs none; of several, the heads aren't known."""
    assert unproved([worker()], [answer(make())], None) == {}
    assert "config" in unproved([worker(tp_size=2)], [answer(make(), tp_size=2)], None)["http://a"]


def test_a_server_that_does_not_say_its_family() -> None:
    info = worker(model_type=None, tp_size=2)
    assert unproved([info], [answer(make(), tp_size=2)]) == {}
