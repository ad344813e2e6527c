"""Which version of a pushed adapter a request runs under, and what its completion says of it."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from typing import Any

import pytest

from helpers.parts import parse_completion
from torchrl_sglang import GenerateRequest
from torchrl_sglang.errors import InputError
from torchrl_sglang.generate.completion import VersionSpan
from torchrl_sglang.generate.parse import never_ran
from torchrl_sglang.servers.lora_versions import AdapterVersions, versioned, versions_of


def request(lora: str | None, **fields: Any) -> GenerateRequest:
    return GenerateRequest(input_ids=(1, 2), rid="r", lora=lora, **fields)


def at(version: str) -> Callable[[], str]:
    return lambda: version


def never() -> str:
    raise AssertionError("the servers were asked for their version")


@pytest.mark.parametrize(
    ("loaded", "versions"),
    [
        ([], ()),
        (["policy"], ()),
        (["policy@3", "policy@12", "other@4", "policy"], (3, 12)),
        (["policy@", "policy@x", "policy@-1", "policy@1.5", "policy@ 1", "policy@٣"], ()),
        (["policy@007", "policies@1", "my-policy@1"], ()),
        (["a@policy@1"], ()),
    ],
    ids=str,
)
def test_versions_among_names(loaded: list[str], versions: tuple[int, ...]) -> None:
    assert versions_of("policy", loaded) == versions


def test_names_with_a_separator_of_their_own() -> None:
    assert versions_of("a@policy", [versioned("a@policy", 1)]) == (1,)


def test_the_process_that_pushes_knows() -> None:
    versions = AdapterVersions()
    versions.listed("policy", (1, 2, 3))
    versions.switch("policy", 2)
    assert versions.resolve({"policy", "b"}, never)[0] == {"policy": 2}
    assert versions.pushed("policy") == 2
    assert versions.pushed("b") is None


@pytest.mark.parametrize(
    ("listed", "served", "expected"),
    [
        ((), "9", None),
        ((3,), "3", 3),
        ((1, 2, 3), "3", 3),
        ((1, 2, 3), "7", 3),
        ((1, 2, 3), "2", 2),  # 3 is loaded, but not in use yet
        ((1, 2), "default", 2),  # nobody counts there
    ],
)
def test_others_go_by_lists_and_the_weight_version(
    listed: tuple[int, ...], served: str, expected: int | None
) -> None:
    versions = AdapterVersions()
    versions.listed("policy", listed)
    found, _ = versions.resolve({"policy"}, at(served))
    assert found == ({} if expected is None else {"policy": expected})


def test_the_first_version_is_not_used_before_its_push_is_over() -> None:
    versions = AdapterVersions()
    versions.listed("policy", (4,))
    with pytest.raises(InputError, match=r"pushed for the first time, as version 4.*version 3 st"):
        versions.resolve({"policy"}, at("3"))


def test_an_unload_takes_the_name_back() -> None:
    versions = AdapterVersions()
    versions.switch("policy", 2)
    versions.unloaded("policy@1")
    assert versions.pushed("policy") == 2
    versions.unloaded("policy@2")
    assert versions.pushed("policy") is None


def test_a_version_is_in_use_while_a_batch_lives() -> None:
    versions = AdapterVersions()
    versions.switch("policy", 1)
    _, first = versions.resolve({"policy"}, never)
    versions.switch("policy", 2)
    _, second = versions.resolve({"policy"}, never)
    assert [versions.in_use(f"policy@{v}") for v in (1, 2, 3)] == [True, True, False]
    del first
    gc.collect()
    assert [versions.in_use(f"policy@{v}") for v in (1, 2)] == [False, True]
    del second
    gc.collect()
    assert not versions.in_use("policy@2")


# Completions


def answer(**meta: Any) -> dict[str, Any]:
    return {
        "text": "x",
        "output_ids": [7, 8, 9],
        "meta_info": {
            "id": "r",
            "finish_reason": {"type": "length", "length": 3},
            "prompt_tokens": 2,
            "completion_tokens": 3,
            "output_token_logprobs": [[-0.5, 7, None], [-0.25, 8, None], [-1.0, 9, None]],
            **meta,
        },
    }


SPANS = [{"version": "4", "start": 0, "end": 1}, {"version": "5", "start": 1, "end": 3}]


@pytest.mark.parametrize("meta", [{"weight_versions": SPANS}, {"weight_version": "5"}, {}], ids=str)
def test_a_completion_carries_its_adapters_version(meta: dict[str, Any]) -> None:
    adapted = request("policy@3", adapter_version=3)
    completion = parse_completion(answer(**meta), adapted)
    assert completion.version_spans == (VersionSpan(version="3", start=0, end=3),)
    others = parse_completion(answer(**meta), request("b"))
    assert "3" not in [span.version for span in others.version_spans]


def test_one_that_never_ran_carries_it_too() -> None:
    counts = itertools.count(3)
    made = [
        never_ran(request("policy@3", adapter_version=version, partial_allowed=True))[0]
        for version in (next(counts), None)
    ]
    assert [completion.weight_version for completion in made] == ["3", None]
