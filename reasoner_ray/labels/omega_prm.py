"""OmegaPRM (Luo et al. 2024, arXiv:2406.06592): a tree of states, grown where a binary search finds the first error of a rollout.

A state s is the question and some first steps; MC(s) is the share of right answers among k rollouts from it. Of all wrong rollouts r
that start in a state with 0 < MC(s) < 1, the one with the highest Q(s, r) + U(s) is searched next:

    Q(s, r) = alpha^(1 - MC(s)) * beta^(len(r) / L)
    U(s)    = c_puct * sqrt(sum_i N(s_i)) / (1 + N(s))

N(s) counts how often a rollout of s was chosen. A chosen rollout leaves the pool, so none is searched twice. The search halves the
steps between a state from which the answer can still be reached (MC > 0) and one from which it cannot: O(log steps) estimates find
the first error, and every new state with right and wrong rollouts adds the wrong ones to the pool.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from reasoner_ray.labels.estimates import Estimator, Rollout, State
from reasoner_ray.labels.records import LabelledSolution, QuestionLabels
from reasoner_ray.labels.settings import OmegaConfig
from reasoner_ray.steps import Partial


@dataclass(slots=True, eq=False)
class Candidate:
    """A wrong rollout that waits to be searched, and the state it starts in."""

    state: State
    rollout: Rollout


@dataclass(slots=True)
class Pool:
    """The rollouts to choose from. What was in it once never comes in again."""

    settings: OmegaConfig
    candidates: list[Candidate] = field(default_factory=list)
    visits: dict[tuple[int, ...], int] = field(default_factory=dict)  # N(s), by the tokens of s
    _seen: set[tuple[int, ...]] = field(default_factory=set)

    def add(self, state: State) -> None:
        """The wrong rollouts of a state, where it has right ones as well; those that a limit cut show no error to look for."""
        mc = state.mc
        if mc is None or not 0 < mc < 1:
            return
        for rollout in state.rollouts:
            if rollout.right is False and not rollout.cut and rollout.partial.tokens not in self._seen:
                self._seen.add(rollout.partial.tokens)
                self.candidates.append(Candidate(state, rollout))

    def choose(self) -> Candidate:
        """Take out the candidate of the highest priority (of equal ones the oldest) and count the visit."""
        chosen = max(self.candidates, key=self.priority)
        self.candidates.remove(chosen)
        key = chosen.state.partial.tokens
        self.visits[key] = self.visits.get(key, 0) + 1
        return chosen

    def priority(self, candidate: Candidate) -> float:
        """Q(s, r) + U(s), with the counts as they are now."""
        mc = candidate.state.mc
        assert mc is not None  # ``add`` takes no other
        visits = self.visits.get(candidate.state.partial.tokens, 0)
        return quality(mc, candidate.rollout.length, self.settings) + exploration(visits, sum(self.visits.values()), self.settings.c_puct)


def quality(mc: float, length: int, settings: OmegaConfig) -> float:
    """Q(s, r): high for states that are usually right, low for long rollouts (``length`` tokens from s on)."""
    return float(settings.alpha ** (1 - mc) * settings.beta ** (length / settings.length_scale))


def exploration(visits: int, all_visits: int, c_puct: float) -> float:
    """U(s) after ``visits`` of all states' ``all_visits``."""
    return c_puct * math.sqrt(all_visits) / (1 + visits)


async def label_question(estimator: Estimator, root: Partial, settings: OmegaConfig) -> QuestionLabels:
    """Labels for the searched rollouts of a question, and for ``keep_right`` right ones.

    A question whose first rollouts are all right, or all wrong, has nothing to search.
    """
    pool = Pool(settings)
    first = await estimator.estimate(root)
    pool.add(first)
    solutions: list[LabelledSolution] = []
    for _ in range(settings.searches):
        if not pool.candidates or (settings.estimates is not None and estimator.estimates >= settings.estimates):
            break
        candidate = pool.choose()
        error = await find_first_error(estimator, candidate, pool)
        solutions.append(_wrong(estimator, candidate.rollout.partial, error))
    right = [r.partial for state in estimator.states for r in state.rollouts if r.right and not r.cut]
    distinct = list({partial.tokens: partial for partial in right}.values())
    solutions += [_right(estimator, partial) for partial in distinct[: settings.keep_right]]
    return QuestionLabels(
        status=_status(first, solutions),
        solutions=tuple(solutions),
        estimates=estimator.estimates,
        cut=sum(rollout.cut for rollout in first.rollouts),
        graded=estimator.graded,
        grader_failures=estimator.grader_failures,
        states=tuple(_describe(state, pool) for state in estimator.states),
    )


async def find_first_error(estimator: Estimator, candidate: Candidate, pool: Pool) -> int | None:
    """The first step (from 0) of a wrong rollout after which no rollout is right; None where the grader failed on the way.

    Takes ceil(log2(steps after the state)) estimates at most, less what earlier searches have estimated.
    """
    whole = candidate.rollout.partial
    good, bad = _known_bounds(estimator, whole, len(candidate.state.partial.ends))
    while bad - good > 1:
        middle = (good + bad) // 2
        state = await estimator.estimate(whole.until(middle))
        if state.mc is None:
            return None
        if state.mc > 0 or estimator.led_right(state.partial):
            pool.add(state)
            good = middle
        else:
            bad = middle
    return bad - 1


def _known_bounds(estimator: Estimator, whole: Partial, start: int) -> tuple[int, int]:
    """Numbers of steps (good, bad) as near as shared states tell: MC > 0 after good, or a right rollout goes on there; 0 after bad."""
    found = {t: estimator.found(whole.until(t)) for t in range(start + 1, len(whole.ends))}
    good = max((t for t, mc in found.items() if mc or (mc == 0 and estimator.led_right(whole.until(t)))), default=start)
    return good, min((t for t, mc in found.items() if mc == 0 and t > good), default=len(whole.ends))


def _wrong(estimator: Estimator, whole: Partial, error: int | None) -> LabelledSolution:
    soft = _estimated(estimator, whole, 0.0)
    hard = [None if value is None else value > 0 for value in soft] if error is None else [i < error for i in range(len(soft))]
    return LabelledSolution(partial=whole, soft=tuple(soft), hard=tuple(hard), right=False)


def _right(estimator: Estimator, whole: Partial) -> LabelledSolution:
    """After each step of a right solution one completion at least was right: its own."""
    return LabelledSolution(partial=whole, soft=tuple(_estimated(estimator, whole, 1.0)), hard=(True,) * len(whole.ends), right=True)


def _estimated(estimator: Estimator, whole: Partial, last: float) -> list[float | None]:
    """MC after each step, where it was estimated and no right rollout says otherwise; after the last one the answer's grade."""
    prefixes = [whole.until(t) for t in range(1, len(whole.ends))]
    found = [(prefix, estimator.found(prefix)) for prefix in prefixes]
    return [*(None if mc == 0 and estimator.led_right(prefix) else mc for prefix, mc in found), last]


def _status(first: State, solutions: Sequence[LabelledSolution]) -> Any:
    if first.mc is None:
        return "not graded"
    if first.mc in (0.0, 1.0):
        return "all right" if first.mc else "all wrong"
    return "labelled" if solutions else "nothing closed"


def _describe(state: State, pool: Pool) -> dict[str, Any]:
    partial = state.partial
    return {
        "steps": len(partial.ends),
        "tokens": list(partial.solution),
        "mc": state.mc,
        "rollouts": len(state.rollouts),
        "visits": pool.visits.get(partial.tokens, 0),
    }
