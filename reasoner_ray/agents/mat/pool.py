"""Rollout workers of teams as Ray actors."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayActorError

from reasoner_ray.agents.pool import Collected, WorkerActor, WorkerPool
from reasoner_ray.envs.multi_agent.spec import TeamSpec
from reasoner_ray.errors import ConfigError, EnvironmentFault, EnvironmentProblem

if TYPE_CHECKING:
    from reasoner_ray.config import JobConfig
    from reasoner_ray.envs.multi_agent.teams import Episode


class TeamActor(WorkerActor):
    """Body of an actor."""

    def _make(self) -> Any:
        from reasoner_ray.agents.mat.worker import RolloutWorker

        return RolloutWorker(self._config, self._index)

    def collect(self, step: int, fresh: bool) -> tuple[Any, dict[str, Any]]:
        """See ``RolloutWorker.collect``; the segment stays in the object store."""
        collected: tuple[Any, dict[str, Any]] = self.worker.collect(step, fresh=fresh)
        return collected

    def film(self, seed: int, ending: str) -> bytes:
        """The greedy episode of ``seed`` as the content of a video file. Raises ``ReasonerError`` where it cannot be drawn or written."""
        from reasoner_ray.envs.multi_agent.teams import environment_code
        from reasoner_ray.pictures import encoded

        with environment_code(f"{self.worker.settings.name}: drawing an episode as {ending}"):
            return encoded(self.worker.frames(seed), ending)


class TeamPool(WorkerPool):
    """All workers of a job, of which worker i plays task i modulo their number; see ``WorkerPool`` for what every call may raise."""

    body = TeamActor

    def __init__(self, config: JobConfig) -> None:
        super().__init__(config, config.multi_agent.name)
        self._tasks = max(1, len(config.multi_agent.tasks))

    @property
    def teams(self) -> list[TeamSpec]:
        """The team of each task. Raises ``RuntimeError`` before ``start``."""
        return [self.team, *self._teams[1 : self._tasks]]

    async def collect(self, step: int, *, fresh: bool) -> list[Collected]:
        """Every worker's segment of training step ``step``. A worker that dies meanwhile collects its own anew, with new episodes."""
        workers = range(len(self._actors))
        return list(await asyncio.gather(*(self._collect(i, "collect", step, fresh, again=(step, True)) for i in workers)))

    async def evaluate_tasks(self, seeds: Sequence[int]) -> list[list[Episode]]:
        """One greedy episode of each task from each seed, in their order."""
        shares = [range(task, len(self._actors), self._tasks) for task in range(self._tasks)]
        return list(await asyncio.gather(*(self._evaluate_on(workers, seeds) for workers in shares)))

    async def film(self, task: int, seed: int, ending: str) -> bytes:
        """The greedy episode of ``seed`` of a task as the content of a video file.

        Raises ``EnvironmentProblem`` where it cannot be drawn. A display driver may take the worker with it, or hang: the worker is
        replaced, but the drawing is not tried again.
        """
        try:
            content: bytes = await self._answer(task, "film", self._actors[task].film.remote(seed, ending))
        except RayActorError as error:
            await self._replace(task, error)
            raise EnvironmentProblem(f"rollout worker {task} died of drawing an episode; set tracking.video_every=0") from error
        except (ConfigError, EnvironmentFault) as error:
            if isinstance(error.__cause__, TimeoutError):  # it is busy still, and would answer nothing else
                ray.kill(self._actors[task])
                await self._replace(task, RayActorError(error_msg=str(error)))
            raise EnvironmentProblem(str(error)) from error
        return content
