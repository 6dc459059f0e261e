"""Choosing a transport, and the trainer side of vLLM's own ones as far as it goes without GPUs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from reasoner_ray.config import JobConfig, parse_config
from reasoner_ray.errors import ConfigError
from reasoner_ray.sync.backends import PushSettings, resolve_backend
from reasoner_ray.trainer.placement import check_resources, place


def job(backend: str, **sections: Any) -> JobConfig:
    return parse_config({"sync": {"backend": backend, "bucket_mb": 1}, **sections})


def test_auto_takes_nccl_where_there_are_gpus_and_an_engine_that_can() -> None:
    assert resolve_backend(job("auto"), gpus=False) == "object_store"
    assert resolve_backend(job("auto"), gpus=True) == "nccl"
    assert resolve_backend(job("auto", rollout={"engine": "stepping"}), gpus=True) == "object_store"
    for gpus in (False, True):
        assert resolve_backend(job("object_store"), gpus=gpus) == "object_store"


@pytest.mark.parametrize("name", ["nccl", "ipc"])
def test_gpu_transports_are_refused_before_anything_starts(name: str) -> None:
    with pytest.raises(ConfigError, match=r"sync\.backend: .* none; take sync\.backend=object_store"):
        check_resources(job(name), {"CPU": 64})
    with pytest.raises(ConfigError, match=r"rollout\.engine=async"):
        check_resources(job(name, rollout={"engine": "stepping"}), {"CPU": 64, "GPU": 8})
    place(job(name), {"CPU": 64, "GPU": 8})


def test_ipc_puts_an_engine_beside_a_rank() -> None:
    place(job("ipc"), {"CPU": 64, "GPU": 1})
    with pytest.raises(ConfigError, match="need 2 GPUs"):
        check_resources(job("nccl"), {"CPU": 64, "GPU": 1})
    with pytest.raises(ConfigError, match=r"nccl connects whole GPUs"):
        place(job("nccl", rollout={"gpus": 0.5}), {"CPU": 64, "GPU": 8})
    for rollout in ({"workers": 2}, {"tensor_parallel": 2}):
        with pytest.raises(ConfigError, match=r"learner\.ranks=1"):
            place(job("ipc", rollout=rollout), {"CPU": 64, "GPU": 8})


def test_engines_get_ranks_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from reasoner_ray.sync.weights import EngineClients

    calls: list[Any] = []
    clients = EngineClients(["a", "b", "c"], gpus_per_engine=2, timeout_s=1)
    monkeypatch.setattr(clients, "_call", lambda method, infos=None: calls.append((method, infos)))
    clients.init_weight_transfer_engine({"rank_offset": 1, "world_size": 7})
    clients.init_weight_transfer_engine({"packed": True})
    assert [method for method, _ in calls] == ["shutdown_weight_transfer_engine", "init_weight_transfer_engine"] * 2
    assert [info["init_info"]["rank_offset"] for info in calls[1][1]] == [1, 3, 5]
    assert calls[3][1] == [{"init_info": {"packed": True}}] * 3


def test_ipc_handles_reach_vllm_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferUpdateInfo

    from reasoner_ray.sync.weights import EngineClients

    # vLLM remembers its environment once an engine has started in this process.
    monkeypatch.setattr("vllm.envs.VLLM_ALLOW_INSECURE_SERIALIZATION", True, raising=False)
    calls: list[Any] = []
    clients = EngineClients(["a"], gpus_per_engine=1, timeout_s=1)
    monkeypatch.setattr(clients, "_call", lambda method, infos=None: calls.extend(infos))
    handles = {"GPU-0": (torch.Tensor, torch.Size([3]), torch.float32, b"handle")}
    clients.update_weights({"names": ["w"], "dtype_names": ["float32"], "shapes": [[3]], "tensor_sizes": [12], "ipc_handles": handles})
    assert IPCWeightTransferUpdateInfo(**calls[0]["update_info"]).ipc_handles == handles


def test_what_the_trainer_side_is_told() -> None:
    from vllm.distributed.weight_transfer import ParamMeta

    from reasoner_ray.sync.weights import trainer_info

    config = job("nccl", rollout={"tensor_parallel": 2}, learner={"collective_timeout_s": 7})
    settings = PushSettings.of(config, "nccl")
    assert settings == PushSettings("nccl", gpus_per_engine=2, buffer_bytes=2**20, timeout_s=7)
    large = [ParamMeta("w", torch.bfloat16, (1024, 1024))]
    nccl: Any = trainer_info(settings, 0, "10.0.0.1", 5000, engines=3, metadata=large)
    assert (nccl.world_size, nccl.packed, nccl.packed_buffer_size_bytes) == (7, True, 2**20)
    ipc: Any = trainer_info(PushSettings("ipc", 1, 2**20, 7), 0, "", 0, engines=3, metadata=large)
    assert ipc.packed_buffer_size_bytes == 2**21, "a parameter must fit into the buffer"
    with pytest.raises(ConfigError):
        trainer_info(PushSettings("object_store", 1, 2**20, 7), 0, "", 0, engines=1, metadata=large)
