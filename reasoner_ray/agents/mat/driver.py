"""The loop of ``kind: mat``: roll out, credit and learn, sync, evaluate. It holds references to segments, never the segments."""

from __future__ import annotations

import asyncio
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reasoner_ray.agents.mat.learner import MatLearners
from reasoner_ray.agents.mat.pool import TeamPool
from reasoner_ray.agents.pool import Collected
from reasoner_ray.agents.stepwise import FIRST_EVAL_SEED
from reasoner_ray.envs.multi_agent.settings import MultiAgentConfig
from reasoner_ray.envs.multi_agent.spec import TeamSpec
from reasoner_ray.envs.multi_agent.teams import Episode
from reasoner_ray.errors import CheckpointError, EnvironmentProblem, SyncError
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
        self._tasks = list(config.multi_agent.tasks)  # labels; none where there is one task
        self._anew_at, self._ended = 0, self._none_ended()  # when all episodes began anew, and how many of each task have ended since
        self._warned: set[int] = set()  # of which tasks it was said that none ever ends
        self._evaluations, self._films = 0, True  # how many there were, and whether episodes can be drawn

    def _none_ended(self) -> list[int]:
        return [0] * max(1, len(self._tasks))

    async def stop(self) -> None:
        """End every actor; safe after any failure."""
        await asyncio.gather(self.parts.workers.stop(), super().stop())

    async def _start(self) -> None:
        workers, learners = self.parts.workers, self.parts.learners
        await workers.start()
        team, *others = workers.teams
        learners.of(team, others)
        await learners.start()

    async def _train(self) -> None:
        self._fresh, self._anew_at, self._ended = True, self.step, self._none_ended()
        if self.step == 0:
            self._steps_done = self._evaluations = 0
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
        for worker, c in enumerate(collected):
            self._ended[worker % len(self._ended)] += len(c.summary["returns"])
        self._begin_anew_if_due()
        await self._sync()
        synced = time.perf_counter()
        metrics = rollout_metrics(collected, rolled_out - began, self._tasks) | learned
        metrics["episode/actions_in_all"] = float(self._steps_done)
        metrics |= {"time/rollout_s": rolled_out - began, "time/learn_s": learnt - rolled_out, "time/sync_s": synced - learnt}
        metrics |= {"time/step_s": synced - began, "faults/worker_restarts": float(self.parts.workers.restarts)}
        eval_every = self.config.trainer.eval_every
        if eval_every and self.step % eval_every == 0:
            await self._evaluate()
        self.parts.tracker.log(self.step, metrics | self._faults)

    def _begin_anew_if_due(self) -> None:
        """After a regular checkpoint all episodes begin anew; say so, once a task, where none of it came to its end before that."""
        every = self.config.trainer.checkpoint_every
        self._fresh = bool(every) and self.step % every == 0
        if not self._fresh or self.step >= self.config.trainer.steps:
            return
        silent = [task for task, ended in enumerate(self._ended) if not ended and task not in self._warned]
        if silent and self.step - self._anew_at == every:
            self._warned.update(silent)
            which = f" of {', '.join(self._tasks[task] for task in silent)}" if self._tasks else ""
            steps = every * self.config.multi_agent.segment_steps
            self.parts.tracker.event(
                f"no episode{which} ended in the {steps} steps between two checkpoints, after which all begin anew: how they end is "
                "never seen. Raise trainer.checkpoint_every, or lower multi_agent.max_steps",
                "warning",
            )
        self._anew_at, self._ended = self.step, self._none_ended()

    def _warnings(self) -> list[str]:
        env, trainer = self.config.multi_agent, self.config.trainer
        limits, steps = [episode_limit(one) for one in (map(env.task, self._tasks) if self._tasks else [env])], env.segment_steps
        between = trainer.checkpoint_every * steps
        late = {task: limit for task, limit in enumerate(limits) if limit is not None and 0 < between < limit}
        if not late or trainer.steps <= trainer.checkpoint_every:
            return []
        self._warned.update(late)
        limit = max(late.values())
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
        """Greedy episodes of every task from fixed seeds."""
        wanted = self.config.trainer.eval_tasks
        if wanted:
            began = time.perf_counter()
            episodes = await self.parts.workers.evaluate_tasks([FIRST_EVAL_SEED + i for i in range(wanted)])
            self.last_eval = evaluation_of_tasks(episodes, self._tasks) | {"time/eval_s": time.perf_counter() - began}
            self.parts.tracker.eval(self.step, self.last_eval | {"episode/actions_in_all": float(self._steps_done)})
            every = self.config.tracking.video_every
            if every and self._films and self._evaluations % every == 0:
                await self._film()
            self._evaluations += 1
        self._evaluated_at = self.step

    async def _film(self) -> None:
        """Draw the first episode of evaluation of every task into ``RUN/videos`` and for W&B; where that fails, say so once and go on."""
        ending = Path(self.config.tracking.video).suffix
        try:
            for task, label in enumerate(self._tasks or [""]):
                name = f"{label or 'episode'}-{self.step:06d}{ending}"
                content = await self.parts.workers.film(task, FIRST_EVAL_SEED, ending)
                self.parts.tracker.video(self.step, f"eval/video/{label}" if label else "eval/video", name, content)
        except EnvironmentProblem as problem:
            self._films = False
            self.parts.tracker.event(f"no episode is drawn: {problem}", "warning")

    def _state(self) -> dict[str, Any]:
        team, *others = [spec.to_dict() for spec in self.parts.workers.teams]
        state = {"team": team, "other_teams": others, "environment_steps": self._steps_done, "workers": self.config.rollout.workers}
        return state | {"tasks": self._tasks, "evaluations": self._evaluations}

    def _check(self, state: dict[str, Any]) -> None:
        # Checkpoints from before there were tasks have one team, and no labels.
        there = [TeamSpec.from_dict(tree) for tree in (state["team"], *state.get("other_teams", []))]
        if (tasks := state.get("tasks", [])) != self._tasks:
            raise CheckpointError(f"the checkpoint is of the tasks {tasks}, multi_agent.tasks are {self._tasks}; start a new run")
        teams = zip(there, self.parts.workers.teams, strict=True)
        difference = next((text for a, b in teams if (text := a.difference(b))), "")
        if difference:
            raise CheckpointError(
                f"the checkpoint is of another team ({difference}); resume with the environment it was written with, or start a new run"
            )
        # A checkpoint from before evaluations were counted begins their count anew.
        self._steps_done, self._evaluations = state["environment_steps"], state.get("evaluations", 0)


