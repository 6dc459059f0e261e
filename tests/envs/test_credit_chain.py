"""The chain of three decisions."""

from __future__ import annotations

import pytest

from reasoner_ray.envs.text.credit_chain import CreditChain
from tests.envs.exhaustive import best, random_policy, reachable

WAY = ["open the microwave", "put the pancake in the microwave", "close the microwave"]


def test_three_states_and_the_way_through_them() -> None:
    rules = CreditChain().rules
    assert reachable(rules) == {0: False, 1: False, 2: False, 3: True}
    assert best(rules, 0.95).actions == WAY
    assert [len(rules.actions(state)) for state in range(3)] == [2, 1, 2]


def test_actions_differ_in_their_first_word_alone() -> None:
    one, other = CreditChain().rules.actions(0)
    assert one.split()[0] != other.split()[0] and one.split()[1:] == other.split()[1:]


def test_the_right_way_brings_one() -> None:
    env = CreditChain()
    env.reset()
    rewards = []
    for action in WAY:
        _, reward, terminated, truncated, info = env.step(f" {action}")
        rewards.append(reward)
    assert (rewards, terminated, truncated, info["success"]) == ([0.0, 0.0, 1.0], True, False, True)
    assert info["metrics"]["discounted_return"] == pytest.approx(0.95**2)


@pytest.mark.parametrize("last", ["close the microwave", "nonsense"])
def test_five_steps_without_an_end_cost_one(last: str) -> None:
    env = CreditChain()
    env.reset()
    steps = [env.step("close the microwave") for _ in range(4)] + [env.step(last)]
    assert [reward for _, reward, *_ in steps] == [0.0, 0.0, 0.0, 0.0, -1.0]
    assert [truncated for *_, truncated, _ in steps] == [False] * 4 + [True]


def test_success_on_the_fifth_step_is_success() -> None:
    env = CreditChain()
    env.reset()
    for action in ("close the microwave", WAY[0], WAY[1], "open the microwave"):
        env.step(action)
    _, reward, terminated, truncated, _ = env.step(WAY[2])
    assert (reward, terminated, truncated) == (1.0, True, False)


def test_a_random_policy_succeeds_where_it_is_right_twice_in_four_flips() -> None:
    # One step is no choice: of the other four, two must be right (the order of the states does not matter).
    assert random_policy(CreditChain().rules, 0.95, CreditChain.limit).success == pytest.approx(1 - (1 + 4) / 16)
