"""The loop of ``kind: mat``: roll out, credit and learn, sync, evaluate. It holds references to segments, never the segments."""

from __future__ import annotations

import asyncio
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from reasoner_ray.agents.mat.learner import MatLearners
from reasoner_ray.agents.mat.pool import TeamPool
from reasoner_ray.agents.pool import Collected
from reasoner_ray.agents.stepwise import FIRST_EVAL_SEED
from reasoner_ray.envs.multi_agent.settings import MultiAgentConfig
from reasoner_ray.envs.multi_agent.spec import TeamSpec
from reasoner_ray.envs.multi_agent.teams import Episode
from reasoner_ray.errors import CheckpointError, SyncError
from reasoner_ray.trainer.stepwise import StepDriver
from reasoner_ray.trainer.tracking import Tracker

if TYPE_CHECKING:
    from reasoner_ray.config import JobConfig

TOLERANCE = 1e-3
"""Nats by which the log-probs of workers and learner may differ where ``sync.probe_tolerance`` is not set; both compute in float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Everything the driver coordinates."""

    workers: TeamPool
    learners: MatLearners
    tracker: Tracker


class MatDriver(StepDriver):
    """Each step collects a segment from every worker, learns from all of them, and gives the new weights to the workers.

    After every regular checkpoint the workers begin new episodes, so that a resumed run goes on exactly as one that was never
    interrupted: what an environment is in the middle of cannot be saved in general.
    """

    parts: Parts

    def __init__(self, config: JobConfig, parts: Parts) -> None:
        super().__init__(config, parts)
        self._fresh = True  # episodes are to begin anew
        self._steps_done = 0  # environment steps so far
        self._anew_at, self._ended = 0, 0  # the step at which all episodes began anew, and how many have ended since
        self._warned = False  # that none ever ends

    async def stop(self) -> None:
        """End every actor; safe after any failure."""
        await asyncio.gather(self.parts.workers.stop(), super().stop())

    async def _start(self) -> None:
        workers, learners = self.parts.workers, self.parts.learners
        await workers.start()
        learners.of(workers.team)
        await learners.start()

    async def _train(self) -> None:
        self._fresh, self._anew_at, self._ended = True, self.step, 0
        if self.step == 0:
            self._steps_done = 0
        await self._sync()
        await super()._train()

    async def _train_step(self) -> None:
        began = time.perf_counter()
        collected = await self.parts.workers.collect(self.step, fresh=self._fresh)
        rolled_out = time.perf_counter()
        learned = await self.parts.learners.train_step([c.segment for c in collected])
        learnt = time.perf_counter()
        self._check_mismatch(learned)
        self.step += 1
        self._steps_done += sum(c.summary["steps"] for c in collected)
        self._ended += sum(len(c.summary["returns"]) for c in collected)
        self._begin_anew_if_due()
        await self._sync()
        synced = time.perf_counter()
        metrics = rollout_metrics(collected, rolled_out - began) | learned
        metrics["episode/actions_in_all"] = float(self._steps_done)
        metrics |= {"time/rollout_s": rolled_out - began, "time/learn_s": learnt - rolled_out, "time/sync_s": synced - learnt}
        metrics |= {"time/step_s": synced - began, "faults/worker_restarts": float(self.parts.workers.restarts)}
        eval_every = self.config.trainer.eval_every
        if eval_every and self.step % eval_every == 0:
            await self._evaluate()
        self.parts.tracker.log(self.step, metrics | self._faults)

    def _begin_anew_if_due(self) -> None:
        """After a regular checkpoint all episodes begin anew; say so, once, where none came to its end before that."""
        every = self.config.trainer.checkpoint_every
        self._fresh = bool(every) and self.step % every == 0
        if not self._fresh or self.step >= self.config.trainer.steps:
            return
        if not (self._ended or self._warned) and self.step - self._anew_at == every:
            self._warned = True
            self.parts.tracker.event(
                f"no episode ended in the {every * self.config.multi_agent.segment_steps} steps between two checkpoints, after which "
                "all begin anew: how they end is never seen. Raise trainer.checkpoint_every, or lower multi_agent.max_steps",
                "warning",
            )
        self._anew_at, self._ended = self.step, 0

    def _warnings(self) -> list[str]:
        limit, trainer, steps = episode_limit(self.config.multi_agent), self.config.trainer, self.config.multi_agent.segment_steps
        between = trainer.checkpoint_every * steps
        if limit is None or not 0 < between < limit or trainer.steps <= trainer.checkpoint_every:
            return []
        self._warned = True
        return [
            f"episodes of up to {limit} steps begin anew every trainer.checkpoint_every * multi_agent.segment_steps = {between} steps, so "
            f"their ends by time are never seen; set trainer.checkpoint_every={-(-limit // steps)} or more"
        ]

    async def _sync(self) -> None:
        """Bring the learner's weights to every worker."""
        await self.parts.workers.load(await self.parts.learners.publish_weights())

    def _check_mismatch(self, learned: dict[str, float]) -> None:
        """Raises ``SyncError`` where workers acted under other weights than the learner has."""
        tolerance = self.config.sync.probe_tolerance or TOLERANCE
        found = learned["mismatch/max_abs"]
        if not found <= tolerance:
            raise SyncError(
                f"step {self.step + 1}: log-probs of workers and learner differ by up to {found:.2g} nats (sync.probe_tolerance "
                f"{tolerance:g}): the workers acted under other weights. The run's checkpoints are unharmed"
            )

    async def _evaluate(self) -> None:
        """Greedy episodes from fixed seeds."""
        wanted = self.config.trainer.eval_tasks
        if wanted:
            began = time.perf_counter()
            episodes = await self.parts.workers.evaluate([FIRST_EVAL_SEED + i for i in range(wanted)])
            self.last_eval = evaluation(episodes) | {"time/eval_s": time.perf_counter() - began}
            self.parts.tracker.eval(self.step, self.last_eval | {"episode/actions_in_all": float(self._steps_done)})
        self._evaluated_at = self.step

    def _state(self) -> dict[str, Any]:
        team = self.parts.workers.team.to_dict()
        return {"team": team, "environment_steps": self._steps_done, "workers": self.config.rollout.workers}

    def _check(self, state: dict[str, Any]) -> None:
        difference = TeamSpec.from_dict(state["team"]).difference(self.parts.workers.team)
        if difference:
            raise CheckpointError(
                f"the checkpoint is of another team ({difference}); resume with the environment it was written with, or start a new run"
            )
        self._steps_done = state["environment_steps"]