def episode_limit(config: MultiAgentConfig) -> int | None:
    """Steps after which an episode ends by time, as far as the job says: its own limit, or the one it gives the environment."""
    limits = [config.max_steps, *(config.args.get(name) for name in ("max_cycles", "max_steps", "max_episode_steps"))]
    return min((limit for limit in limits if isinstance(limit, int)), default=None)


def rollout_metrics(collected: Sequence[Collected], seconds: float, tasks: Sequence[str] = ()) -> dict[str, float]:
    """What the workers' summaries say together, and of each of several ``tasks`` by its label.

    Figures of episodes are of those that ended in this step, and missing where none did.
    """
    summaries = [c.summary for c in collected]
    returns = [x for s in summaries for x in s["returns"]]
    steps = sum(s["steps"] for s in summaries)
    metrics = {"reward/mean": statistics.fmean(s["reward"] for s in summaries), "rollout/steps_per_s": steps / seconds}
    metrics["episode/ended"] = float(len(returns))
    if returns:
        metrics["episode/return"] = statistics.fmean(returns)
        metrics["episode/length"] = statistics.fmean(x for s in summaries for x in s["lengths"])
        metrics["episode/truncated"] = statistics.fmean(x for s in summaries for x in s["truncated"])
    for task, label in enumerate(tasks):
        own = rollout_metrics(collected[task :: len(tasks)], seconds)
        metrics |= {f"{name}/{label}": own[name] for name in ("reward/mean", "episode/return", "episode/length") if name in own}
    return metrics


def evaluation_of_tasks(episodes: Sequence[Sequence[Episode]], tasks: Sequence[str]) -> dict[str, float]:
    """``evaluation`` of the episodes of all tasks together (as many of each), and of each of several by its label.

    The interval of all is that of the mean of the tasks' means: by how much tasks differ from each other is no noise.
    """
    figures = evaluation([e for own in episodes for e in own])
    if not tasks:
        return figures
    each = dict(zip(tasks, map(evaluation, episodes), strict=True))
    figures["eval/return_ci95"] = math.hypot(*(own["eval/return_ci95"] for own in each.values())) / len(each)
    for label, own in each.items():
        figures |= {f"{name}/{label}": value for name, value in own.items() if name != "eval/episodes"}
    return figures


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
