"""What kind agdc needs to know of a problem: its episodes, the belief about what is searched for, and when an estimate is right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from gymnasium.vector import VectorEnv

from reasoner_ray.agents.agdc.cessation import BeliefSummary
from reasoner_ray.agents.agdc.detection import Belief
from reasoner_ray.agents.agdc.settings import AgdcConfig
from reasoner_ray.envs.source_term.core import Step
from reasoner_ray.errors import ConfigError
from reasoner_ray.registry import Registry, load_dotted, suggest

PROBLEMS = {
    "object_search": "reasoner_ray.agents.agdc.object_search:ObjectSearchProblem",
    "source_term": "reasoner_ray.agents.agdc.source_problem:SourceTermProblem",
}
"""``agdc.problem``. A name leads to a module that is imported when it is asked for: each needs packages of its own."""


class Search(Protocol):
    """E episodes under way, for evaluation: all go on together, and none begins anew by itself."""

    n: int
    position: torch.Tensor
    """Of the agents, [E, 2]."""

    @property
    def distance(self) -> torch.Tensor:
        """How far each agent is from the goal in truth, [E]."""
        ...

    def reset(self, mask: torch.Tensor | None = None, seeds: Sequence[int | None] | None = None) -> torch.Tensor:
        """Begin the episodes in ``mask`` (all without one), those with a seed from it; returns the observation [E, D]."""
        ...

    def step(self, actions: torch.Tensor) -> Step:
        """A step of all."""
        ...

    def observe(self) -> torch.Tensor:
        """The observation [E, D]."""
        ...


@dataclass(frozen=True, slots=True)
class View:
    """What a policy is asked about: E searches under way. Search and belief are those of its problem."""

    search: Any
    belief: Any
    features: torch.Tensor  # float32 [E, F]


class Policy(Protocol):
    """Chooses moves."""

    def act(self, view: View) -> torch.Tensor:
        """An action of the environment for each episode, [E]."""
        ...


class Problem(Protocol):
    """A search that nothing says is over. It is made from the job's section ``agdc``."""

    max_steps: int
    planners: Registry[type]
    """Policies to compare with, by the names that ``agdc.policy`` takes; each is made with ``seed``."""

    def __init__(self, agdc: AgdcConfig) -> None:
        """Raises ``ReasonerError``."""
        ...

    def vector(self, n: int) -> VectorEnv[Any, Any, Any]:
        """``n`` episodes as RLlib plays them, in autoreset mode ``NEXT_STEP``."""
        ...

    def search(self, n: int) -> Search:
        """The same episodes, for evaluation."""
        ...

    def belief(self, n: int) -> Belief:
        """Of ``n`` episodes."""
        ...

    def plain(self, observation: torch.Tensor) -> torch.Tensor:
        """Observations [E, D] as numbers of order 1, float32: what a policy without a belief is shown."""
        ...

    def action(self, chosen: torch.Tensor) -> torch.Tensor:
        """What the environment takes [E] for what a module of RLlib puts out."""
        ...

    def error(self, search: Any, summary: BeliefSummary) -> torch.Tensor:
        """How wrong each episode's estimate is, [E]; at most ``agdc.tolerance`` is right."""
        ...

    def picture(self, search: Any, belief: Any, way: torch.Tensor, title: str) -> np.ndarray:
        """The first episode, after the way [T, 2], as an RGB image, uint8 [H, W, 3]."""
        ...


def make_problem(agdc: AgdcConfig) -> Problem:
    """The problem that ``agdc.problem`` names. Raises ``ReasonerError``."""
    path = PROBLEMS.get(agdc.problem, agdc.problem)
    if ":" not in path:
        raise ConfigError(f"agdc.problem: unknown problem {path!r}; {suggest(path, sorted(PROBLEMS))}, or module:Class of your own")
    problem: Problem = load_dotted(path, "agdc.problem")(agdc)
    return problem
