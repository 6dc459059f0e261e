"""Rewards at the ends of steps: a step scorer judges a group's trajectories, and its scores become rewards beside the outcome's."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch

from reasoner_ray.algorithms import get_algorithm
from reasoner_ray.credit import normalise_groups, step_rewards
from reasoner_ray.errors import ScorerGaveUp, ScoringError
from reasoner_ray.prm import step_scorer  # noqa: F401 - registers prm and judge
from reasoner_ray.scoring.step_scorers import STEP_SCORERS, StepScorer, StepScorerContext, score_steps
from reasoner_ray.steps import Cut, Partial, read_cut, segment
from reasoner_ray.trajectory import Bootstrap, Status, Trajectory, flatten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from reasoner_ray.config import JobConfig
    from reasoner_ray.prm.settings import ProcessRewardConfig


class _NoEngine:
    """Stands where a search has the policy's engine: scorer actors have none."""

    def __getattr__(self, name: str) -> NoReturn:
        raise ScoringError("this step scorer asks the policy's engine, which scorers of RL do not have; take scoring.process.scorer=prm")


class ProcessReward:
    """Puts process rewards on groups of trajectories. Thread-safe where its scorers are."""

    def __init__(
        self,
        config: ProcessRewardConfig,
        scorer: Callable[[], StepScorer],
        tokenizer: PreTrainedTokenizerBase,
        discounts: tuple[float, float] = (1.0, 1.0),
        bootstrap: Bootstrap = "none",
    ) -> None:
        """``scorer`` makes one for each group; ``discounts`` and ``bootstrap`` are the algorithm's (``Algorithm.wants_bootstrap``)."""
        self._bootstrap = bootstrap
        self._config, self._scorer, self._tokenizer, self._discounts = config, scorer, tokenizer, discounts
        self._cut = None if config.separator is None else read_cut(config.separator)

    @classmethod
    def of(cls, job: JobConfig, tokenizer: PreTrainedTokenizerBase) -> ProcessReward | None:
        """What a job asks for, or None. Raises ``ConfigError`` for an unknown scorer."""
        config = job.scoring.process
        if config is None:
            return None
        factory = STEP_SCORERS.get(config.scorer)
        algorithm = get_algorithm(job.algorithm.name)
        engine: Any = _NoEngine()

        def make() -> StepScorer:
            return factory(StepScorerContext(config=job, engine=engine, tokenizer=tokenizer), **config.args)

        settings = algorithm.settings(job.algorithm.settings)
        return cls(config, make, tokenizer, algorithm.discounts(settings), algorithm.wants_bootstrap(settings))

    async def start(self) -> None:
        """Let a scorer that has actors start them. Raises ``ReasonerError``."""
        start = getattr(self._scorer(), "start", None)
        if start is not None:
            await start()

    async def stop(self) -> None:
        """Let a scorer that has actors end them."""
        stop = getattr(self._scorer(), "stop", None)
        if stop is not None:
            await stop()

    def apply(self, trajectories: Sequence[Trajectory]) -> tuple[list[Trajectory], dict[str, Any]]:
        """One group with its process rewards, and what the summary says of them.

        Rewards lie on the last token of each step. Where the scorer fails, every trajectory it should have judged comes back
        FAILED: a score that there is not is no 0. The summary holds, a trajectory each, ``outcomes`` (the reward without
        the process), and ``process``: ``score`` of the whole solution, ``reward``, ``truth``, ``steps``, ``tokens`` of
        those that were judged; ``unscored`` counts failures by error type.
        """
        extra: dict[str, Any] = {"outcomes": [t.total_reward if t.status.is_trainable else math.nan for t in trajectories], "unscored": {}}
        judged = [i for i, t in enumerate(trajectories) if t.status.is_trainable and t.trainable_tokens]
        try:
            partials = [partial_of(trajectories[i], self._tokenizer, self._cut) for i in judged]
            scores = asyncio.run(score_steps(self._scorer(), partials))
        except Exception as error:  # noqa: BLE001 - someone else's scorer may raise anything; the driver bounds how often
            kind = error.error_type if isinstance(error, ScorerGaveUp) else type(error).__name__
            failed = {"score_status": "timeout" if kind == "Timeout" else "error", "error_type": kind}
            failed["error"] = f"process reward: {error}"[:500]
            marked = [t.with_status(Status.FAILED, **failed) if i in judged else t for i, t in enumerate(trajectories)]
            return marked, extra | {"unscored": {kind: len(judged)}}
        discounts = [discounts_of(trajectories[i], p, *self._discounts) for i, p in zip(judged, partials, strict=True)]
        rewards = self._rewards(scores, discounts, [trajectories[i].goes_on(self._bootstrap) for i in judged])
        result = list(trajectories)
        for i, partial, each in zip(judged, partials, rewards, strict=True):
            result[i] = self._with_rewards(trajectories[i], partial, each)
        about = {
            "score": [self._solution_score(each) for each in scores],
            "reward": [float(each.sum()) * self._config.weight for each in rewards],
            "truth": [_truth(trajectories[i]) for i in judged],
            "steps": [len(each) for each in scores],
            "tokens": [trajectories[i].trainable_tokens for i in judged],
        }
        return result, extra | {"process": about}

    def _rewards(
        self, scores: list[list[float]], discounts: list[tuple[list[float], list[float]]], goes_on: list[bool]
    ) -> list[torch.Tensor]:
        """Rewards of the steps of each solution, before the weight."""
        counts = [len(each) for each in scores]
        flat = torch.tensor([score for each in scores for score in each], dtype=torch.float32)
        solution = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts, dtype=torch.int64))
        discount, inside = (torch.tensor([g for each in discounts for g in each[side]], dtype=torch.float32) for side in (0, 1))
        rewards = step_rewards(
            flat,
            solution,
            self._config.transform,
            initial=self._config.initial,
            discount=discount,
            inside=inside,
            goes_on=torch.tensor(goes_on, dtype=torch.bool)[solution],
        )
        if self._config.normalise == "group":
            rewards = normalise_groups(rewards, torch.zeros_like(solution))
        return list(rewards.split(counts))

    def _with_rewards(self, trajectory: Trajectory, partial: Partial, rewards: torch.Tensor) -> Trajectory:
        total = trajectory.rewards * np.float32(self._config.outcome_weight)
        total[np.array(partial.ends) - 1] += np.float32(self._config.weight) * rewards.numpy()
        return replace(trajectory, rewards=total)

    def _solution_score(self, scores: list[float]) -> float:
        """What the transform makes of a solution's scores: the figure that training drives up."""
        if self._config.transform == "raw":
            return math.fsum(scores) / len(scores)
        return min(scores) if self._config.transform == "minimum" else scores[-1]


