"""Which transport carries the weights, and the object the learner hands to the pool for it. Imports no vLLM.

With ``nccl`` and ``ipc`` the learner's ranks send: rank 0 drives the engines through vLLM's protocol while all ranks
gather. There is no copy of the weights besides the learner's own, so an engine that joins late is sent to only while
the ranks still hold what was published; otherwise it waits for the next sync.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from reasoner_ray.errors import ConfigError, EnvironmentProblem, LearnerLost

if TYPE_CHECKING:
    from reasoner_ray.config import JobConfig

Backend = Literal["object_store", "nccl", "ipc"]

MEMORY_ALONE, SHARED_MEMORY = 0.85, 0.8
"""Part of a GPU's memory for an engine that shares it with nobody, and for all that share one: what is left is for CUDA's own needs."""


def resolve_backend(config: JobConfig, *, gpus: bool) -> Backend:
    """The transport to use: ``auto`` is nccl where engines and learner hold whole GPUs, else the object store.

    Raises ``ConfigError`` for a transport that cannot work on this cluster.
    """
    name, stepping = config.sync.backend, config.rollout.engine == "stepping"
    if name == "auto":
        return "nccl" if gpus and not stepping and min(engine_gpus(config), rank_gpus(config)) >= 1 else "object_store"
    if name == "object_store":
        return name
    if not gpus:
        raise ConfigError(
            f"sync.backend: {name} moves weights between CUDA GPUs, and the Ray cluster has none; take sync.backend=object_store"
        )
    if stepping:
        raise ConfigError(f"sync.backend: {name} needs rollout.engine=async; with rollout.engine=stepping take sync.backend=object_store")
    if name == "nccl" and min(engine_gpus(config), rank_gpus(config)) < 1:
        raise ConfigError(
            "sync.backend: nccl connects whole GPUs, so rollout.gpus and learner.gpus must be left out; or take sync.backend=ipc"
        )
    if name == "ipc" and (config.rollout.tensor_parallel > 1 or config.rollout.workers > config.learner.ranks):
        raise ConfigError(
            "sync.backend: ipc shares each learner rank's GPU with one engine, so rollout.tensor_parallel must be 1 and "
            f"rollout.workers at most learner.ranks={config.learner.ranks}; take sync.backend=nccl"
        )
    return name


def reserve_shared_gpus(config: JobConfig) -> Any:
    """A placement group for ``ipc``: bundle i is on one GPU, with room for learner rank i and engine i (``trainer.placement.place``)."""
    import ray

    rollout, learner, cluster = config.rollout, config.learner, config.cluster
    bundle = {"GPU": pair_gpus(config), "CPU": rollout.cpus + learner.cpus}
    for needs in (cluster.rollout_resources, cluster.learner_resources):
        for name, amount in needs.items():
            bundle[name] = bundle.get(name, 0.0) + amount
    return ray.util.placement_group([{k: v for k, v in bundle.items() if v}] * learner.ranks)


def engine_gpus(config: JobConfig) -> float:
    """GPUs that an engine reserves where there are any."""
    return config.rollout.gpus or config.rollout.tensor_parallel


def rank_gpus(config: JobConfig) -> float:
    """GPUs that a learner rank reserves where there are any."""
    return config.learner.gpus or 1


def pair_gpus(config: JobConfig) -> float:
    """GPUs that an engine and a learner rank reserve together for ``ipc``."""
    return round(engine_gpus(config) + rank_gpus(config), 4)


def part_of_memory(config: JobConfig) -> float:
    """Part of its GPU's memory that an engine takes where the job does not say: less where it has a part of the GPU."""
    share = engine_gpus(config)
    return MEMORY_ALONE if share >= 1 else max(round(SHARED_MEMORY * share, 2), 0.01)


def on_shared_gpu(group: Any, index: int) -> dict[str, Any]:
    """Actor options that place it in bundle ``index`` of ``reserve_shared_gpus``; none without a group."""
    if group is None:
        return {}
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    return {"scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)}


@dataclass(frozen=True, slots=True)
class PushSettings:
    """What every rank must agree on."""

    backend: Backend
    gpus_per_engine: int
    buffer_bytes: int
    timeout_s: float  # for any answer of an engine, and for a whole push

    @classmethod
    def of(cls, config: JobConfig, backend: Backend) -> PushSettings:
        """From the configuration."""
        return cls(backend, config.rollout.tensor_parallel, config.sync.bucket_mb * 2**20, config.learner.collective_timeout_s)


@dataclass(frozen=True, slots=True)
class NativePush:
    """Weights that the learner's ranks send by themselves, once they know to which engines.

    ``run`` calls a function on every rank at once (``LearnerGroup.run``); ``updates`` is the number of optimiser steps
    behind the weights that were published.
    """

    run: Callable[..., Awaitable[list[Any]]]
    settings: PushSettings
    updates: int

    async def push(self, actors: Sequence[Any]) -> bool:
        """Send to ``actors``, which must be paused; False, and nothing sent, where the ranks have learned since.

        Raises ``LearnerLost`` where a rank or an engine was lost or a deadline passed: the state of all who took part
        is then unknown, and they must be replaced.
        """
        # Ranks may be busy for long; only once they have answered does the push's own deadline begin.
        address, port = (await self.run(_meeting_point))[0]
        sent = await self.run(_send, self.settings, self.updates, list(actors), address, port, deadline_s=self.settings.timeout_s)
        return all(sent)


def updates_done(learner: Any) -> int:
    """Optimiser steps so far, which say what weights a learner holds."""
    return int(learner.updates_done)


_RESERVED: list[socket.socket] = []
"""The socket of this process's meeting point, if there is one."""


def _meeting_point(learner: Any) -> tuple[str, int]:
    """This rank's address and a port of it that nobody else is given before the weights are sent.

    It stays bound here. vLLM can listen on it all the same: both sockets set SO_REUSEADDR, and this one never listens.
    """
    import ray

    _release_port()
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("", 0))
    _RESERVED.append(reserved)
    return ray.util.get_node_ip_address(), int(reserved.getsockname()[1])


def _release_port() -> None:
    while _RESERVED:
        _RESERVED.pop().close()


def _send(learner: Any, settings: PushSettings, updates: int, actors: Sequence[Any], address: str, port: int) -> bool:
    from ray.exceptions import GetTimeoutError, RayActorError

    from reasoner_ray.rollout.engine import require_vllm

    if updates_done(learner) != updates:
        _release_port()
        return False  # on all ranks alike
    require_vllm()
    from reasoner_ray.sync.weights import send_native

    try:
        send_native(learner, settings, actors, address, port)
    except (GetTimeoutError, RayActorError) as error:
        raise LearnerLost(f"an engine was lost while weights were sent to it by {settings.backend}: {error}") from error
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EADDRNOTAVAIL):
            raise
        raise EnvironmentProblem(
            f"the learner cannot meet the engines at {address}:{port} ({error.strerror}): go on with --resume, which takes another port. "
            "Where it happens again, keep other programs off the ports the system hands out (net.ipv4.ip_local_port_range), start Ray "
            "with --node-ip-address, or take sync.backend=object_store"
        ) from error
    finally:
        _release_port()
    return True
