"""Exhaustive search and exact evaluation of a finite world's rules."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NamedTuple, TypeVar

from reasoner_ray.envs.text.base import Outcome, Rules

S = TypeVar("S")


def reachable(rules: Rules[S, Any]) -> dict[S, bool]:
    """Every reachable state, and whether the task is done there."""
    found, waiting = {rules.start: False}, [rules.start]
    for state in waiting:
        for outcome in _outcomes(rules, state).values():
            if outcome.state not in found:
                found[outcome.state] = outcome.success
                waiting += [] if outcome.success else [outcome.state]
    return found


class Best(NamedTuple):
    """A shortest way among those with the highest discounted return."""

    value: float
    actions: list[str]
    steps: int


def best(rules: Rules[S, Any], discount: float) -> Best:
    """By value iteration; a bonus too small to matter prefers fewer actions."""
    living = [state for state, done in reachable(rules).items() if not done]
    outcomes = {state: _outcomes(rules, state) for state in living}
    values = dict.fromkeys(living, 0.0)

    def worth(outcome: Outcome[S]) -> float:
        return outcome.reward - 1e-9 + (0.0 if outcome.success else discount**outcome.steps * values[outcome.state])

    change = 1.0
    while change > 1e-12:
        new = {state: max(map(worth, outcomes[state].values())) for state in living}
        change = max(abs(new[state] - values[state]) for state in living)
        values = new
    state, way, steps, done = rules.start, list[str](), 0, False
    while not done:
        text, outcome = max(outcomes[state].items(), key=lambda pair: worth(pair[1]))
        way.append(text)
        state, steps, done = outcome.state, steps + outcome.steps, outcome.success
    return Best(values[rules.start], way, steps)


class Random(NamedTuple):
    """What a uniformly random policy comes to."""

    value: float  # discounted return
    success: float
    actions: float


def random_policy(rules: Rules[S, Any], discount: float, limit: int) -> Random:
    """Exact, by dynamic programming over the steps taken."""
    at: list[dict[S, float]] = [defaultdict(float) for _ in range(limit)]
    at[0][rules.start] = 1.0
    value = success = actions = 0.0
    for time, here in enumerate(at):
        for state, p in here.items():
            for outcome in _outcomes(rules, state, limit - time).values():
                share = p / len(rules.actions(state))
                value += share * discount**time * outcome.reward
                actions += share
                if outcome.success:
                    success += share
                elif time + outcome.steps < limit:
                    at[time + outcome.steps][outcome.state] += share
    return Random(value, success, actions)


def _outcomes(rules: Rules[S, Any], state: S, budget: int = 10**6) -> dict[str, Outcome[S]]:
    return {text: rules.outcome(state, action, budget) for text, action in rules.actions(state).items()}
