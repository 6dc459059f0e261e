"""Grading in a rollout worker: the task's scorer and its check of steps in processes of their own, with hard time-outs."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

from reasoner_ray.errors import ConfigError
from reasoner_ray.labels.checks import CheckProcess
from reasoner_ray.scoring.base import Answer, Score, reward_terms
from reasoner_ray.scoring.calls import CallPool
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
        self._checks: CallPool | None = None

    async def score(self, answer: Answer, item: Item) -> Score:
        """The score, whatever the answer does to its process. Raises ``ReasonerError`` where the scorers cannot be built."""
        async with self._starting:
            if self._pool is None:
                self._pool = await asyncio.to_thread(self._start)
        return await asyncio.wrap_future(self._pool.submit(answer, item))

    async def check_lines(self, item: Item, lines: Sequence[str]) -> list[bool]:
        """What the task's ``check_steps`` says of a solution's lines.

        Raises what ``CallPool.submit`` does, and ``ValueError`` where it does not give an answer a line.
        """
        if self._checks is None:
            job = self._config
            self._checks = CallPool(lambda: CheckProcess(job.task, job.seed), timeout_s=job.scoring.timeout_s)
        right: list[bool] = await asyncio.wrap_future(self._checks.submit((item, list(lines))))
        if len(right) != len(lines):
            raise ValueError(f"check_steps gave {len(right)} answers for {len(lines)} lines")
        return right

    def _start(self) -> GraderPool:
        scoring = self._config.scoring
        terms = reward_terms(scoring, self._config.task).terms
        if not terms:
            raise ConfigError("scoring.scorers: the environment alone rewards this task, but labels need a scorer of answers")
        return GraderPool(terms, processes=scoring.processes, timeout_s=scoring.timeout_s)

    def close(self) -> None:
        """End the processes."""
        for pool in (self._pool, self._checks):
            if pool is not None:
                pool.close()
