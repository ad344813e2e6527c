"""Whether a push can be verified is known before anything is paused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers.proofs import SHAPES, Config, make, worker
from torchrl_sglang import WeightSyncConfig
from torchrl_sglang.errors import VerificationError
from torchrl_sglang.servers.info import Capabilities, Features, WorkerInfo
from torchrl_sglang.weights.source.expected import Dtypes
from torchrl_sglang.weights.verify import verifier as verify_module
from torchrl_sglang.weights.verify.verifier import Verifier

NO_CHECKSUMS = Capabilities(update_session=True, checksum=False, cache_salt=True)


class Model(torch.nn.Module):
    config = Config

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        return iter(make().items())


def verifier(info: WorkerInfo, model: Any, method: Any = "auto") -> Verifier:
    config = WeightSyncConfig(verify_method=method)
    return Verifier(config, [worker(), info], make(), Dtypes(served=torch.bfloat16), model)


# What a server is, and whether checksums may, or certainly will, prove a push to it.
SERVERS: dict[str, tuple[dict[str, Any], bool, bool]] = {
    "known": ({}, True, True),
    "known, two ranks": ({"tp_size": 2}, True, True),
    "another family": ({"model_type": "gpt_neox"}, True, False),
    "another family, two ranks": ({"model_type": "gpt_neox", "tp_size": 2}, False, False),
    "indivisible": ({"tp_size": 3}, False, False),
    "attention in parallel": ({"dp_attention": True, "tp_size": 2}, False, False),
    "quantised": ({"quantization": "fp8"}, False, False),
    "adapters": ({"features": Features(lora=True)}, False, False),
    "without checksums": ({"capabilities": NO_CHECKSUMS}, False, False),
}


@pytest.mark.parametrize("kind", SERVERS)
def test_what_is_refused_without_a_model(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changes, may_prove, proves = SERVERS[kind]
    monkeypatch.setattr(verify_module, "model_config", lambda path: Config)
    info = worker(url="http://b", **changes)
    if proves:
        verifier(info, None).refuse_impossible()
    else:
        with pytest.raises(VerificationError, match=r"register_model.*verify='never'"):
            verifier(info, None).refuse_impossible()
    if may_prove:
        verifier(info, None, "checksum").refuse_impossible()
    else:
        with pytest.raises(VerificationError, match="'probe'"):
            verifier(info, None, "checksum").refuse_impossible()
    verifier(info, Model()).refuse_impossible()


@pytest.mark.parametrize("kind", SERVERS)
def test_a_push_from_another_thread_never_touches_the_model(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the model says is computed before, unless checksums are certain to be enough."""
    changes, _, proves = SERVERS[kind]
    asked: list[Any] = []

    def scores(model: Any, weights: Any, dtypes: Any, ids: list[int]) -> list[float]:
        asked.append(model)
        return [0.0] * (len(ids) - 1)

    monkeypatch.setattr(verify_module, "reference_log_probs", scores)
    made = verifier(worker(url="http://b", **changes), Model())
    made.prepare()
    assert len(asked) == (0 if proves else 1)
    if proves:  # and if they are not, after all
        with pytest.raises(VerificationError, match="register_model"):
            made._reference()
    else:
        made._reference()
    assert len(asked) == (0 if proves else 1)
    assert set(SHAPES) == set(made._weights)
