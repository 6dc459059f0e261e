"""Environments for teams: padding, masks, agents that die, ends by time and by success, bad input; each adapter where its package is."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.error import DependencyNotInstalled
from pettingzoo import AECEnv, ParallelEnv
from pettingzoo.test import parallel_api_test

from reasoner_ray.agents.mat.ppo import team_gae
from reasoner_ray.envs.multi_agent.adapters import ENVIRONMENTS, make_teams, need
from reasoner_ray.envs.multi_agent.batched import BatchedTeams
from reasoner_ray.envs.multi_agent.parallel import ParallelTeams
from reasoner_ray.envs.multi_agent.settings import MultiAgentConfig
from reasoner_ray.envs.multi_agent.spec import TeamSpec
from reasoner_ray.envs.multi_agent.teams import Teams, TeamStep, team_rewards
from reasoner_ray.errors import ConfigError, EnvironmentFault, EnvironmentProblem
from tests.agents.mat.worlds import Island


def teams(n_envs: int = 2, settings: dict[str, Any] | None = None, **island: Any) -> ParallelTeams:
    config = MultiAgentConfig(**{"name": "island", "reward": "mean"} | (settings or {}))
    return ParallelTeams(lambda: Island(**island), n_envs, config)


def do(env: Teams, *rows: list[float]) -> TeamStep:
    """One joint action, the same in every environment; a row an agent."""
    return env.step(np.repeat(np.asarray(rows, np.float32)[None], env.n_envs, 0))


WAIT = ([0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0])


def test_the_tests_own_world_keeps_to_pettingzoos_rules() -> None:
    parallel_api_test(Island(), num_cycles=60)


def test_spaces_that_differ_are_padded_and_agents_are_told_apart() -> None:
    env = teams()
    assert env.spec.actions.choices == (3, 2, 0) and env.spec.actions.dims == (0, 1, 2)
    assert env.spec.observation == 3 + 3
    view = env.begin([5, 6])
    assert view.observations.shape == (2, 3, 6) and view.legal.shape == (2, 3, 3)
    assert (view.observations[:, :, 3:] == np.eye(3)).all()
    assert (view.observations[:, 1, 1:3] == 0).all(), "agent b sees one number"
    assert view.legal[0].tolist() == [[True, False, True], [True, True, False], [True, True, True]]
    assert TeamSpec.from_dict(env.spec.to_dict()) == env.spec


def test_actions_reach_their_agents_in_their_own_units() -> None:
    env = teams(1)
    env.begin([0])
    do(env, [2.0, 9.0, 9.0], [1.0, 0.5, 9.0], [9.0, -1.0, 3.0])
    told = env._envs[0].told
    assert told["a"] == 2
    assert told["b"][0] == 11 and told["b"][1].tolist() == [7.5], "Discrete(start=10), and Box(0, 10) stretched"
    assert told["c"].tolist() == [-2.0, 2.0], "Box(-2, 2), cut off at its bounds"


def test_an_agent_that_dies_is_inactive_and_its_team_goes_on() -> None:
    env = teams(1, dies_at=1, length=3)
    env.begin([0])
    first = do(env, *WAIT)
    assert first.view.active.tolist() == [[True, True, False]] and not first.ended.any() and not first.terminated.any()
    assert first.view.observations[0, 2, :3].tolist() == [1.0, 1.0, 1.0], "its last view"
    second = do(env, *WAIT)
    assert second.view.observations[0, 2].tolist() == [0, 0, 0, 0, 0, 1], "nothing but its number"
    assert second.view.legal[0, 2].all()
    assert first.rewards.tolist() == [[1.0, 1.0, 1.0]] and second.rewards[0, 0] == pytest.approx(1.0), "the mean of the living"


def test_agents_that_earn_for_themselves_have_no_future_once_dead() -> None:
    env = teams(1, {"reward": "own"}, dies_at=1, length=3)
    env.begin([0])
    first, second = do(env, *WAIT), do(env, *WAIT)
    assert first.terminated.tolist() == second.terminated.tolist() == [[False, False, True]]
    assert second.rewards.tolist() == [[1.0, 1.0, 0.0]]


class Leaving(Island):
    """Time cuts c off after the first step; a and b go on. Nothing is earned."""

    def step(self, actions: dict[str, Any]) -> Any:
        seen, earned, dead, cut, infos = super().step(actions)
        if self._time == 1:
            cut["c"], self.agents = True, ["a", "b"]
        return seen, dict.fromkeys(earned, 0.0), dead, cut, infos


def test_an_agent_that_time_cuts_off_alone_has_a_future() -> None:
    """It is worth what its last view is, as if the others had been cut off too: with V = 10 everywhere nothing was gained or lost."""
    env = ParallelTeams(lambda: Leaving(length=3), 1, MultiAgentConfig(name="leaving", reward="own"))
    env.begin([0])
    active, steps = [], []
    for _ in range(3):
        active.append(env._active.copy())
        steps.append(do(env, *WAIT))
    assert [step.truncated.tolist() for step in steps] == [[[False, False, True]], [[False, False, False]], [[True, True, False]]]
    assert not steps[0].terminated.any() and not steps[0].ended.any()
    ten = torch.full((3, 1, 3), 10.0)
    flags = [torch.from_numpy(np.stack([getattr(step, name) for step in steps])) for name in ("terminated", "truncated")]
    credit = team_gae(torch.zeros(3, 1, 3), ten, ten, *flags, gamma=1.0, gae_lambda=0.95)
    acted = torch.from_numpy(np.stack(active))
    assert acted.sum() == 7 and not credit.advantages[acted].any()


@pytest.mark.parametrize("solved", [True, False])
def test_an_end_by_success_and_an_end_by_time_are_told_apart(solved: bool) -> None:
    env = teams(2, length=2, solved=solved)
    before = env.begin([3, 4])
    assert not do(env, *WAIT).ended.any()
    end = do(env, *WAIT)
    assert end.ended.all() and end.terminated.all() == solved and end.truncated.all() == (not solved)
    assert end.last is not None and end.last.observations[:, 0, 0].tolist() == [2.0, 2.0], "what was seen last"
    assert end.view.observations[0, 0, 0] == 0.0, "the next episode has begun"
    assert [(e.env, e.total, e.steps, e.truncated) for e in end.episodes] == [(0, 2.0, 2, not solved), (1, 2.0, 2, not solved)]
    assert end.view.observations[0, 0, 1] != before.observations[0, 0, 1], "with a seed of its own"
    again = env.begin([3, 4])
    assert np.array_equal(again.observations, before.observations), "the same base seed, the same episodes"


def test_a_limit_of_steps_ends_an_episode_by_time() -> None:
    env = teams(1, {"max_steps": 2}, length=50)
    env.begin([0])
    do(env, *WAIT)
    end = do(env, *WAIT)
    assert end.ended.all() and end.truncated.all() and not end.terminated.any()


def test_team_rewards_by_hand() -> None:
    rewards, active = np.array([[1.0, 2.0, 0.0]]), np.array([[True, True, False]])
    assert team_rewards(rewards, active, "mean").tolist() == [[1.5, 1.5, 1.5]]
    assert team_rewards(rewards, active, "sum").tolist() == [[3.0, 3.0, 3.0]]
    assert team_rewards(rewards, active, "own").tolist() == [[1.0, 2.0, 0.0]]


def test_standardised_observations_have_mean_0_and_deviation_1() -> None:
    seen = teams(1, {"standardise": True}).begin([1]).observations[0]
    for agent, size in zip(seen, (2, 1, 3), strict=True):
        own = np.concatenate([agent[:size], agent[3:]])
        assert own.mean() == pytest.approx(0.0, abs=1e-5) and own.std() == pytest.approx(1.0, abs=1e-5)
        assert not agent[size:3].any(), "padding"


def test_standardised_observations_do_not_depend_on_padding() -> None:
    def seen(**pad: int) -> np.ndarray:
        return teams(1, {"standardise": True, "pad": pad}).begin([1]).observations[0]

    plain, padded = seen(), seen(observation=7, agents=5)
    assert padded[:, :3] == pytest.approx(plain[:, :3], abs=1e-6) and padded[:, 7:10] == pytest.approx(plain[:, 3:], abs=1e-6)
    assert not padded[:, 3:7].any() and not padded[:, 10:].any()


@pytest.mark.parametrize(
    ("island", "message"),
    [
        ({"spoils": "observation"}, "the observation of a .* holds NaN"),
        ({"spoils": "reward"}, "the reward of b .* is nan"),
        ({"spoils": "mask"}, "the action mask of a .* allows nothing"),
        ({"spoils": "shape"}, "c saw 4 numbers, its observation space has 3"),
        ({"spoils": "long mask"}, "island: the action mask of a has 4 entries for 3 choices"),
        ({"spoils": "step"}, r"island: step \(environment 0\) raised IndexError: the tide is out"),
    ],
)
def test_what_nobody_can_learn_from_is_one_clear_error(island: dict[str, Any], message: str) -> None:
    env = teams(1, **island)
    env.begin([0])
    with pytest.raises(EnvironmentFault, match=message):
        do(env, *WAIT)


def test_an_environment_that_cannot_begin_is_named() -> None:
    with pytest.raises(EnvironmentFault, match=r"island: reset with seed \d+ \(environment 0\) raised IndexError: the tide is out"):
        teams(1, spoils="reset").begin([0])


class Careless(Island):
    """What it says of its agents in the first step is spoilt."""

    def step(self, actions: dict[str, Any]) -> Any:
        seen, earned, dead, cut, infos = super().step(actions)
        told = {"observations": seen, "rewards": earned}
        what, _, how = self._spoils.partition(" ")
        if how == "of nobody":
            told[what]["d"] = 1.0
        elif how == "left out":
            del told[what]["b"]
        elif how == "as words":
            told[what]["b"] = "plenty"
        elif what == "agents":
            self.agents.append("d")
        elif what == "cut":
            cut["b"], self.agents = True, ["a", "c"]
            del seen["b"]
        return seen, earned, None if what == "ends" else dead, cut, infos


@pytest.mark.parametrize(
    ("spoils", "message"),
    [
        ("observations of nobody", r"careless: 'd' \(environment 0\) is not among possible_agents: a, b, c"),
        ("rewards of nobody", r"careless: 'd' \(environment 0\) is not among possible_agents: a, b, c"),
        ("agents", r"careless: 'd' \(environment 0\) is not among possible_agents: a, b, c"),
        ("observations left out", r"careless: b \(environment 0\) has not died, but there is no observation of it"),
        ("cut", r"careless: b \(environment 0\) has not died, but there is no observation of it"),
        ("rewards left out", r"careless: step gave no reward of b \(environment 0\), which has just acted"),
        ("observations as words", r"careless: the observation of b \(environment 0\) raised ValueError"),
        ("rewards as words", r"careless: the reward of b \(environment 0\) raised ValueError"),
        ("ends", r"careless: what step said of ends \(environment 0\) raised AttributeError"),
    ],
)
def test_what_an_environment_says_of_the_wrong_agents_or_of_none_is_a_fault(spoils: str, message: str) -> None:
    env = ParallelTeams(lambda: Careless(spoils=spoils), 1, MultiAgentConfig(name="careless"))
    env.begin([0])
    with pytest.raises(EnvironmentFault, match=message):
        do(env, *WAIT)


def test_one_that_has_died_need_not_be_seen_again() -> None:
    class Silent(Island):
        def step(self, actions: dict[str, Any]) -> Any:
            seen, *others = super().step(actions)
            return {agent: sight for agent, sight in seen.items() if agent in self.agents}, *others

    env = ParallelTeams(lambda: Silent(dies_at=1, length=3), 1, MultiAgentConfig(name="silent"))
    env.begin([0])
    assert do(env, *WAIT).view.observations[0, 2, :3].tolist() == [0, 0, 0]


def test_spaces_that_cannot_be_read_are_a_fault() -> None:
    class Boundless(Island):
        def observation_space(self, agent: str) -> Any:
            raise KeyError(agent)

    with pytest.raises(EnvironmentFault, match="boundless: its agents and spaces raised KeyError: 'a'"):
        ParallelTeams(Boundless, 1, MultiAgentConfig(name="boundless"))


def test_who_is_alive_in_an_episode_s_last_view() -> None:
    """c died before the end by time, a and b were cut off by it; after an end by success nobody is alive."""
    for solved, alive in ((False, [True, True, False]), (True, [False] * 3)):
        env = teams(1, dies_at=1, length=2, solved=solved)
        env.begin([0])
        do(env, *WAIT)
        last = do(env, *WAIT).last
        assert last is not None and last.active.tolist() == [alive]


def test_whatever_keeps_an_environment_from_being_drawn_is_an_environment_problem() -> None:
    class Blind(Island):
        def render(self) -> Any:
            raise DependencyNotInstalled("run pip install easel")

    env = ParallelTeams(Blind, 1, MultiAgentConfig(name="blind"))
    with pytest.raises(EnvironmentProblem, match="blind cannot be drawn here: DependencyNotInstalled: run pip install easel"):
        env.render(0)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"n_agent": 3}, "'n_agent': 3.* passed but not used by the scenario"),
        ({"max_steps": 5}, r"multi_agent\.args\.max_steps: kind mat sets it itself"),
        ({"scenario": "balanse"}, "vmas cannot make 'balanse'"),
    ],
)
def test_arguments_that_vmas_would_only_warn_of_are_refused(args: dict[str, Any], message: str) -> None:
    pytest.importorskip("vmas")
    with pytest.raises(ConfigError, match=message):
        make_teams(MultiAgentConfig(name="vmas", args=args), 1)


def test_an_action_space_that_teams_cannot_act_in_is_refused() -> None:
    class Odd(Island):
        def action_space(self, agent: str) -> Any:
            return spaces.MultiDiscrete([2, 3])

    with pytest.raises(EnvironmentFault, match="the action space of a is MultiDiscrete"):
        ParallelTeams(Odd, 1, MultiAgentConfig(name="odd"))


def test_unknown_names_arguments_and_packages_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"multi_agent\.name: unknown environment 'simple_spred'; did you mean 'simple_spread'"):
        make_teams(MultiAgentConfig(name="simple_spred"), 1)
    with pytest.raises(EnvironmentProblem, match=r"cannot be imported .*run `pip install no-such==1`"):
        need("no_such_package_of_anybody", "no-such==1")


def test_a_users_own_environment_by_its_path() -> None:
    env = make_teams(MultiAgentConfig(name="tests.agents.mat.worlds:make_island", args={"length": 4}), 2)
    assert env.spec.agents == ("a", "b", "c")
    with pytest.raises(ConfigError, match=r"multi_agent\.args\.lenght: unknown key; did you mean 'length'"):
        make_teams(MultiAgentConfig(name="tests.agents.mat.worlds:make_island", args={"lenght": 4}), 2)


class Turns(AECEnv):
    """Agents that act one after the other."""


def make_turns(*, render_mode: str | None = None) -> Turns:
    """For ``multi_agent.name``."""
    return Turns()


def make_nothing(*, render_mode: str | None = None) -> Island:
    """For ``multi_agent.name``."""
    raise KeyError("an anchor")


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        (
            "gymnasium:make",
            {"id": "CartPole-v1"},
            r"multi_agent\.name: what gymnasium:make makes \(TimeLimit\) is no PettingZoo ParallelEnv",
        ),
        (
            "tests.agents.mat.test_environments:make_turns",
            {},
            r"multi_agent\.name: .*make_turns makes an AECEnv.* teams need a ParallelEnv",
        ),
        (
            "tests.agents.mat.test_environments:make_nothing",
            {},
            r"multi_agent\.args: .*make_nothing cannot be made with {}: KeyError: 'an anchor'",
        ),
    ],
)
def test_what_is_no_environment_of_a_team_is_refused(name: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_teams(MultiAgentConfig(name=name, args=args), 1)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"scenario": "HalfChetah"}, r"multi_agent\.args\.scenario: mamujoco has no 'HalfChetah'; did you mean 'HalfCheetah'\?"),
        ({"agent_obsk": -3}, r"multi_agent\.args\.agent_obsk: -3 is no number of joints"),
        ({"agent_obsk": "all"}, r"multi_agent\.args\.agent_obsk: 'all' is no number of joints"),
    ],
)
def test_arguments_that_mamujoco_does_not_know_are_refused(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_teams(MultiAgentConfig(name="mamujoco", args=args), 1)


def test_a_partition_that_mamujoco_does_not_know_is_refused() -> None:
    pytest.importorskip("gymnasium_robotics")
    with pytest.raises(ConfigError, match=r"multi_agent\.args: mamujoco cannot be made with .*UNKNOWN partitioning config: 6x2"):
        make_teams(MultiAgentConfig(name="mamujoco", args={"agent_conf": "6x2"}), 1)


class Radio:
    """The interface of vmas' environments: one agent that pushes (-2 to 2) and speaks (0 to 1); it remembers what it was told."""

    continuous_actions, vmas_random_state = True, [0, 0, 0]

    def __init__(self) -> None:
        self.agents = [type("Agent", (), {"name": "a"})()]
        self.observation_space = [spaces.Box(-1.0, 1.0, (1,), np.float32)]
        self.action_space = [spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([2.0, 1.0], np.float32))]

    def reset(self, seed: int) -> list[torch.Tensor]:
        return [torch.zeros(3, 1)]

    def step(self, actions: list[torch.Tensor]) -> Any:
        (self.told,) = actions
        none = torch.zeros(3, dtype=torch.bool)
        return [torch.zeros(3, 1)], [torch.zeros(3)], none, none, None


