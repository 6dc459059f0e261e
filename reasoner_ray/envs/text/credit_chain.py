"""A chain of three decisions that shows where an algorithm puts its credit (the case study of POAD, Wen et al. 2024).

Open the microwave, put the pancake in, close it. Where two actions are offered they differ in their first word alone,
so a right critic gives that word all of the credit and the rest of the action none.
"""

from __future__ import annotations

from functools import cache

from reasoner_ray.envs.text.base import FiniteEnvironment, Machine, Outcome, Rules

_OPEN, _PUT, _CLOSE = _RIGHT = "open the microwave", "put the pancake in the microwave", "close the microwave"
_SCENES = (
    "You hold a pancake in front of a closed microwave.",
    "You hold a pancake in front of an open microwave.",
    "The pancake lies in the open microwave.",
    "The pancake is in the closed microwave.",
)


class CreditChainRules(Rules[int, str]):
    """A state is how many of the three right actions were taken."""

    start = 0

    def actions(self, state: int) -> dict[str, str]:
        """Both verbs, except in the middle of the chain."""
        return {_PUT: _PUT} if state == 1 else {_OPEN: _OPEN, _CLOSE: _CLOSE}

    def outcome(self, state: int, action: str, budget: int) -> Outcome[int]:
        """The right action goes on, the last one to a reward of 1; the other action changes nothing."""
        after = state + (action == _RIGHT[state])
        done = after == len(_RIGHT)
        return Outcome(after, float(done), done)

    def observe(self, state: int) -> str:
        """The pancake and the microwave."""
        return f"{_SCENES[state]} The task is to heat up the pancake. Your next step is to"


@cache
def _machine() -> Machine[int, str]:
    return Machine(CreditChainRules())


class CreditChain(FiniteEnvironment[int, str]):
    """Three right actions bring 1 (a discounted return of 0.95^2); the fifth step without them ends the episode with -1."""

    limit = 5
    discount = 0.95
    reward_at_limit = -1.0

    def __init__(self) -> None:
        super().__init__(_machine())
