"""Rewards of steps: hand-computed cases, and what they add up to whatever the scores."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reasoner_ray.credit import Transform, normalise_groups, step_rewards

SCORES = torch.tensor([0.75, 0.25, 0.5, 1.0, 0.5])
SOLUTION = torch.tensor([0, 0, 0, 1, 1])
BY_HAND: dict[Transform, list[float]] = {
    "raw": [0.75, 0.25, 0.5, 1.0, 0.5],
    "difference": [0.5, -0.5, 0.25, 0.75, -0.5],  # from an initial 0.25
    "shaping": [0.5, -0.5, -0.25, 0.75, -1.0],
    "minimum": [0.75, -0.5, 0.0, 1.0, -0.5],
}

solutions = st.lists(st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=6), min_size=1, max_size=5)


def flat(lists: list[list[float]]) -> tuple[torch.Tensor, torch.Tensor]:
    scores = torch.tensor([s for each in lists for s in each])
    return scores, torch.tensor([i for i, each in enumerate(lists) for _ in each])


@pytest.mark.parametrize("transform", BY_HAND)
def test_by_hand(transform: Transform) -> None:
    assert step_rewards(SCORES, SOLUTION, transform, initial=0.25).tolist() == BY_HAND[transform]


@given(solutions, st.floats(-1, 1, width=32))
def test_what_the_rewards_add_up_to(lists: list[list[float]], initial: float) -> None:
    scores, solution = flat(lists)
    sums = {
        transform: torch.zeros(len(lists)).index_add(0, solution, step_rewards(scores, solution, transform, initial=initial))
        for transform in BY_HAND
    }
    for i, each in enumerate(lists):
        assert float(sums["raw"][i]) == pytest.approx(sum(each), abs=1e-4)
        assert float(sums["difference"][i]) == pytest.approx(each[-1] - initial, abs=1e-4), "last minus first"
        assert float(sums["shaping"][i]) == pytest.approx(-initial, abs=1e-4), "the same for every solution: the optimum stays"
        assert float(sums["minimum"][i]) == pytest.approx(min(each), abs=1e-4)


def returns(rewards: torch.Tensor, gamma: float) -> float:
    """What they are worth when the first step is chosen."""
    return sum(gamma**t * float(r) for t, r in enumerate(rewards))


WAYS = {
    "short": ([0.0], [1.0]),  # potentials after each step, rewards of the world
    "long": ([0.9, 1.0, 0.0], [0.0, 0.0, 1.2]),
    "endless": ([0.9, 1.0, 0.9, 1.0, 0.9, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0, 1.2]),
}
"""A tiny decision process: from the start one step to a goal worth 1, or three to one worth 1.2, with a loop on the way."""


def best_way(transform: Transform, gamma: float, shaped_with: float) -> str:
    """The way of the highest discounted return, world and process rewards together."""

    def worth(name: str) -> float:
        potentials, world = (torch.tensor(x) for x in WAYS[name])
        n = len(potentials)
        extra = step_rewards(potentials, torch.zeros(n).long(), transform, discount=torch.full((n,), shaped_with))
        return returns(world + extra, gamma)

    return max(WAYS, key=worth)


def test_shaping_with_the_discount_of_the_algorithm_keeps_the_optimum() -> None:
    """At 0.9 the short way is best (1 against 0.972); raw scores and undiscounted shaping (0.972 + 0.9 + 0.09 - 0.81) change that."""
    for gamma, best in ((0.9, "short"), (1.0, "long"), (0.95, "long")):  # at 0.95 the long way is worth 1.083
        assert max(WAYS, key=lambda name: returns(torch.tensor(WAYS[name][1]), gamma)) == best
        assert best_way("shaping", gamma, gamma) == best
    assert best_way("raw", 0.9, 0.9) == "endless", "scores of steps pay for going round"
    assert best_way("shaping", 0.9, 1.0) == "long", "and shaping without the discount pays for arriving later"


@given(solutions, st.floats(0.5, 1, width=32), st.floats(-1, 1, width=32))
def test_discounted_returns_of_shaping_and_difference(lists: list[list[float]], gamma: float, initial: float) -> None:
    scores, solution = flat(lists)
    discount = torch.full_like(scores, gamma)
    counts = [len(each) for each in lists]
    for each, shaped, changed in zip(
        lists,
        step_rewards(scores, solution, "shaping", initial=initial, discount=discount).split(counts),
        step_rewards(scores, solution, "difference", initial=initial, discount=discount).split(counts),
        strict=True,
    ):
        assert returns(shaped, gamma) == pytest.approx(-initial, abs=1e-4)
        assert returns(changed, gamma) == pytest.approx(gamma ** (len(each) - 1) * each[-1] - initial, abs=1e-4)


@given(solutions)
def test_the_minimum_pays_only_where_a_new_one_appears(lists: list[list[float]]) -> None:
    rewards = step_rewards(*flat(lists), "minimum").tolist()
    at = 0
    for each in lists:
        for t, score in enumerate(each):
            if t and score >= min(each[:t]):
                assert rewards[at + t] == 0
            elif t:
                assert rewards[at + t] < 0
        at += len(each)


@given(solutions, solutions)
def test_a_solution_is_rewarded_by_itself(one: list[list[float]], other: list[list[float]]) -> None:
    for transform in BY_HAND:
        alone = step_rewards(*flat(one), transform, initial=0.5)
        together = step_rewards(*flat([*one, *other]), transform, initial=0.5)
        assert together[: len(alone)].tolist() == alone.tolist()


@given(solutions)
def test_more_steps_earn_nothing_under_the_minimum(lists: list[list[float]]) -> None:
    """Saying something harmless again and again is paid by raw scores, and by no other."""
    padded = [[*each, max(each), max(each)] for each in lists]
    before, after = step_rewards(*flat(lists), "minimum").sum(), step_rewards(*flat(padded), "minimum").sum()
    assert float(after) == pytest.approx(float(before), abs=1e-4)


def test_groups_by_hand() -> None:
    rewards, group = torch.tensor([1.0, 3.0, 5.0, 5.0, 7.0]), torch.tensor([4, 4, 2, 2, 9])
    assert normalise_groups(rewards, group).tolist() == [-1.0, 1.0, 0.0, 0.0, 0.0], "a group that is all equal says nothing"


@given(solutions, solutions)
def test_a_group_is_normalised_by_itself(one: list[list[float]], other: list[list[float]]) -> None:
    """Not over the whole buffer, as OpenR does: what another prompt earned changes nothing."""
    a, b = flat(one)[0], flat(other)[0]
    group = torch.cat([torch.zeros(len(a)), torch.ones(len(b))]).long()
    normed = normalise_groups(torch.cat([a, b]), group)[: len(a)]
    assert normed.tolist() == normalise_groups(a, torch.zeros(len(a), dtype=torch.int64)).tolist()
    if float(a.double().std(correction=0)) > 1e-3:
        assert float(normed.mean()) == pytest.approx(0, abs=1e-4)
        assert float(normed.std(correction=0)) == pytest.approx(1, abs=1e-3)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="do not align"):
        step_rewards(SCORES, SOLUTION[:3], "raw")
    with pytest.raises(ValueError, match="ascending"):
        step_rewards(SCORES, SOLUTION.flip(0), "minimum")
    empty = torch.zeros(0)
    for transform in BY_HAND:
        assert step_rewards(empty, empty.long(), transform).shape == (0,)