def test_actions_in_a_batch_are_stretched_to_bounds_that_do_not_begin_at_minus_the_end() -> None:
    env = Radio()
    teams = BatchedTeams(env, 3, MultiAgentConfig(name="radio"))
    teams.begin([0, 1, 2])
    teams.step(np.array([[[-1.0, -1.0]], [[0.0, 0.0]], [[3.0, 0.5]]], np.float32))
    assert env.told.tolist() == [[-2.0, 0.0], [0.0, 0.5], [2.0, 0.75]]


def test_communication_of_vmas_is_within_its_bounds() -> None:
    pytest.importorskip("vmas")
    env = make_teams(MultiAgentConfig(name="vmas", args={"scenario": "simple_reference"}, max_steps=3), 2)
    env.begin([0, 1])
    n, parts = len(env.spec.agents), env.spec.actions.n_parts
    for extreme in (-1.0, 1.0):
        env.step(np.full((2, n, parts), extreme, np.float32))


ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "simple_spread": ("mpe2", {"max_cycles": 4}),
    "simple_reference": ("mpe2", {"max_cycles": 4}),
    "simple_speaker_listener": ("mpe2", {"max_cycles": 4}),
    "lbforaging": ("lbforaging", {"id": "Foraging-5x5-2p-1f-coop-v3", "max_episode_steps": 4}),
    "rware": ("rware", {"max_steps": 4}),
    "mamujoco": ("gymnasium_robotics", {"max_episode_steps": 4}),
    "vmas": ("vmas", {"scenario": "balance", "n_agents": 3}),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters(name: str) -> None:
    package, args = ADAPTERS[name]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    env = make_teams(MultiAgentConfig(name=name, args=args, max_steps=4), 2)
    rng = np.random.default_rng(0)
    view = env.begin([1, 2])
    layout = env.spec.actions
    episodes = []
    for _ in range(4):
        choices = (
            (view.legal * rng.random(view.legal.shape)).argmax(-1)[..., None] if layout.n_choices else np.empty((2, layout.n_agents, 0))
        )
        step = env.step(np.concatenate([choices, rng.uniform(-1, 1, (2, layout.n_agents, layout.n_dims))], -1).astype(np.float32))
        view = step.view
        episodes += step.episodes
        assert step.rewards.dtype == np.float32 and step.rewards.shape == (2, layout.n_agents)
    assert step.ended.all() and [e.steps for e in episodes] == [4, 4]
    assert step.truncated.all() and not step.terminated.any(), "the end is one by time"
    assert step.last is not None and step.last.active.all(), "those that time cut off are alive in the last view"
    env.close()


@pytest.mark.parametrize("name", ["lbforaging", "rware"])
def test_wrapped_environments_keep_to_pettingzoos_rules(name: str) -> None:
    package, args = ADAPTERS[name]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    env = ENVIRONMENTS.get(name)(**args)
    assert isinstance(env, ParallelEnv)
    parallel_api_test(env, num_cycles=20)