def episode_limit(config: MultiAgentConfig) -> int | None:
    """Steps after which an episode ends by time, as far as the job says: its own limit, or the one it gives the environment."""
    limits = [config.max_steps, *(config.args.get(name) for name in ("max_cycles", "max_steps", "max_episode_steps"))]
    return min((limit for limit in limits if isinstance(limit, int)), default=None)


def rollout_metrics(collected: Sequence[Collected], seconds: float) -> dict[str, float]:
    """What the workers' summaries say together. Figures of episodes are of those that ended in this step, and missing where none did."""
    summaries = [c.summary for c in collected]
    returns = [x for s in summaries for x in s["returns"]]
    steps = sum(s["steps"] for s in summaries)
    metrics = {"reward/mean": statistics.fmean(s["reward"] for s in summaries), "rollout/steps_per_s": steps / seconds}
    metrics["episode/ended"] = float(len(returns))
    if returns:
        metrics["episode/return"] = statistics.fmean(returns)
        metrics["episode/length"] = statistics.fmean(x for s in summaries for x in s["lengths"])
        metrics["episode/truncated"] = statistics.fmean(x for s in summaries for x in s["truncated"])
    return metrics


def evaluation(episodes: Sequence[Episode]) -> dict[str, float]:
    """Mean return with the half-width of its 95 % confidence interval (normal), and how the episodes ended."""
    returns = [e.total for e in episodes]
    spread = statistics.stdev(returns) if len(returns) > 1 else math.nan
    return {
        "eval/return": statistics.fmean(returns),
        "eval/return_ci95": 1.96 * spread / math.sqrt(len(returns)),
        "eval/length": statistics.fmean(e.steps for e in episodes),
        "eval/truncated": statistics.fmean(e.truncated for e in episodes),
        "eval/episodes": float(len(episodes)),
    }