def partial_of(trajectory: Trajectory, tokenizer: PreTrainedTokenizerBase, separator: Cut | None) -> Partial:
    """The steps of a trajectory: each turn of the policy, cut after each ``separator``; what others write belongs to the step behind it.

    Raises ``ScoringError`` where an episode forgot its earlier turns, since a solution has one context.
    """
    spans = [s for s in trajectory.spans if s.kind == "model" and s.end > s.start]
    if any(s.context_start for s in spans):
        raise ScoringError("process rewards need episodes of one context; this one begins anew with a turn (rollout.agent.history_tokens)")
    tokens = trajectory.tokens.tolist()
    ends: list[int] = []
    for span in spans:
        ends += [span.end] if separator is None else segment(tokens[: span.end], tokenizer, separator, start=span.start)
    return Partial(tuple(tokens[: ends[-1]]), tuple(ends), spans[0].start)


def discounts_of(trajectory: Trajectory, partial: Partial, token: float, action: float) -> tuple[list[float], list[float]]:
    """Of each step what a reward is discounted by behind its last token, and between its first token and its last.

    ``token`` and ``action`` are the discounts behind a token inside an action and behind an action's last one, of each step of the
    environment that it took; tokens of others pass no time.
    """
    streams = flatten([trajectory])
    assert streams.durations is not None
    after = torch.where(streams.action_end, action**streams.durations, token)  # as ``hierarchical_gae`` discounts
    discount = dict(zip(np.flatnonzero(trajectory.loss_mask).tolist(), after.tolist(), strict=True))
    behind, inside = [], []
    for begin, end in zip((partial.start, *partial.ends), partial.ends, strict=False):
        *earlier, last = [discount[place] for place in range(begin, end) if place in discount] or [1.0]
        behind.append(last)
        inside.append(math.prod(earlier))
    return behind, inside


def _truth(trajectory: Trajectory) -> float:
    """Whether the answer is right: the first term of the outcome, before its weight, or the whole of it."""
    parts = trajectory.info.get("score_parts") or {}
    return float(next(iter(parts.values()), trajectory.total_reward))
