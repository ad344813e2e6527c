"""What fails while two ranks push."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from helpers.fault_proxy import Fault, FaultProxy
from helpers.servers import CPU_SERVER_ARGS
from helpers.two_ranks import in_ranks, trained
from torchrl_sglang import AsyncSGLang


@pytest.mark.slow
def test_a_server_that_fails_in_mid_push(
    proxied: AsyncSGLang, proxy: FaultProxy, model_path: Any, restore_weights: None
) -> None:
    """The other rank is gathering then; it must not be left alone in it."""
    # The first call is the question whether the key is right, before anything is begun.
    proxy.faults["/update_weights_from_distributed"] = Fault(status=500, after=3, times=1)
    first, second = trained(proxied, model_path)  # within the time that ranks are given
    assert "step 'transfer', bucket 2" in first["error"]
    assert "rank 0 said: PushError" in second["error"]


RESTART = """
import json, os, pickle, signal, sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM
from torchrl_sglang import AsyncSGLang, SGLangWeightSyncScheme, WeightSyncConfig, assist_push
from torchrl_sglang.weights.carry.payload import Payloads

path, options = pickle.loads(bytes.fromhex(sys.argv[1]))
dist.init_process_group("gloo")
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
if dist.get_rank():
    assist_push(model)
    assist_push(model)
    print(json.dumps({}), flush=True)
    dist.destroy_process_group()
    sys.exit()

flattened, killed = Payloads._flattened, []

def kill(payloads, index, bucket):
    if index == 1 and not killed:
        [server] = [each for each in service.servers.fleet._children if each.name == "server-0"]
        os.killpg(server.pid, signal.SIGKILL)
        killed.append(server.pid)
    return flattened(payloads, index, bucket)

with AsyncSGLang.from_pretrained(path, device="cpu", **options) as service:
    config = WeightSyncConfig(bucket_bytes=1 << 18, lost_engines="restart")
    scheme = SGLangWeightSyncScheme(service, config=config)
    scheme.init_on_sender()
    scheme.connect()
    Payloads._flattened = kill
    pushes = []
    for _ in range(2):
        scheme.send(model)
        push = scheme.last_push
        pushes.append([len(push.restarted_engines), push.verified_by, push.num_buckets > 3])
    [done] = service.generate([[5, 6, 7]], {"max_new_tokens": 4})
    newest = done.weight_version == str(push.version)
    print(json.dumps({"killed": len(killed), "pushes": pushes, "newest": newest}), flush=True)
    scheme.close()
dist.destroy_process_group()
"""


@pytest.mark.faults
def test_a_server_that_is_started_again_in_mid_push(model_path: Any) -> None:
    """The other rank waits meanwhile, gathers everything once more, and then for the next push."""
    told = pickle.dumps((str(model_path), CPU_SERVER_ARGS)).hex()
    first, second = in_ranks(RESTART, told, timeout_s=300.0)
    whole = [[1, "checksum", True], [0, "checksum", True]]
    assert first == {"killed": 1, "pushes": whole, "newest": True}
    assert second == {}
