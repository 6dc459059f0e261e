"""Entertainment against the published facts of the task, by exhaustive search.

The hidden states are 135, where 303 were counted in the original: its graph also keeps what nothing depends on.
"""

from __future__ import annotations

import pytest

from reasoner_ray.envs.text.entertainment import Entertainment, State
from tests.envs.exhaustive import best, random_policy, reachable


def test_states_observations_and_lists() -> None:
    rules = Entertainment().rules
    states = reachable(rules)
    assert (len(states), sum(states.values())) == (135, 3)
    assert len({rules.observe(state) for state in states}) == 92
    assert all(rules.actions(state) for state, done in states.items() if not done)
    assert [state for state, done in states.items() if done != state.done] == []


def test_what_looks_alike_offers_the_same_actions() -> None:
    rules = Entertainment().rules
    offered: dict[str, set[tuple[str, ...]]] = {}
    for state, done in reachable(rules).items():
        if not done:
            offered.setdefault(rules.observe(state), set()).add(tuple(rules.actions(state)))
    assert all(len(lists) == 1 for lists in offered.values())


def test_the_optimum_takes_eleven_actions() -> None:
    found = best(Entertainment().rules, 0.95)
    assert len(found.actions) == 11
    assert found.value == pytest.approx(0.95**10, abs=1e-6)


def test_a_random_policy_by_dynamic_programming() -> None:
    found = random_policy(Entertainment().rules, 0.95, Entertainment.limit)
    assert found.success == pytest.approx(0.0017, abs=5e-5)
    assert found.value == pytest.approx(0.0002, abs=5e-5)


def test_the_published_way_is_played() -> None:
    env = Entertainment()
    env.reset(seed=0)
    walk = ["chips", "pick up the chips", "milk", "pick up the milk", "living room", "coffee table", "put the chips on the coffee table"]
    way = [word if " the " in word else f"walk to the {word}" for word in [*walk, "TV", "turn on the TV", "sofa"]]
    for action in way:
        _, reward, terminated, truncated, info = env.step(action)
        assert (reward, terminated, truncated, info["invalid"]) == (0.0, False, False, False), action
    _, reward, terminated, _, info = env.step("sit down on the sofa")
    assert (reward, terminated, info["success"], info["admissible"]) == (1.0, True, True, [])
    assert info["metrics"]["discounted_return"] == pytest.approx(0.5987, abs=1e-4)


def test_the_tv_takes_a_free_hand() -> None:
    at_tv = State(room="living room", things=("hand", "hand"), near="TV")
    actions = Entertainment().rules.actions
    assert not any("turn" in text for text in actions(at_tv))
    assert actions(at_tv._replace(things=("coffee table", "hand")))["turn on the TV"].tv_on


def test_the_rest_of_the_house_is_out_of_sight() -> None:
    observe = Entertainment().rules.observe
    assert observe(State("bedroom", ("coffee table", "kitchen"), tv_on=True)) == observe(State("bedroom"))
    assert "milk" not in observe(State("kitchen", ("kitchen", "coffee table"))).partition("You are in")[2]
