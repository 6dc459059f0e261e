"""Grading in a rollout worker: the task's scorer in processes of its own, with hard time-outs."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from reasoner_ray.errors import ConfigError
from reasoner_ray.scoring.base import Answer, Score, reward_terms
from reasoner_ray.scoring.graders import GraderPool

if TYPE_CHECKING:
    from reasoner_ray.config import JobConfig
    from reasoner_ray.data.tasks import Item


class WorkerGrader:
    """Judges answers by the job's ``scoring`` section; its processes start with the first answer, as most workers never need them."""

    def __init__(self, config: JobConfig) -> None:
        self._config = config
        self._starting = asyncio.Lock()
        self._pool: GraderPool | None = None

    async def score(self, answer: Answer, item: Item) -> Score:
        """The score, whatever the answer does to its process. Raises ``ReasonerError`` where the scorers cannot be built."""
        async with self._starting:
            if self._pool is None:
                self._pool = await asyncio.to_thread(self._start)
        return await asyncio.wrap_future(self._pool.submit(answer, item))

    def _start(self) -> GraderPool:
        scoring = self._config.scoring
        terms = reward_terms(scoring, self._config.task).terms
        if not terms:
            raise ConfigError("scoring.scorers: the environment alone rewards this task, but labels need a scorer of answers")
        return GraderPool(terms, processes=scoring.processes, timeout_s=scoring.timeout_s)

    def close(self) -> None:
        """End the processes."""
        if self._pool is not None:
            self._pool.close()
