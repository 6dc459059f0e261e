"""From the scores of steps to a solution's value, and from solutions to an answer. Pure functions.

Sources: Lightman et al. 2023, Math-Shepherd (min, product), OpenR (last; arXiv 2410.09671), TS-LLM (votes by a value; arXiv 2309.17179).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from reasoner_ray.errors import ScoringError
from reasoner_ray.search.settings import AnswersBy, StepsAs


@dataclass(frozen=True, slots=True)
class Choice:
    """The answer chosen among the n solutions of a search."""

    index: int  # the solution that stands for it: of those that give this answer, the most valuable
    confidence: float  # the answer's share of all votes, in [0, 1]
    shares: tuple[float, ...]  # [answers]; of each answer, in the order they came; they add up to 1


def solution_value(scores: Sequence[float], how: StepsAs) -> float:
    """A solution's value out of the scores of its steps. Raises ``ScoringError`` where the scores cannot be put together."""
    if not scores:
        raise ScoringError("a solution without a step has no value")
    if how == "last":
        return scores[-1]
    if how == "min":
        return min(scores)
    if how == "mean":
        return fmean(scores)
    if min(scores) < 0:
        raise ScoringError(f"the product of scores needs scores of at least 0 (got {min(scores)}); take last, min or mean")
    return math.prod(scores)


def vote_weights(values: Sequence[float]) -> list[float]:
    """What each value counts in a vote: itself, or where one is negative its place between the lowest and the highest.

    (v - min) / (max - min + 1e-3), in [0, 1): a value model trained on +1 and -1 would else vote against an answer for being
    given often (TS-LLM).
    """
    if not values or min(values) >= 0:
        return list(values)
    low, spread = min(values), max(values) - min(values)
    return [(value - low) / (spread + 1e-3) for value in values]


def answer_shares(groups: Sequence[int], values: Sequence[float], how: AnswersBy) -> dict[int, float]:
    """Each answer's share of the votes; equal ones where all weights are 0, so that solutions then count by number."""
    weights = [1.0] * len(groups) if how == "majority" else vote_weights(values)
    if not sum(weights):
        weights = [1.0] * len(groups)
    shares = dict.fromkeys(groups, 0.0)
    for group, weight in zip(groups, weights, strict=True):
        shares[group] += weight / sum(weights)
    return shares


def choose_answer(groups: Sequence[int], values: Sequence[float], how: AnswersBy, valid: Sequence[bool] | None = None) -> Choice:
    """The answer of n solutions: ``groups[i]`` says which answer solution i gives, ``values[i]`` what it is worth.

    ``valid[i]`` is false where no answer could be read: such solutions are left out, unless there is no other. Of equal answers
    the one given more often wins, then the one that came first. Raises ``ValueError`` without a solution.
    """
    if not groups:
        raise ValueError("there is no solution to choose an answer from")
    kept = [i for i in range(len(groups)) if valid is None or valid[i]] or list(range(len(groups)))
    own, worth = [groups[i] for i in kept], [values[i] for i in kept]
    shares = answer_shares(own, worth, how)

    def rank(group: int) -> tuple[float, int]:
        best = max(value for value, g in zip(worth, own, strict=True) if g == group)
        return (best if how == "max" else shares[group], own.count(group))

    chosen = max(shares, key=rank)  # of equal ones the first
    index = max((i for i in kept if groups[i] == chosen), key=lambda i: values[i])
    return Choice(index, shares[chosen], tuple(shares.values()))
