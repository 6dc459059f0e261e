"""The learner's ranks as Ray actors, and the driver's handle on them.

The driver passes object references through; trajectories and weights move between the actors alone.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import ray
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

from reasoner_ray.errors import EnvironmentProblem, LearnerLost, ReasonerError
from reasoner_ray.settings import learner_environment, usable_cores
from reasoner_ray.sync.backends import NativePush, PushSettings, on_shared_gpu, rank_gpus, resolve_backend, updates_done

if TYPE_CHECKING:
    from reasoner_ray.config import JobConfig
    from reasoner_ray.learner.learner import Learner
    from reasoner_ray.trajectory import Trajectory

R = TypeVar("R")
Ref = Any

CALL_DEADLINES = 6
"""A call may take this many times ``learner.collective_timeout_s``: a step has many collectives, each with its own deadline."""
GRACE_S = 15.0
"""How long to wait, once a rank has failed, for word of the others: a killed rank is reported after its peers' broken connections."""


class LearnerRank:
    """One rank: a ``Learner`` in a process of its own, or whatever ``make(config, rank, ranks, store)`` makes that learns like one."""

    def __init__(self, config: JobConfig, make: Callable[..., Any] | None = None) -> None:
        self._config = config
        self._make = make
        self._store: Any = None
        self._learner: Learner | None = None

    def place(self) -> tuple[str, str, int]:
        """This process's node id, address and process id."""
        return ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address(), os.getpid()

    def open_store(self, host: str) -> int:
        """Open the meeting point of the process group on rank 0; returns its port."""
        from reasoner_ray.learner.engine import open_store

        self._store = open_store(host, self._config.learner.ranks, self._config.learner.collective_timeout_s)
        return int(self._store.port)

    def begin(self, rank: int, host: str, port: int, ranks_here: int) -> None:
        """Join the others and load the model; ``ranks_here`` ranks share this node's cores."""
        import torch

        from reasoner_ray.learner.engine import join_store
        from reasoner_ray.learner.learner import Learner

        learner = self._config.learner
        # Ray sets OMP_NUM_THREADS to the CPUs an actor reserves, often 1.
        torch.set_num_threads(learner.torch_threads or max(1, usable_cores() // ranks_here))
        store = self._store or join_store(host, port, learner.ranks, learner.collective_timeout_s)
        self._learner = (self._make or Learner)(self._config, rank, learner.ranks, store)

    @property
    def learner(self) -> Learner:
        """The rank's learner. Raises ``RuntimeError`` before ``begin``."""
        if self._learner is None:
            raise RuntimeError("the learner has not begun")
        return self._learner

    def train_step(self, groups: Sequence[Ref]) -> dict[str, float]:
        """One step on this rank's groups."""
        trajectories: list[list[Trajectory]] = ray.get(list(groups))
        return self.learner.train_step(trajectories)

    def mismatch(self, probe: Sequence[Ref]) -> dict[str, float]:
        """Rollout against learner log-probs; every rank gets the same trajectories."""
        (trajectories,) = ray.get(list(probe))
        return self.learner.mismatch(trajectories)

    def publish_weights(self) -> list[Ref]:
        """The policy's weights in the object store, one reference a bucket; empty on all ranks but the first."""
        from reasoner_ray.sync.buckets import make_buckets

        state = self.learner.state_for_sync()
        if self.learner.engine.rank > 0:
            for _ in state:
                pass  # gathering is a collective: every rank takes part in it, one keeps the result
            return []
        return [ray.put(bucket) for bucket in make_buckets(state, self._config.sync.bucket_mb * 2**20)]

    def save(self, folder: Path) -> None:
        """Write this rank's state."""
        self.learner.save(folder)

    def load(self, folder: Path) -> None:
        """Read this rank's state."""
        self.learner.load(folder)

    def export(self, folder: Path) -> None:
        """Write a plain Hugging Face folder (the first rank does)."""
        self.learner.export(folder)

    def run(self, function: Callable[..., R], args: tuple[Any, ...]) -> R:
        """``function(learner, *args)``, here."""
        return function(self.learner, *args)


class LearnerGroup:
    """All ranks, as the driver uses them: every method is a coroutine that calls all ranks and waits for all.

    Each may raise ``LearnerLost`` where a rank died or a deadline passed; then ``restart`` and ``load`` are the way on.
    """

    def __init__(self, config: JobConfig, shared_gpus: Any = None, make: Callable[..., Any] | None = None) -> None:
        """``shared_gpus`` is a placement group whose bundle i holds rank i and engine i (``sync.backend: ipc``); see ``LearnerRank``."""
        self._config = config
        self._make = make
        self._shared_gpus = shared_gpus
        self._ranks: list[Any] = []

    async def start(self) -> None:
        """Start the actors, connect them, load the model.

        Raises ``EnvironmentProblem`` where the cluster has no room for them, and what ``Learner`` raises.
        """
        learner, cluster = self._config.learner, self._config.cluster
        gpus = rank_gpus(self._config) if ray.cluster_resources().get("GPU", 0) > 0 else 0
        options: dict[str, Any] = {
            "num_cpus": learner.cpus,
            "num_gpus": gpus,
            "resources": dict(cluster.learner_resources) or None,
            "runtime_env": {"env_vars": learner_environment(cpu=not gpus)},
            "max_restarts": 0,
        }
        actor = ray.remote(LearnerRank)
        self._ranks = [
            actor.options(**options | on_shared_gpu(self._shared_gpus, rank)).remote(self._config, self._make)
            for rank in range(learner.ranks)
        ]
        wanted = {"CPU": learner.cpus, "GPU": gpus, **cluster.learner_resources}
        try:
            places = await self._call("place", deadline_s=learner.collective_timeout_s)
        except LearnerLost as error:
            raise EnvironmentProblem(
                f"{learner.ranks} learner ranks of {wanted} each did not start within {learner.collective_timeout_s:g} s ({error}); "
                f"the cluster has {_room()}. Lower learner.ranks or learner.cpus, or add nodes"
            ) from error
        host = places[0][1]
        port = await self._on_first("open_store", host)
        sharing = Counter(node for node, _, _ in places)
        await self._call("begin", per_rank=[(rank, host, port, sharing[node]) for rank, (node, _, _) in enumerate(places)])

    async def train_step(self, groups: Sequence[Ref]) -> dict[str, float]:
        """One step on whole groups, each a reference to a ``list[Trajectory]``; returns the metrics of all ranks together."""
        shares = share_groups(groups, self._config.learner.ranks, self._config.learner.updates_per_step)
        return (await self._call("train_step", per_rank=[(share,) for share in shares]))[0]

    async def mismatch(self, probe: Ref) -> dict[str, float]:
        """Rollout against learner log-probs of the trajectories behind ``probe``: mean_abs, max_abs, k3, tokens."""
        return (await self._call("mismatch", [probe]))[0]

    async def publish_weights(self) -> list[Ref] | NativePush:
        """References to the policy's weights: ``Bucket``s of at most ``sync.bucket_mb``, in order.

        With ``sync.backend`` nccl or ipc, what lets the engines' pool ask the ranks to send by themselves.
        """
        backend = resolve_backend(self._config, gpus=ray.cluster_resources().get("GPU", 0) > 0)
        if backend != "object_store":
            return NativePush(self.run, PushSettings.of(self._config, backend), (await self.run(updates_done))[0])
        buckets: list[Ref] = (await self._call("publish_weights"))[0]
        return buckets

    async def run(self, function: Callable[..., R], *args: Any, deadline_s: float | None = None) -> list[R]:
        """``function(learner, *args)`` on every rank at once, for transports that send from the ranks themselves."""
        return await self._call("run", function, args, deadline_s=deadline_s)

    async def save(self, folder: Path) -> None:
        """Write the state of all ranks into ``folder``, which all of them must reach. Raises ``OSError``."""
        folder = Path(folder).absolute()
        await self._call("save", folder)
        seen, ranks = len(list(folder.glob("rank-*.pt"))), self._config.learner.ranks
        if seen < ranks:
            why = f"only {seen} of {ranks} learner ranks wrote where the driver sees it; let `out` be a folder that all nodes share"
            raise OSError(errno.ENOENT, why, str(folder))

    async def load(self, folder: Path) -> None:
        """Read the state of all ranks. Raises ``CheckpointError``."""
        await self._call("load", Path(folder).absolute())

    async def export(self, folder: Path) -> None:
        """Write a plain Hugging Face folder."""
        await self._call("export", Path(folder).absolute())

    async def restart(self) -> None:
        """Replace every rank by a new one that holds the initial weights."""
        await self.stop()
        await self.start()

    async def stop(self) -> None:
        """End every rank; safe to call twice and after any failure."""
        for rank in self._ranks:
            ray.kill(rank)
        self._ranks = []

    async def _on_first(self, method: str, *args: Any) -> Any:
        return (await self._call(method, *args, ranks=self._ranks[:1]))[0]

    async def _call(
        self,
        method: str,
        *args: Any,
        per_rank: Sequence[tuple[Any, ...]] | None = None,
        ranks: Sequence[Any] | None = None,
        deadline_s: float | None = None,
    ) -> list[Any]:
        """Call ``method`` on ``ranks`` (all by default), with ``args`` or each rank's own; results by rank."""
        ranks = self._ranks if ranks is None else ranks
        if not ranks:
            raise LearnerLost("the learner is not running")
        deadline_s = deadline_s or CALL_DEADLINES * self._config.learner.collective_timeout_s
        all_args = [args] * len(ranks) if per_rank is None else per_rank
        refs = [getattr(rank, method).remote(*a) for rank, a in zip(ranks, all_args, strict=True)]
        calls = [asyncio.wrap_future(ref.future()) for ref in refs]
        for call in calls:
            call.add_done_callback(_mark_seen)
        done, pending = await asyncio.wait(calls, timeout=deadline_s, return_when=asyncio.FIRST_EXCEPTION)
        if any(call.exception() for call in done):
            if pending:
                done, _ = await asyncio.wait(calls, timeout=GRACE_S)
            raise _explain(method, [e for call in done if (e := call.exception()) is not None])
        if pending:
            late = ", ".join(str(i) for i, call in enumerate(calls) if not call.done())
            raise LearnerLost(f"learner rank {late} did not answer {method} within {deadline_s:g} s")
        return [call.result() for call in calls]


class WholeBatchLearners(LearnerGroup):
    """Ranks that each read all that a step is learnt from; whose weights go to workers on CPUs, through the object store."""

    async def train_step(self, groups: Sequence[Ref]) -> dict[str, float]:
        """One step on everything behind the references.

        What went down with the node that held it is a ``LearnerLost`` too: ranks may have stopped at different points.
        """
        try:
            return (await self._call("train_step", list(groups)))[0]
        except RayTaskError as error:
            if isinstance(error.cause, ObjectLostError):
                raise LearnerLost(f"a rollout worker's segment was lost with its node: {str(error.cause).splitlines()[0]}") from error
            raise

    async def publish_weights(self) -> list[Ref]:
        """References to the weights as ``Bucket``s."""
        buckets: list[Ref] = (await self._call("publish_weights"))[0]
        return buckets


def share_groups(groups: Sequence[Ref], ranks: int, updates: int) -> list[list[Ref]]:
    """Each rank's groups, in the order of the updates: update u of rank r takes every ``ranks``-th group of the u-th part.

    So the trajectories of an update are the same however many ranks there are. Raises ``ValueError`` where they do not divide.
    """
    if len(groups) % (ranks * updates):
        raise ValueError(f"{len(groups)} groups cannot be shared evenly by {ranks} ranks over {updates} updates")
    size = len(groups) // updates
    parts = [groups[u * size : (u + 1) * size] for u in range(updates)]
    return [[group for part in parts for group in part[rank::ranks]] for rank in range(ranks)]


def _explain(method: str, errors: Sequence[BaseException]) -> BaseException:
    """The error to raise for what went wrong on some ranks: a death explains the others' broken connections."""
    for error in errors:
        if isinstance(error, RayActorError):
            return LearnerLost(f"a learner rank died during {method}: {_first_line(error)}")
    causes = [e.cause or e if isinstance(e, RayTaskError) else e for e in errors]
    for cause in causes:
        if isinstance(cause, ReasonerError | OSError):
            return cause
    for cause, error in zip(causes, errors, strict=True):
        if not _is_collective_failure(cause):
            return error
    return LearnerLost(f"the learner ranks lost each other during {method}: {_first_line(causes[0])}")


def _is_collective_failure(error: BaseException) -> bool:
    """True where gloo or NCCL gave up: a deadline passed or a connection broke."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and ("gloo" in str(error) or "NCCL" in str(error)))


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _mark_seen(call: asyncio.Future[Any]) -> None:
    """Look at a result nobody may wait for any more, so that asyncio does not log it as lost."""
    if not call.cancelled():
        call.exception()


def _room() -> dict[str, float]:
    return {key: value for key, value in ray.cluster_resources().items() if not key.startswith(("node:", "object_store", "memory"))}
