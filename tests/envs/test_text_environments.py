"""What every finite text environment keeps to, and how they are found."""

from __future__ import annotations

import copy
import pickle
import random
import subprocess
import sys

import gymnasium
import pytest
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st

from reasoner_ray.envs import ENTRY_POINTS
from reasoner_ray.envs.player import BUILT_IN
from reasoner_ray.envs.text.base import FiniteEnvironment, Machine, Outcome, Rules
from tests.envs.exhaustive import reachable

FINITE = sorted(name for name, entry_point in ENTRY_POINTS.items() if entry_point.startswith(BUILT_IN))


def make(name: str) -> FiniteEnvironment:  # type: ignore[type-arg]
    env = gymnasium.make(f"reasoner_ray/{name}-v0").unwrapped
    assert isinstance(env, FiniteEnvironment)
    return env


@pytest.mark.parametrize("name", FINITE)
@pytest.mark.filterwarnings("error")
def test_gymnasium_finds_no_fault(name: str) -> None:
    check_env(gymnasium.make(f"reasoner_ray/{name}-v0").unwrapped)


def test_an_id_is_found_without_an_import() -> None:
    program = "import gymnasium; print(gymnasium.make('reasoner_ray.envs:reasoner_ray/CreditChain-v0').reset()[1]['admissible'])"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "open the microwave" in answer.stdout


@pytest.mark.parametrize("name", FINITE)
def test_every_state_has_distinct_actions_and_a_text_that_one_continues(name: str) -> None:
    env = make(name)
    for state, done in reachable(env.rules).items():
        actions = [] if done else list(env.rules.actions(state))
        assert done or actions
        assert all(action == action.strip() != "" for action in actions)
        assert env.rules.observe(state).endswith(("to", "first"))
        assert env.observation_space.contains(env.rules.observe(state))


@pytest.mark.parametrize("name", FINITE)
def test_random_episodes_keep_to_the_interface(name: str) -> None:
    env, source = gymnasium.make(f"reasoner_ray/{name}-v0"), random.Random(0)
    for _ in range(20):
        _, info = env.reset(seed=0)
        over = False
        while not over:
            assert info["admissible"]
            _, _, terminated, truncated, info = env.step(source.choice(info["admissible"]))
            assert not info["invalid"] and info["success"] == terminated and not (terminated and truncated)
            over = terminated or truncated


@pytest.mark.parametrize("name", FINITE)
@settings(deadline=None)
@given(text=st.text())
def test_any_text_is_survived_and_no_action_keeps_the_state(name: str, text: str) -> None:
    env = make(name)
    before, info = env.reset()
    observation, _, terminated, truncated, after = env.step(text)
    assert after["invalid"] == (text.strip() not in info["admissible"])
    if after["invalid"]:
        assert (observation, terminated, truncated, after["admissible"]) == (before, False, False, info["admissible"])


@pytest.mark.parametrize("name", FINITE)
def test_case_and_a_full_stop_do_not_matter(name: str) -> None:
    env = make(name)
    _, info = env.reset()
    for action in info["admissible"]:
        env.reset()
        expected = env.step(action)
        for text in (action.capitalize() + ".", f" {action.upper()}\n", f"{action}."):
            env.reset()
            assert env.step(text) == expected
        for text in (f"{action}..", f"{action}!", f"{action} .", f'"{action}"', f"I {action}"):
            env.reset()
            assert env.step(text)[-1]["invalid"], text


class Twins(Rules[str, str]):
    """Two actions that differ in their case alone."""

    start = ""

    def actions(self, state: str) -> dict[str, str]:
        return {"take a": "a", "take A": "A"}

    def outcome(self, state: str, action: str, budget: int) -> Outcome[str]:
        return Outcome(action)

    def observe(self, state: str) -> str:
        return state


def test_a_text_that_may_mean_two_actions_is_none() -> None:
    machine = Machine(Twins())
    assert [machine.act("", text, 9)[1] for text in ("take a", " take A")] == ["a", "A"]
    assert all(machine.act("", text, 9)[0].invalid for text in ("TAKE A", "take a.", "Take a"))


@pytest.mark.parametrize("name", FINITE)
def test_info_may_be_written_into(name: str) -> None:
    env = make(name)
    _, info = env.reset()
    offered = list(info["admissible"])
    info["admissible"].clear()
    info["metrics"].clear()
    *_, info = env.step("nonsense")
    info["admissible"].clear()
    *_, info = env.step("nonsense")
    assert info["admissible"] == offered and "discounted_return" in info["metrics"]


@pytest.mark.parametrize("name", FINITE)
def test_outside_an_episode_there_are_no_steps(name: str) -> None:
    env = make(name)
    with pytest.raises(ResetNeeded):
        env.step("nonsense")
    env.reset()
    for _ in range(env.limit):
        *_, truncated, _ = env.step("nonsense")
    assert truncated
    with pytest.raises(ResetNeeded):
        env.step("nonsense")


@pytest.mark.parametrize("name", FINITE)
def test_a_copy_goes_its_own_way(name: str) -> None:
    env, source = make(name), random.Random(1)
    _, info = env.reset()
    for _ in range(300):  # a large memory is copied too
        *_, terminated, truncated, info = env.step(source.choice(info["admissible"]))
        if terminated or truncated:
            _, info = env.reset()
    action = info["admissible"][0]
    copies = [copy.deepcopy(env), pickle.loads(pickle.dumps(env))]
    expected = env.step(action)
    assert [one.step(action) for one in copies] == [expected, expected]
