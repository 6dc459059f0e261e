"""What autonomous detection of a goal needs, whatever the environment and the algorithm: a belief, a rule, a reward of one's own.

A user brings a ``Belief`` for an environment of their own; ``GoalDetector`` does the rest, and the wrappers and connectors are thin.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from reasoner_ray.agents.agdc.cessation import BeliefSummary, CessationRule
from reasoner_ray.agents.agdc.settings import FeedbackConfig
from reasoner_ray.seeds import BELIEF, derived_seed


class Belief(Protocol):
    """E beliefs at once, one of each episode."""

    n_features: int

    def reset(self, mask: torch.Tensor, observation: torch.Tensor) -> None:
        """Begin the beliefs in ``mask`` (bool [E]) with an episode's first ``observation`` [E, ...]."""
        ...

    def update(self, mask: torch.Tensor, observation: torch.Tensor) -> None:
        """Take in an ``observation`` [E, ...] for those in ``mask``, as the environment gave it: numbers in it may not be finite."""
        ...

    def summary(self) -> BeliefSummary:
        """What a rule may read."""
        ...

    def features(self) -> torch.Tensor:
        """What a policy may read, float32 [E, n_features], of order 1."""
        ...


@runtime_checkable
class Seeded(Protocol):
    """A belief that draws random numbers."""

    def seed(self, seed: int) -> None:
        """Draw from ``seed`` on."""
        ...


@runtime_checkable
class Counting(Protocol):
    """A belief that counts what is out of order."""

    def faults(self) -> dict[str, int]:
        """Totals since it was made, by name; the names never change."""
        ...


@runtime_checkable
class Drawable(Protocol):
    """A belief that its environment can draw."""

    def drawing(self) -> Any:
        """The first episode's belief, as the environment's ``show_belief`` takes it."""
        ...


@dataclass(frozen=True, slots=True)
class Detection:
    """What the beliefs say after a step."""

    features: torch.Tensor  # float32 [E, F]
    ceased: torch.Tensor  # bool [E]; the agent ends its episode
    reward: torch.Tensor  # float32 [E]; self-feedback, which reads nothing but the belief


class GoalDetector:
    """Belief, cessation rule and self-feedback of E episodes."""

    def __init__(self, belief: Belief, rule: CessationRule, feedback: FeedbackConfig, n: int) -> None:
        """``rule`` decides when an agent ends its episode."""
        self.belief, self.rule, self.feedback, self.n = belief, rule, feedback, n
        self._held = torch.zeros(n, dtype=torch.long)
        self._elapsed = torch.zeros(n, dtype=torch.long)
        self._log_spread = torch.zeros(n)
        self.unreadable = 0
        """Observations with a number that is not finite."""

    def faults(self) -> dict[str, int]:
        """Totals of what was out of order: ``unreadable`` observations, and what the belief counts where it does."""
        own = self.belief.faults() if isinstance(self.belief, Counting) else {}
        return {"unreadable": self.unreadable, **own}

    def seed(self, seed: int | Sequence[int | None] | None) -> None:
        """Make what follows repeatable, where the belief draws random numbers; they are none of an environment's of the same ``seed``.

        Of a vector environment it may be one for each episode.
        """
        each = [one for one in seed if one is not None] if isinstance(seed, Sequence | np.ndarray) else [] if seed is None else [seed]
        if each and isinstance(self.belief, Seeded):
            self.belief.seed(derived_seed(int(each[0]), BELIEF, *(int(one) % 2**64 for one in each[1:])))

    def begin(self, mask: torch.Tensor, observation: torch.Tensor) -> torch.Tensor:
        """Begin the episodes in ``mask`` (bool [E]); returns the features [E, F] of all."""
        self._count(mask, observation)
        self.belief.reset(mask, observation)
        self._held[mask], self._elapsed[mask] = 0, 0
        self._log_spread[mask] = self.belief.summary().log_spread()[mask].cpu()
        return self.belief.features()

    def advance(self, mask: torch.Tensor, observation: torch.Tensor) -> Detection:
        """A step of the episodes in ``mask``: -``step`` each, ``stop`` on cessation, ``information`` times the fall of log(spread)."""
        self._count(mask, observation)
        self.belief.update(mask, observation)
        summary = self.belief.summary()
        self._elapsed[mask] += 1
        wants = self.rule.wants(summary).cpu() & mask
        self._held = torch.where(mask, torch.where(wants, self._held + 1, 0), self._held)
        ceased = wants & (self._held >= self.feedback.patience) & (self._elapsed >= self.feedback.min_steps)
        log_spread = summary.log_spread().cpu()
        gained = self._log_spread - log_spread
        reward = self.feedback.information * gained - self.feedback.step + self.feedback.stop * ceased
        self._log_spread = torch.where(mask, log_spread, self._log_spread)
        return Detection(self.belief.features(), ceased, reward * mask)

    def _count(self, mask: torch.Tensor, observation: torch.Tensor) -> None:
        whole = torch.isfinite(observation).reshape(self.n, -1).all(dim=-1)
        self.unreadable += int((~whole.cpu() & mask).sum())
