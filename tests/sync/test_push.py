"""Weights sent by the learner's ranks through vLLM's nccl trainer: real metadata, real bytes, a collective of our own.

No GPU is needed, and none is used: what NCCL, CUDA streams and CUDA IPC do is not tested here.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from reasoner_ray.config import parse_config
from reasoner_ray.data.tasks import Item
from reasoner_ray.errors import EnvironmentProblem, LearnerLost
from reasoner_ray.sync.backends import NativePush, PushSettings, _meeting_point, _send, updates_done
from reasoner_ray.trainer.fleet import State

SETTINGS = PushSettings("nccl", gpus_per_engine=1, buffer_bytes=140_000, timeout_s=20)


class EngineRecorder:
    """What the pool and the ranks ask of an engine's actor, written down."""

    def __init__(self, *_: Any) -> None:
        self.log: list[tuple[str, Any]] = []

    async def start(self) -> int:
        return os.getpid()

    async def transfer(self, method: str, info: Any) -> None:
        if info == {"update_info": "hang"}:
            await asyncio.sleep(60)
        self.log.append((method, info))

    async def pause(self) -> None:
        self.log.append(("pause", None))

    async def resume(self, seed: int | None, arrivals: int) -> None:
        self.log.append(("resume", None))

    async def label(self, version: int) -> None:
        self.log.append(("label", version))

    async def calls(self) -> list[tuple[str, Any]]:
        self.log, log = [], self.log
        return log

    async def ping(self) -> int:
        return 0

    async def abort(self) -> None: ...

    async def stop(self) -> None: ...


class Collective:
    """In NCCL's place: keeps what is broadcast."""

    def __init__(self) -> None:
        self.sent: list[torch.Tensor] = []
        self.open = True

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        assert self.open
        assert src == 0
        self.sent.append(tensor.clone())

    def destroy(self) -> None:
        self.open = False


@pytest.fixture
def collectives(monkeypatch: pytest.MonkeyPatch) -> list[Collective]:
    """The groups that rank 0 opens, in order; packing stays vLLM's, without its CUDA streams."""
    from vllm.distributed.weight_transfer import nccl_engine, packed_tensor

    from reasoner_ray.sync import weights

    groups: list[Collective] = []

    def open_group(_: Any) -> Collective:
        groups.append(Collective())
        return groups[-1]

    def produce(iterator: Any, group: Collective, src: int, post_iter_func: Any, buffer_size_bytes: int, num_buffers: int) -> None:
        while (chunk := packed_tensor.pack_tensors(iterator, post_iter_func, buffer_size_bytes)) is not None:
            group.broadcast(chunk.packed_tensor, src=src)

    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", open_group)
    monkeypatch.setattr(nccl_engine, "packed_nccl_broadcast_producer", produce)
    monkeypatch.setattr(weights, "_SENDERS", {})
    return groups


@pytest.fixture(scope="module")
def learner(tiny_model_dir: Path) -> Any:
    from reasoner_ray.learner.learner import Learner

    config = {"model": {"path": str(tiny_model_dir), "dtype": "float32"}, "algorithm": {"name": "grpo"}, "learner": {"torch_threads": 1}}
    return Learner(parse_config(config))


