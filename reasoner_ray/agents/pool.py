"""Workers that play episodes, as Ray actors, and the driver's handle on them: one that dies is replaced and its call made again.

A kind of job brings the body of an actor (``WorkerActor``) and a pool that knows its calls (``WorkerPool``).
"""

from __future__ import annotations

import asyncio
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

from reasoner_ray.actor_calls import result_of
from reasoner_ray.envs.multi_agent.spec import TeamSpec
from reasoner_ray.errors import EnvironmentFault, EnvironmentProblem, LearnerLost
from reasoner_ray.settings import usable_cores

if TYPE_CHECKING:
    from reasoner_ray.config import JobConfig
    from reasoner_ray.envs.multi_agent.teams import Episode

Ref = Any
START_S = 300.0
"""How long workers may take to find room and make their environments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """A worker's segment, as a reference, and its summary."""

    segment: Ref
    summary: dict[str, Any]


class WorkerActor(ABC):
    """Body of an actor."""

    def __init__(self, config: JobConfig, index: int) -> None:
        import torch

        workers = config.rollout.workers
        torch.set_num_threads(config.rollout.torch_threads or max(1, usable_cores() // workers))
        self._config, self._index = config, index
        self._worker: Any = None

    def begin(self) -> Any:
        """Make the environments; what is seen and done in them. Raises ``ReasonerError``."""
        self._worker = self._make()
        return self._worker.team

    @abstractmethod
    def _make(self) -> Any:
        """What plays: it has ``team``, ``load`` and ``evaluate``."""

    @property
    def worker(self) -> Any:
        """What plays. Raises ``RuntimeError`` before ``begin``."""
        if self._worker is None:
            raise RuntimeError("the worker has not begun")
        return self._worker

    def process_id(self) -> int:
        """Of this actor."""
        return os.getpid()

    def load(self, buckets: Sequence[Ref]) -> None:
        """Take published weights."""
        from reasoner_ray.sync.buckets import unpack_bucket

        for bucket in ray.get(list(buckets)):
            self.worker.load(unpack_bucket(bucket))

    def evaluate(self, seeds: Sequence[int], *args: Any) -> list[Episode]:
        """One greedy episode from each seed."""
        episodes: list[Episode] = self.worker.evaluate(seeds, *args)
        return episodes


class WorkerPool:
    """All workers of a job.

    Every call may raise ``EnvironmentProblem`` where a worker dies more often than ``rollout.restart_limit`` or does not come up,
    ``EnvironmentFault`` where one does not answer within ``multi_agent.deadline_s``, and ``LearnerLost`` where the published
    weights are gone because the learner that held them died.
    """

    body: type[WorkerActor]

    def __init__(self, config: JobConfig, name: str) -> None:
        """``name`` is the environment's, for messages."""
        self._config, self._name = config, name
        self._actors: list[Any] = []
        self._deaths = [0] * config.rollout.workers
        self._published: Sequence[Ref] = ()
        self._teams: list[TeamSpec] = []

    @property
    def restarts(self) -> int:
        """Workers that were replaced so far."""
        return sum(self._deaths)

    @property
    def team(self) -> TeamSpec:
        """What the workers' agents see and do. Raises ``RuntimeError`` before ``start``."""
        if not self._teams:
            raise RuntimeError("the workers have not started")
        return self._teams[0]

    async def start(self) -> None:
        """Start every worker. Raises ``ReasonerError``."""
        self._actors = [self._new(index) for index in range(self._config.rollout.workers)]
        try:
            self._teams = list(await asyncio.gather(*(self._begin(actor) for actor in self._actors)))
        except RayActorError as error:
            raise EnvironmentProblem(f"a rollout worker died at its start: {error}") from error

    async def load(self, published: Sequence[Ref]) -> None:
        """Give the learner's weights to every worker, and to those that replace one."""
        self._published = published
        await asyncio.gather(*(self._call(i, "load", published) for i in range(len(self._actors))))

    async def evaluate(self, seeds: Sequence[int], *args: Any) -> list[Episode]:
        """One greedy episode from each seed, in their order; ``args`` are passed on to the workers."""
        return await self._evaluate_on(range(len(self._actors)), seeds, *args)

    async def process_ids(self) -> list[int]:
        """Of the workers."""
        return list(await asyncio.gather(*(self._call(i, "process_id") for i in range(len(self._actors)))))

    async def stop(self) -> None:
        """End every worker."""
        actors, self._actors = self._actors, []
        for actor in actors:
            ray.kill(actor)

    def _new(self, index: int) -> Any:
        options = {"num_cpus": self._config.rollout.cpus, "resources": dict(self._config.cluster.rollout_resources) or None}
        return ray.remote(self.body).options(**options, max_restarts=0).remote(self._config, index)

    async def _begin(self, actor: Any) -> TeamSpec:
        """Let a new worker make its environments."""
        try:
            team: TeamSpec = await asyncio.wait_for(result_of(actor.begin.remote()), START_S)
        except RayTaskError:
            raise
        except TimeoutError as error:
            raise EnvironmentProblem(
                f"a rollout worker of {self._config.rollout.cpus:g} CPUs (rollout.cpus) did not start within {START_S:g} s; lower "
                "rollout.workers or rollout.cpus, or add nodes"
            ) from error
        return team

    async def _answer(self, index: int, method: str, ref: Ref) -> Any:
        """What worker ``index`` answers to ``method``, in time. Raises ``RayActorError`` where it has died."""
        env = self._config.multi_agent
        try:
            return await asyncio.wait_for(result_of(ref), env.deadline_s)
        except RayTaskError as error:  # first, for one that wraps a TimeoutError is a TimeoutError as well
            if isinstance(error.cause, ObjectLostError):
                raise LearnerLost(f"the weights for rollout worker {index} were lost with the learner that published them") from error
            raise
        except TimeoutError as error:
            raise EnvironmentFault(
                f"{self._name}: rollout worker {index} did not answer {method} within {env.deadline_s:g} s: an environment hangs, or "
                "multi_agent.deadline_s is too short for it"
            ) from error

    async def _collect(self, index: int, method: str, *args: Any, again: Sequence[Any] | None = None) -> Collected:
        """What a method of two results collects; where the worker dies its replacement does, with the arguments ``again``."""
        while True:
            try:
                segment, summary = getattr(self._actors[index], method).options(num_returns=2).remote(*args)
                return Collected(segment=segment, summary=await self._answer(index, method, summary))
            except RayActorError as error:
                await self._replace(index, error)
                args = args if again is None else tuple(again)

    async def _evaluate_on(self, workers: Sequence[int], seeds: Sequence[int], *args: Any) -> list[Episode]:
        """One greedy episode from each seed, in their order, shared by some of the workers."""
        n = len(workers)
        calls = (self._call(worker, "evaluate", seeds[i::n], *args) for i, worker in enumerate(workers) if len(seeds[i::n]))
        shares = await asyncio.gather(*calls)
        return [shares[k % n][k // n] for k in range(len(seeds))]

    async def _call(self, index: int, method: str, *args: Any) -> Any:
        while True:
            try:
                return await self._answer(index, method, getattr(self._actors[index], method).remote(*args))
            except RayActorError as error:
                await self._replace(index, error)

    async def _replace(self, index: int, error: RayActorError) -> None:
        """A new worker in the place of a dead one, with the newest weights."""
        limit = self._config.rollout.restart_limit
        while True:
            self._deaths[index] += 1
            if self._deaths[index] > limit:
                raise EnvironmentProblem(
                    f"rollout worker {index} died {self._deaths[index]} times (rollout.restart_limit={limit}); its log under the Ray "
                    "session folder says why, most often memory: lower multi_agent.envs"
                ) from error
            self._actors[index] = actor = self._new(index)
            try:
                await self._begin(actor)
                if self._published:
                    await self._answer(index, "load", actor.load.remote(self._published))
                return
            except RayActorError as again:
                error = again
