"""What a search costs, and when it has cost enough."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from reasoner_ray.scoring.step_scorers import StepScorer
    from reasoner_ray.search.settings import BudgetConfig

Resource = Literal["generated", "prompt", "scorer", "seconds"]


@dataclass(slots=True)
class Cost:
    """Totals of a search. Everything sampled counts, whether it was of use or not."""

    generated: int = 0  # tokens sampled
    discarded: int = 0  # of them: steps that were cut, or sampled twice from the same place
    prompt: int = 0  # tokens of all prompts, one a sampled sequence
    prompt_cached: int = 0  # of them: not computed, the engine had them (what it cannot tell counts as computed)
    scorer: int = 0  # tokens a scorer's model computed
    requests: int = 0  # sequences sampled
    cut: int = 0  # sequences that a limit of tokens ended, not the model
    seconds: float = 0.0

    @property
    def prompt_computed(self) -> int:
        """Prompt tokens that were computed."""
        return self.prompt - self.prompt_cached

    def as_dict(self) -> dict[str, float]:
        """Every total by name, ``prompt_computed`` among them."""
        return {**asdict(self), "prompt_computed": self.prompt_computed}


class Meter:
    """Watches a search's cost against its budget."""

    def __init__(
        self, budget: BudgetConfig, cost: Cost, scorer: StepScorer | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """``cost`` is what the policy counts into; the scorer's tokens and the time since now are read when asked for."""
        self._cost = cost
        self._budget, self._scorer, self._clock = budget, scorer, clock
        self._began = clock()

    @property
    def cost(self) -> Cost:
        """The totals now."""
        self._cost.seconds = self._clock() - self._began
        if self._scorer is not None:
            self._cost.scorer = self._scorer.tokens
        return self._cost

    @property
    def spent(self) -> Resource | None:
        """The first budget that is used up, or None."""
        cost, budget = self.cost, self._budget
        pairs: tuple[tuple[Resource, float, float | None], ...] = (
            ("generated", cost.generated, budget.generated),
            ("prompt", cost.prompt_computed, budget.prompt),
            ("scorer", cost.scorer, budget.scorer),
            ("seconds", cost.seconds, budget.seconds),
        )
        return next((name for name, used, limit in pairs if limit is not None and used >= limit), None)