@pytest.mark.slow
def test_engines_are_told_and_sent_exactly_the_learners_weights(ray_cluster: Any, collectives: list[Collective], learner: Any) -> None:
    from vllm.distributed.weight_transfer.packed_tensor import unpack_tensor

    actor = ray_cluster.remote(EngineRecorder).options(num_cpus=0)
    engines = [actor.remote(), actor.remote()]
    assert _send(learner, SETTINGS, updates_done(learner), engines, "10.0.0.1", 5000)
    state = list(learner.state_for_sync())
    for number, calls in enumerate(ray_cluster.get([engine.calls.remote() for engine in engines])):
        names = ["shutdown_weight_transfer_engine", "init_weight_transfer_engine"]
        assert [name for name, _ in calls] == [*names, "start_weight_update", "update_weights", "finish_weight_update"]
        init, told = calls[1][1]["init_info"], calls[3][1]["update_info"]
        assert (init["master_address"], init["master_port"], init["world_size"]) == ("10.0.0.1", 5000, 3)
        assert init["rank_offset"] == 1 + number
        assert told["names"] == [name for name, _ in state]
        assert told["dtype_names"] == [str(t.dtype).removeprefix("torch.") for _, t in state]
        assert told["shapes"] == [list(t.shape) for _, t in state]
    sizes = [t.nbytes for _, t in state]
    (group,) = collectives
    assert len(group.sent) > 1, "several buffers"
    arrived = unpack_tensor(torch.cat(group.sent), *([list(column) for column in zip(*_meta(state), strict=True)]), sizes)
    assert all(torch.equal(tensor, expected) for (_, tensor), (_, expected) in zip(arrived, state, strict=True))

    assert _send(learner, SETTINGS, updates_done(learner), engines, "10.0.0.1", 5001)
    again = [name for name, _ in ray_cluster.get(engines[0].calls.remote())]
    assert again == ["start_weight_update", "update_weights", "finish_weight_update"], "the same group serves again"
    assert not _send(learner, SETTINGS, updates_done(learner) + 1, engines, "10.0.0.1", 5001), "other weights than were published"
    assert ray_cluster.get(engines[0].calls.remote()) == []

    restarted = actor.remote()
    assert _send(learner, SETTINGS, updates_done(learner), [restarted], "10.0.0.1", 5002)
    assert [g.open for g in collectives] == [False, True], "the group is rebuilt for a new engine"
    ray_cluster.kill(restarted)
    with pytest.raises(LearnerLost, match="engine was lost"):
        _send(learner, SETTINGS, updates_done(learner), [restarted], "10.0.0.1", 5003)


def _meta(state: list[tuple[str, torch.Tensor]]) -> list[tuple[str, list[int], torch.dtype]]:
    return [(name, list(tensor.shape), tensor.dtype) for name, tensor in state]


@pytest.mark.slow
def test_a_port_that_is_taken_is_named_with_what_to_do(ray_cluster: Any, monkeypatch: pytest.MonkeyPatch, learner: Any) -> None:
    """With vLLM's own endpoint, which fails before it comes to NCCL."""
    from reasoner_ray.sync import weights

    monkeypatch.setattr(weights, "_SENDERS", {})
    monkeypatch.setattr("torch.accelerator.current_device_index", lambda: 0)  # asked for first, and not used before the port
    engine = ray_cluster.remote(EngineRecorder).options(num_cpus=0).remote()
    with socket.create_server(("127.0.0.1", 0)) as occupied:
        port = occupied.getsockname()[1]
        with pytest.raises(EnvironmentProblem, match=rf"at 127\.0\.0\.1:{port} \(Address already in use\).*--resume.*object_store"):
            _send(learner, SETTINGS, updates_done(learner), [engine], "127.0.0.1", port)


def test_the_port_of_a_meeting_point_is_kept_for_it(ray_cluster: Any, learner: Any) -> None:
    _, port = _meeting_point(learner)
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", port))
    with socket.socket() as vllms:
        vllms.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as StatelessProcessGroup.create does
        vllms.bind(("127.0.0.1", port))
        vllms.listen()
    assert not _send(learner, SETTINGS, updates_done(learner) + 1, [], "127.0.0.1", port), "a push that does not come about"
    with socket.create_server(("127.0.0.1", port)):
        pass


def test_an_engine_that_does_not_answer_raises(ray_cluster: Any) -> None:
    from ray.exceptions import GetTimeoutError

    from reasoner_ray.sync.weights import EngineClients

    engine = ray_cluster.remote(EngineRecorder).options(num_cpus=0).remote()
    ray_cluster.get(engine.start.remote())
    with pytest.raises(GetTimeoutError):
        EngineClients([engine], 1, timeout_s=0.5).update_weights("hang")


