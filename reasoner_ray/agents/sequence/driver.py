"""The loop of ``kind: sequence``: learn from data sets, or play and learn (Online DT); evaluate by the returns asked for."""

from __future__ import annotations

import asyncio
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from reasoner_ray.agents.pool import Collected
from reasoner_ray.agents.sequence.learner import SequenceLearners
from reasoner_ray.agents.sequence.pool import PlayerPool
from reasoner_ray.agents.stepwise import FIRST_EVAL_SEED
from reasoner_ray.envs.multi_agent.teams import Episode
from reasoner_ray.errors import CheckpointError
from reasoner_ray.trainer.stepwise import StepDriver
from reasoner_ray.trainer.tracking import Tracker

if TYPE_CHECKING:
    from reasoner_ray.config import JobConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Everything the driver coordinates."""

    workers: PlayerPool
    learners: SequenceLearners
    tracker: Tracker
    data: str  # fingerprint of what is learnt from


class SequenceDriver(StepDriver):
    """Each step learns ``learner.updates_per_step`` times; online, players first play episodes with the newest weights."""

    parts: Parts

    def __init__(self, config: JobConfig, parts: Parts) -> None:
        super().__init__(config, parts)
        self._steps_played = 0  # environment steps of training so far
        self._synced_at = -1

    async def stop(self) -> None:
        """End every actor; safe after any failure."""
        await asyncio.gather(self.parts.workers.stop(), super().stop())

    async def _start(self) -> None:
        await asyncio.gather(self.parts.workers.start(), self.parts.learners.start())

    async def _train(self) -> None:
        self._synced_at = -1  # the learner may have gone back to a checkpoint
        if self.step == 0:
            self._steps_played = 0
        await super()._train()

    async def _train_step(self) -> None:
        began = time.perf_counter()
        collected = await self._play()
        played = time.perf_counter()
        learned = await self.parts.learners.train_step([c.segment for c in collected])
        learnt = time.perf_counter()
        self.step += 1
        metrics = play_metrics(collected) | learned
        metrics |= {"time/rollout_s": played - began, "time/learn_s": learnt - played, "time/step_s": learnt - began}
        if self.config.sequence.online is not None:
            self._steps_played += sum(sum(c.summary["lengths"]) for c in collected)
            metrics["episode/actions_in_all"] = float(self._steps_played)
        eval_every = self.config.trainer.eval_every
        if eval_every and self.step % eval_every == 0:
            await self._evaluate()
        self.parts.tracker.log(self.step, metrics | self._faults | {"faults/worker_restarts": float(self.parts.workers.restarts)})

    async def _play(self) -> list[Collected]:
        """The episodes of an online step, with seeds that the job's seed and the step fix."""
        online = self.config.sequence.online
        if online is None or self.step < online.offline_steps:
            return []
        await self._sync()
        seeds = np.random.SeedSequence([self.config.seed, self.step]).generate_state(online.episodes)
        return await self.parts.workers.play([int(seed) for seed in seeds], online.target)

    async def _sync(self) -> None:
        """Bring the learner's weights to every player, once a step."""
        if self._synced_at != self.step:
            await self.parts.workers.load(await self.parts.learners.publish_weights())
            self._synced_at = self.step

    async def _evaluate(self) -> None:
        """Episodes from fixed seeds for each return asked for."""
        wanted = self.config.trainer.eval_tasks
        if wanted:
            began = time.perf_counter()
            await self._sync()
            seeds = [FIRST_EVAL_SEED + i for i in range(wanted)]
            asked = {target: await self.parts.workers.evaluate(seeds, target) for target in self.config.sequence.targets}
            self.last_eval = evaluation(asked) | {"time/eval_s": time.perf_counter() - began}
            if self.config.sequence.online is not None:
                self.last_eval["episode/actions_in_all"] = float(self._steps_played)
            self.parts.tracker.eval(self.step, self.last_eval)
        self._evaluated_at = self.step

    def _state(self) -> dict[str, Any]:
        return {"data": self.parts.data, "environment_steps": self._steps_played}

    def _check(self, state: dict[str, Any]) -> None:
        if state["data"] != self.parts.data:
            raise CheckpointError(
                f"the checkpoint was written by a run on other data (its fingerprint is {state['data']}, this one's {self.parts.data}); "
                "resume with the same sequence.data, keep_top and delayed, or start a new run from its model"
            )
        self._steps_played = state["environment_steps"]


def play_metrics(collected: Sequence[Collected]) -> dict[str, float]:
    """What the players' summaries say together; nothing where nothing was played."""
    returns = [x for c in collected for x in c.summary["returns"]]
    if not returns:
        return {}
    lengths = [x for c in collected for x in c.summary["lengths"]]
    return {"episode/return": statistics.fmean(returns), "episode/length": statistics.fmean(lengths), "episode/ended": float(len(returns))}


def evaluation(asked: Mapping[float, Sequence[Episode]]) -> dict[str, float]:
    """Of the episodes for each return asked for: the mean return; of the first also a 95 % interval (normal); and Spearman's rho.

    rho is the rank correlation of the returns asked for and the mean returns achieved, from three of them on.
    """
    achieved = {target: statistics.fmean(e.total for e in episodes) for target, episodes in asked.items()}
    first = next(iter(asked.values()))
    returns = [e.total for e in first]
    spread = statistics.stdev(returns) if len(returns) > 1 else math.nan
    figures = {
        "eval/return": statistics.fmean(returns),
        "eval/return_ci95": 1.96 * spread / math.sqrt(len(returns)),
        "eval/length": statistics.fmean(e.steps for e in first),
        "eval/episodes": float(len(returns)),
    }
    if len(achieved) > 1:
        figures |= {f"eval/return_at_{target:g}": value for target, value in achieved.items()}
    if len(achieved) > 2:
        figures["eval/spearman"] = spearman(list(achieved), list(achieved.values()))
    return figures


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Rank correlation, ties by their mean rank; NaN where one of both is constant."""
    return float(pd.Series(x).rank().corr(pd.Series(y).rank()))
