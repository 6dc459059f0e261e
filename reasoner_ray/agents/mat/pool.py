"""Rollout workers of teams as Ray actors."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from reasoner_ray.agents.pool import Collected, WorkerActor, WorkerPool

if TYPE_CHECKING:
    from reasoner_ray.config import JobConfig


class TeamActor(WorkerActor):
    """Body of an actor."""

    def _make(self) -> Any:
        from reasoner_ray.agents.mat.worker import RolloutWorker

        return RolloutWorker(self._config, self._index)

    def collect(self, step: int, fresh: bool) -> tuple[Any, dict[str, Any]]:
        """See ``RolloutWorker.collect``; the segment stays in the object store."""
        collected: tuple[Any, dict[str, Any]] = self.worker.collect(step, fresh=fresh)
        return collected


class TeamPool(WorkerPool):
    """All workers of a job; see ``WorkerPool`` for what every call may raise."""

    body = TeamActor

    def __init__(self, config: JobConfig) -> None:
        super().__init__(config, config.multi_agent.name)

    async def collect(self, step: int, *, fresh: bool) -> list[Collected]:
        """Every worker's segment of training step ``step``. A worker that dies meanwhile collects its own anew, with new episodes."""
        workers = range(len(self._actors))
        return list(await asyncio.gather(*(self._collect(i, "collect", step, fresh, again=(step, True)) for i in workers)))
