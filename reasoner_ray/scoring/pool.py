"""Scorer actors: the driver's ``Scorers`` part, on Ray."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any

import ray

from reasoner_ray.errors import CheckpointError, ReasonerError
from reasoner_ray.models import load_tokenizer, resolve_model
from reasoner_ray.scoring.base import reward_terms
from reasoner_ray.scoring.process_reward import ProcessReward
from reasoner_ray.scoring.scorer import Scorer
from reasoner_ray.trainer.parts import GroupResult
from reasoner_ray.trajectory import Trajectory, flatten

if TYPE_CHECKING:
    from reasoner_ray.config import JobConfig
    from reasoner_ray.data.tasks import Item

_RESTARTS = 10  # times Ray brings back an actor that died, and runs its calls again: scoring has no side effects
_GROUPS_AT_ONCE = 16  # a group that waits for a slow answer must not hold up the others


class ScorerWorker:
    """Body of a scorer actor: a ``Scorer`` built where it runs."""

    def __init__(self, config: JobConfig) -> None:
        """Load the tokenizer and start the grader processes; ``problem`` tells what the user can mend where that fails.

        Raised here, Ray would make a text with a stack of it.
        """
        self._problem: ReasonerError | None = None
        try:
            self._scorer = _build(config)
        except ReasonerError as error:
            self._problem = error

    def problem(self) -> ReasonerError | None:
        """What kept the actor from starting, once it is ready."""
        return self._problem

    def ping(self) -> int:
        """The actor's process id, once it is ready."""
        return os.getpid()

    def score_group(self, trajectories: list[Trajectory], item: Item) -> tuple[list[Trajectory], dict[str, Any]]:
        """See ``Scorer.score_group``; Ray returns the two as references of their own."""
        if self._problem is not None:  # an actor that Ray restarted, where its first start had succeeded
            raise self._problem
        return self._scorer.score_group(trajectories, item)


def _build(config: JobConfig) -> Scorer:
    tokenizer = load_tokenizer(resolve_model(config.model.path), trust_remote_code=config.model.trust_remote_code)
    reward = reward_terms(config.scoring, config.task)
    process = ProcessReward.of(config, tokenizer)
    return Scorer(reward, tokenizer, processes=config.scoring.processes, timeout_s=config.scoring.timeout_s, process=process)


class ScorerPool:
    """``scoring.workers`` actors; each group goes to the one with the fewest groups at hand."""

    def __init__(self, config: JobConfig) -> None:
        self._config = config
        self._actors: list[Any] = []
        self._in_flight: list[int] = []
        self._process: ProcessReward | None = None

    async def start(self) -> None:
        """Start the actors and wait until all are ready. Raises the ``ReasonerError`` that kept one from it."""
        if self._config.scoring.process is not None:  # here, so that a model of steps lives as long as the job
            tokenizer = load_tokenizer(resolve_model(self._config.model.path), trust_remote_code=self._config.model.trust_remote_code)
            self._process = ProcessReward.of(self._config, tokenizer)
        if self._process is not None:
            await self._process.start()
        options = {
            "num_cpus": self._config.scoring.cpus,
            "max_restarts": _RESTARTS,
            "max_task_retries": _RESTARTS,
            "max_concurrency": _GROUPS_AT_ONCE,
        }
        remote = ray.remote(ScorerWorker).options(**options)
        self._actors = [remote.remote(self._config) for _ in range(self._config.scoring.workers)]
        self._in_flight = [0] * len(self._actors)
        for problem in await asyncio.gather(*(actor.problem.remote() for actor in self._actors)):
            if problem is not None:
                raise problem

    async def score(self, result: GroupResult, item: Item) -> GroupResult:
        """The group with its rewards; what the rollout put into the summary stays there."""
        worker = min(range(len(self._actors)), key=self._in_flight.__getitem__)
        self._in_flight[worker] += 1
        try:
            trajectories, summary = self._actors[worker].score_group.options(num_returns=2).remote(result.trajectories, item)
            return GroupResult(trajectories=trajectories, summary={**result.summary, **await summary})
        finally:
            self._in_flight[worker] -= 1

    async def fetch(self, result: GroupResult) -> tuple[list[Trajectory], dict[str, Any]]:
        """A group with its trajectories, for a checkpoint."""
        return await result.trajectories, result.summary

    async def store(self, fetched: tuple[list[Trajectory], dict[str, Any]]) -> GroupResult:
        """The inverse of ``fetch``. Raises ``CheckpointError`` for trajectories that an earlier version of the program wrote."""
        trajectories, summary = fetched
        try:
            flatten(trajectories)
        except AttributeError as error:  # unpickling fills in no defaults
            raise CheckpointError(
                f"the checkpoint's trajectories were written by an earlier version of reasoner_ray ({error}); go on with that version, "
                "or start a new run"
            ) from error
        return GroupResult(trajectories=ray.put(trajectories), summary=summary)

    async def stop(self) -> None:
        """End the actors; their grader processes end with them, and the models of steps."""
        actors, self._actors = self._actors, []
        for actor in actors:
            ray.kill(actor)
        if self._process is not None:
            await self._process.stop()
