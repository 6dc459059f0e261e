"""Transfer: a trained network on other numbers of agents, several tasks at once, faults, padding, episodes as videos."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from pettingzoo.test import parallel_api_test

from reasoner_ray.agents.mat.driver import rollout_metrics
from reasoner_ray.agents.mat.learner import MatLearner, load_network
from reasoner_ray.agents.mat.network import MultiAgentTransformer
from reasoner_ray.agents.mat.settings import MatConfig
from reasoner_ray.agents.mat.worker import RolloutWorker, Segment
from reasoner_ray.agents.pool import Collected
from reasoner_ray.envs.multi_agent.adapters import make_teams
from reasoner_ray.envs.multi_agent.faulty import FaultyTeam
from reasoner_ray.envs.multi_agent.parallel import ParallelTeams
from reasoner_ray.envs.multi_agent.settings import MultiAgentConfig
from reasoner_ray.envs.multi_agent.spec import ActionLayout, TeamSpec
from reasoner_ray.envs.multi_agent.tasks import task_settings
from reasoner_ray.errors import CheckpointError, ConfigError, ModelError
from reasoner_ray.trainer.checkpoint import list_checkpoints
from tests.agents.mat.teams import network, situation, team
from tests.agents.mat.test_driver import driver
from tests.agents.mat.test_learner import job, pair, weights
from tests.agents.mat.worlds import Island

CROWD = "tests.agents.mat.worlds:make_crowd"
TASKS = {"two": {"args": {"n": 2}}, "four": {"args": {"n": 4}}}


def crowd(folder: Path, **sections: Any) -> Any:
    """A job in a world whose teams may have any size; what an agent observes grows with it."""
    given = {"name": CROWD, "args": {}, "max_steps": 4} | sections.pop("multi_agent", {})
    return job(folder, multi_agent=given, **sections)


def several(folder: Path, **sections: Any) -> Any:
    return crowd(folder, multi_agent={"tasks": TASKS}, rollout={"workers": 2}, **sections)


# -- from a trained network ------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["mat", "mat_dec", "encoder_only", "decoder_only"])
def test_a_network_acts_for_fewer_agents_with_the_weights_it_has(tmp_path: Path, variant: str) -> None:
    """Of two networks that were given the same weights, one made for four agents and one for two, each judges two agents alike."""
    four = network(variant=variant)
    spec = TeamSpec(agents=("a", "b"), observation=6, actions=ActionLayout(choices=(3, 3), dims=(0, 0)))
    two = MultiAgentTransformer(spec, MatConfig(width=8, heads=2, blocks=2, variant=variant))
    two.load_state_dict(four.state_dict())
    observations, legal = situation(rows=5)
    observations, legal = observations[:, :2], legal[:, :2]
    acted = two.act(observations, legal, greedy=True)
    parts = torch.ones(2, 1)
    judged = four(observations, legal, acted.actions, None, parts)
    torch.testing.assert_close(judged.logprobs, acted.logprobs)
    torch.testing.assert_close(judged.values, acted.values)


def test_a_job_goes_on_with_another_number_of_agents(tmp_path: Path) -> None:
    pad = {"pad": {"observation": 4, "agents": 4}}
    before, worker = pair(crowd(tmp_path, multi_agent={"args": {"n": 2}, **pad}))
    before.train_step([worker.collect(0, fresh=True)[0]])
    before.export(tmp_path / "model")
    config = crowd(tmp_path / "new", multi_agent={"args": {"n": 4}, **pad}, model={"path": str(tmp_path / "model")}, seed=5)
    run = driver(config)
    asyncio.run(run._start())
    learner = run.parts.learners.learner
    assert learner.team.actions.n_agents == 4 and all(torch.equal(weights(before)[n], t) for n, t in weights(learner).items())
    asyncio.run(run.run())
    assert run.finished and run.parts.tracker.steps[3]["mismatch/max_abs"] < 1e-5
    assert any(not torch.equal(weights(before)[name], t) for name, t in weights(run.parts.learners.learner).items())


def test_other_sizes_are_one_error_that_names_them_and_what_to_set(tmp_path: Path) -> None:
    before, _ = pair(crowd(tmp_path, multi_agent={"args": {"n": 2}}))
    before.export(tmp_path / "model")
    config = crowd(tmp_path, multi_agent={"args": {"n": 3}}, model={"path": str(tmp_path / "model")})
    with pytest.raises(ModelError) as caught:
        MatLearner(config, team=RolloutWorker(config, 0).team)
    four, six = "4 numbers (2 seen, 2 for the agent's number)", "6 numbers (3 seen, 3 for the agent's number)"
    assert f"observations of {four}, actions of 3 choices and 0 dimensions there" in str(caught.value)
    assert f"observations of {six}, actions of 3 choices and 0 dimensions here" in str(caught.value)
    assert "multi_agent.pad.observation" in str(caught.value)


# -- padding ---------------------------------------------------------------------------------------------------


def test_features_lie_at_the_same_place_and_the_agents_numbers_behind_them() -> None:
    config = MultiAgentConfig(name=CROWD, args={"n": 3}, features=[(1, 2), (2, 3)], pad={"observation": 6, "agents": 4, "choices": 5})
    teams = make_teams(config, 2)
    seen = teams.begin([0, 1]).observations
    assert teams.spec.observation == 10 and seen[0, 1].tolist() == [1, 0, 3, 3, 0, 0, 0, 1, 0, 0]
    assert teams.spec.actions.legal.tolist() == [[True] * 3 + [False] * 2] * 3
    assert TeamSpec.from_dict(teams.spec.to_dict()) == teams.spec


@pytest.mark.parametrize(
    ("features", "message"),
    [([(1, 2), (1, 2)], "they have 2 numbers in all, an agent here observes 3"), ([(1, 1), (2, 1)], "2 numbers cannot be padded to 1")],
)
def test_features_of_other_observations_are_refused(features: list[tuple[int, int]], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"multi_agent\.features: {message}"):
        make_teams(MultiAgentConfig(name=CROWD, args={"n": 3}, features=features), 1)


def test_what_padding_adds_is_never_done() -> None:
    padded = ActionLayout(choices=(3, 2), dims=(0, 0), least_choices=4, least_dims=1)
    assert padded.n_parts == 2 and padded.parts.tolist() == [[True, False], [True, False]]
    spec = TeamSpec(agents=("a", "b"), observation=6, actions=padded)
    torch.manual_seed(0)
    net = MultiAgentTransformer(spec, MatConfig(width=8))
    legal = torch.from_numpy(padded.legal).expand(200, -1, -1)
    acted = net.act(torch.randn(200, 2, 6), legal, generator=torch.Generator().manual_seed(0))
    assert acted.actions[:, 0, 0].max() == 2 and acted.actions[:, 1, 0].max() == 1, "each agent's own last choice"
    assert (acted.actions[..., 1] == 0).all() and (acted.logprobs[..., 1] == 0).all()


# -- several tasks ---------------------------------------------------------------------------------------------


def test_tasks_are_laid_over_the_section_and_padded_to_the_greatest() -> None:
    config = MultiAgentConfig(name=CROWD, args={"length": 7}, max_steps=3, tasks={"two": {"args": {"n": 2}}, "four": {"args": {"n": 4}}})
    two, four = task_settings(config).values()
    assert two.args == {"length": 7, "n": 2} and two.max_steps == 3 and not two.tasks
    assert two.pad == four.pad and (four.pad.observation, four.pad.agents, four.pad.choices) == (4, 4, 3)
    assert make_teams(two, 1).spec.observation == make_teams(four, 1).spec.observation == 8
    assert list(task_settings(MultiAgentConfig(name=CROWD))) == [""]


def test_two_tasks_are_both_played_and_both_reported(tmp_path: Path) -> None:
    run = driver(several(tmp_path, trainer={"steps": 2, "eval_every": 1, "checkpoint_every": 2}))
    figures = asyncio.run(run.run())
    assert [t.actions.n_agents for t in run.parts.workers.teams] == [2, 4]
    metrics = run.parts.tracker.steps[2]
    assert metrics["mismatch/max_abs"] < 1e-5, "the learner judges both as the workers acted"
    assert metrics["episode/return/two"] == 2.0 and metrics["episode/return/four"] == 1.0, "1 / n a step, 4 steps, the mean of all"
    assert metrics["episode/return"] == 1.5 and metrics["episode/actions_in_all"] == 2 * 2 * 24
    assert (figures["eval/return/two"], figures["eval/return/four"], figures["eval/return"]) == (2.0, 1.0, 1.5)
    assert figures["eval/episodes"] == 6
    turned = {"tasks": dict(reversed(TASKS.items()))}
    other = crowd(tmp_path, multi_agent=turned, rollout={"workers": 2}, trainer={"steps": 3})
    with pytest.raises(CheckpointError, match=r"is of the tasks \['two', 'four'\], multi_agent.tasks are \['four', 'two'\]"):
        asyncio.run(driver(other).run(list_checkpoints(tmp_path / "run")[-1]))


def test_an_update_is_the_mean_over_all_agents_steps_of_both_tasks(tmp_path: Path) -> None:
    """Two tasks of the same team are one task with twice the environments, once nothing is normalised by task."""
    once = {"learner": {"epochs": 1, "updates_per_step": 1}, "mat": {"normalise_advantage": False, "value_norm": False}}
    config = crowd(tmp_path, multi_agent={"args": {"n": 2}}, rollout={"workers": 2}, **once)
    twice = crowd(tmp_path, multi_agent={"args": {"n": 2}, "tasks": {"a": {}, "b": {}}}, rollout={"workers": 2}, **once)
    workers = [RolloutWorker(config, index) for index in range(2)]
    alone = MatLearner(config, team=workers[0].team)
    both = MatLearner(twice, team=workers[0].team, others=[workers[1].team])
    for worker in workers:
        worker.load(alone.state_for_sync())
    segments = [worker.collect(0, fresh=True)[0] for worker in workers]
    segments = [replace(s, rewards=s.rewards + 0.1 * torch.randn(s.rewards.shape)) for s in segments]
    figures = [learner.train_step(segments) for learner in (alone, both)]
    for name in ("learner/loss", "learner/policy_loss", "learner/value_loss", "learner/entropy", "learner/grad_norm"):
        assert figures[1][name] == pytest.approx(figures[0][name], rel=1e-4), name
    for name, tensor in weights(alone).items():
        torch.testing.assert_close(weights(both)[name], tensor, atol=1e-5, rtol=1e-4)


def test_a_task_of_large_rewards_does_not_drown_another(tmp_path: Path) -> None:
    """Task 2 earns a thousand times what task 1 does; the advantages of task 1 still tell which of its rewards were good."""
    config = several(tmp_path)
    workers = [RolloutWorker(config, index) for index in range(2)]
    learner = MatLearner(config, team=workers[0].team, others=[workers[1].team])
    torch.manual_seed(0)

    def segments(step: int) -> list[Segment]:
        for worker in workers:
            worker.load(learner.state_for_sync())
        collected = [worker.collect(step, fresh=True)[0] for worker in workers]
        noise = [
            scale * torch.randn(s.rewards.shape[:2])[..., None].expand_as(s.rewards) for scale, s in zip((1, 1000), collected, strict=True)
        ]
        return [replace(s, rewards=rewards) for s, rewards in zip(collected, noise, strict=True)]

    metrics = learner.train_step(segments(0))
    assert metrics["learner/value_std/two"] < 10 and metrics["learner/value_std/four"] > 500
    for task, segment in enumerate(segments(1)):
        values = 0.5 * torch.randn(len(segment.values) + 1, *segment.values.shape[1:])  # in normalised units, as the critic of either task
        judged = replace(segment, values=values[:-1], next_values=values[1:])
        advantages = learner._prepare(judged, task).advantages
        assert float(advantages.std()) == pytest.approx(1.0, abs=0.05)
        both = torch.stack([advantages.flatten(), segment.rewards.flatten()])
        assert float(torch.corrcoef(both)[0, 1]) > 0.3


def test_metrics_of_tasks_by_hand() -> None:
    def said(reward: float, *returns: float) -> Collected:
        summary = {
            "reward": reward,
            "returns": list(returns),
            "lengths": [5] * len(returns),
            "truncated": [False] * len(returns),
            "steps": 10,
        }
        return Collected(segment=None, summary=summary)

    metrics = rollout_metrics([said(1.0, 4.0), said(10.0), said(2.0, 6.0), said(20.0)], 1.0, ["a", "b"])
    assert metrics["episode/return/a"] == 5.0 and metrics["reward/mean/b"] == 15.0
    assert "episode/return/b" not in metrics, "no episode of it ended"


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"rollout": {"workers": 3}}, r"rollout\.workers: 3 cannot be shared evenly by the 2 tasks .* set it to a multiple of 2"),
        ({"learner": {"updates_per_step": 30}}, r"learner\.updates_per_step: 24 environment steps of each task cannot be shared by 30"),
        ({"multi_agent": {"tasks": {"a/b": {}}}}, r"multi_agent\.tasks: 'a/b' cannot end a metric's name"),
        ({"multi_agent": {"tasks": {"a": {"arg": {}}}}}, r"multi_agent\.tasks\.a\.arg: unknown key; did you mean"),
    ],
)
def test_tasks_that_cannot_work_are_refused(tmp_path: Path, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        crowd(tmp_path, **{"multi_agent": {"tasks": TASKS}, "rollout": {"workers": 2}} | sections)


# -- faults ----------------------------------------------------------------------------------------------------


def test_a_faulty_team_keeps_to_pettingzoos_rules() -> None:
    parallel_api_test(FaultyTeam(Island(), {"a": "all", "b": [0], "c": [1]}), num_cycles=60)


def test_a_continuous_environment_with_a_faulty_joint_keeps_to_pettingzoos_rules() -> None:
    mpe = pytest.importorskip("mpe2.simple_spread_v3")
    parallel_api_test(FaultyTeam(mpe.parallel_env(continuous_actions=True), {"agent_0": "all", "agent_1": [1, 2]}), num_cycles=60)


def test_what_a_faulty_agent_does_never_arrives() -> None:
    def told(**faulty: Any) -> dict[str, Any]:
        env = ParallelTeams(lambda: FaultyTeam(Island(), faulty), 1, MultiAgentConfig(name="island"))
        env.begin([0])
        env.step(np.array([[[2.0, 9.0, 9.0], [1.0, 0.5, 9.0], [9.0, -1.0, 0.5]]], np.float32))
        return env._envs[0].unwrapped.told  # type: ignore[no-any-return]

    assert told(a="all")["a"] == 0 and told(c="all")["c"].tolist() == [0.0, 0.0]
    whole = told(b="all")["b"]
    assert whole[0] == 10 and whole[1].tolist() == [0.0], "Discrete(start=10): the first choice"
    joint = told(c=[1], b=[0])
    assert joint["c"].tolist() == [-2.0, 0.0] and joint["a"] == 2 and joint["b"][0] == 11 and joint["b"][1].tolist() == [0.0]


@pytest.mark.parametrize("where", ["observation", "info"])
def test_a_faulty_agent_does_nothing_that_its_mask_forbids(where: str) -> None:
    class Turning(Island):
        """Choice ``time + 1`` alone is allowed to a."""

        def _observe(self, agents: list[str]) -> dict[str, Any]:
            seen = super()._observe(agents)
            if "a" in seen:
                self.mask = np.arange(3) == self._time + 1
                seen["a"] = {"observation": seen["a"]["observation"], **({"action_mask": self.mask} if where == "observation" else {})}
            return seen

        def reset(self, seed: int | None = None, options: Any = None) -> Any:
            seen, infos = super().reset(seed, options)
            return seen, infos | {"a": {"action_mask": self.mask}}

        def step(self, actions: dict[str, Any]) -> Any:
            *others, infos = super().step(actions)
            return *others, infos | {"a": {"action_mask": self.mask}}

    env = FaultyTeam(Turning(), {"a": "all"})
    env.reset(seed=0)
    told = []
    for _ in range(2):
        env.step({"a": 0, "b": (10, np.zeros(1, np.float32)), "c": np.zeros(2, np.float32)})
        told.append(env.unwrapped.told["a"])
    assert told == [1, 2]


def test_a_box_without_a_zero_is_held_at_the_bound_next_to_it() -> None:
    class High(Island):
        def action_space(self, agent: str) -> Any:
            return spaces.Box(0.5, 2.0, (2,), np.float32) if agent == "c" else super().action_space(agent)

    env = FaultyTeam(High(), {"c": "all"})
    env.reset(seed=0)
    env.step({"a": 0, "b": (10, np.zeros(1, np.float32)), "c": np.array([2.0, 1.0], np.float32)})
    assert env.unwrapped.told["c"].tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("faulty", "message"),
    [
        ({"d": "all"}, r"multi_agent\.faulty: no agent 'd'; there are a, b, c"),
        ({"c": [2]}, r"multi_agent\.faulty\.c: no dimension 2; its actions have 2"),
        ({"a": [0]}, r"multi_agent\.faulty\.a: no dimension 0; its actions have 0, from 0 \(all: the whole agent\)"),
    ],
)
def test_faults_that_cannot_be_are_refused(faulty: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_teams(MultiAgentConfig(name="tests.agents.mat.worlds:make_island", faulty=faulty), 1)
    with pytest.raises(ConfigError, match="multi_agent.faulty: vmas"):
        make_teams(MultiAgentConfig(name="vmas", faulty={"agent_0": "all"}), 1)


# -- videos of training ----------------------------------------------------------------------------------------


def test_an_evaluation_is_filmed_every_so_often(tmp_path: Path) -> None:
    config = several(tmp_path, trainer={"steps": 3, "eval_every": 1}, tracking={"video_every": 2})
    run, shown = driver(config), []
    run.parts.tracker.video = lambda *given: shown.append(given)  # type: ignore[method-assign]
    asyncio.run(run.run())
    assert [(step, name, file) for step, name, file, _ in shown] == [
        (step, f"eval/video/{task}", f"{task}-{step:06d}.gif") for step in (0, 2) for task in ("two", "four")
    ]
    assert all(content[:6] == b"GIF89a" for *_, content in shown)
    assert {seed for _, seed, _ in run.parts.workers.filmed} == {1_000_000_000}


def test_a_world_that_cannot_be_drawn_is_told_of_once(tmp_path: Path) -> None:
    run = driver(job(tmp_path, trainer={"steps": 3, "eval_every": 1}, tracking={"video_every": 1}))
    asyncio.run(run.run())
    assert run.finished and len(run.parts.workers.filmed) == 1
    assert sum("no episode is drawn" in text for text in run.parts.tracker.events) == 1


def test_a_network_of_several_tasks_is_read_for_each(tmp_path: Path) -> None:
    config = several(tmp_path)
    workers = [RolloutWorker(config, index) for index in range(2)]
    MatLearner(config, team=workers[0].team, others=[workers[1].team]).export(tmp_path / "model")
    for worker in workers:
        read, spec = load_network(tmp_path / "model", worker.team)
        assert spec == worker.team and read.head.parts.shape == (len(spec.agents), 1)
    assert team("discrete").misfit(team("unequal")) == "observations of 6 numbers, actions of 3 choices and 0 dimensions there; " + (
        "observations of 6 numbers, actions of 4 choices and 0 dimensions here"
    )