class Ranks:
    """``LearnerGroup.run`` of one rank that answers by ``outcome``; notes to which engines it sent."""

    def __init__(self) -> None:
        self.outcome: Callable[[], bool] = lambda: True
        self.sent: list[list[Any]] = []

    async def run(self, function: Any, *args: Any, deadline_s: float | None = None) -> list[Any]:
        if function is _meeting_point:
            return [("10.0.0.1", 5000)]
        assert function is _send
        assert deadline_s == SETTINGS.timeout_s
        self.sent.append(args[2])
        return [self.outcome()]


def lose() -> bool:
    raise LearnerLost("a rank died")


async def until(holds: Callable[[], bool]) -> None:
    while not holds():
        await asyncio.sleep(0.05)


async def sync(pool: Any, ranks: Ranks, version: int) -> None:
    await pool.pause()
    await pool.update_weights(NativePush(ranks.run, SETTINGS, version), version)
    await pool.resume()


async def sends_to_the_fleet_and_to_one_that_restarts(pool: Any, ranks: Ranks) -> None:
    actors = [engine.actor for engine in pool._engines.values()]
    await sync(pool, ranks, 1)
    assert ranks.sent == [actors]
    for actor in actors:
        assert await actor.calls.remote() == [("pause", None), ("label", 1), ("resume", None)]

    for _ in range(3):
        pool._on_death(pool._engines["engine-0"], "seen by each of its groups")
    await until(lambda: pool.fleet.restarts == 1 and pool.n_engines == 2)
    new = pool._engines["engine-0"].actor
    assert ranks.sent[1:] == [[new]], "a restarted engine is sent to alone"
    assert await new.calls.remote() == [("pause", None), ("label", 1), ("resume", None)]
    assert await actors[1].calls.remote() == []


async def an_engine_that_restarts_late_waits(pool: Any, ranks: Ranks) -> None:
    ranks.outcome = lambda: False
    os.kill(pool.processes["engine-1"], signal.SIGKILL)
    await until(lambda: len(ranks.sent) == 3 and pool.fleet.members["engine-1"].state is State.STALE)
    assert pool.fleet.routable == ["engine-0"], "the learner has learned since: this engine waits"
    ranks.outcome = lambda: True
    await sync(pool, ranks, 2)
    assert pool.n_engines == 2


async def a_push_that_breaks_off(pool: Any, ranks: Ranks) -> None:
    ranks.outcome = lose
    with pytest.raises(LearnerLost):
        await sync(pool, ranks, 3)
    assert pool.n_engines == 0
    await until(lambda: set(pool.processes) == {"engine-0", "engine-1"})
    assert pool.fleet.restarts == 4, "engines that hang in a push are replaced"
    ranks.outcome = lambda: True
    await sync(pool, ranks, 4)
    assert pool.n_engines == 2

    ranks.outcome = lose
    for name in ("engine-0", "engine-1"):
        os.kill(pool.processes[name], signal.SIGKILL)
    await until(lambda: pool.n_engines == 0)
    with pytest.raises(LearnerLost):
        await pool.finish(pool.submit(Item(id="i", prompt="p", answer="a"), "g0", 1))
    await pool.abort()  # as the driver does before it restarts the learner
    await until(lambda: set(pool.processes) == {"engine-0", "engine-1"})
    ranks.outcome = lambda: True
    await sync(pool, ranks, 5)
    assert pool.n_engines == 2


@pytest.mark.long
def test_the_pool_brings_engines_and_ranks_together(ray_cluster: Any, monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path) -> None:
    """One pool, one story: a sync, an engine that is sent to alone, one that must wait, a push that breaks off."""
    from reasoner_ray.rollout import pool as module

    monkeypatch.setattr(module, "RolloutActor", EngineRecorder)
    rollout = {"workers": 2, "cpus": 0, "probe_seconds": 0.2, "restart_limit": 20}
    config = parse_config({"model": {"path": str(tiny_model_dir)}, "rollout": rollout})
    ranks = Ranks()

    async def story() -> None:
        pool = module.RolloutPool(config)
        await pool.start()
        await sends_to_the_fleet_and_to_one_that_restarts(pool, ranks)
        await an_engine_that_restarts_late_waits(pool, ranks)
        await a_push_that_breaks_off(pool, ranks)
        await pool.stop()

    asyncio.run(asyncio.wait_for(story(), 120))
