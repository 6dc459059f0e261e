"""A single-agent environment as a team of one: PettingZoo's own test, and a trained team of one whose episodes are recorded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import gymnasium
import numpy as np
import pytest
import torch
from pettingzoo.test import parallel_api_test

from reasoner_ray.agents.mat.learner import MatLearner
from reasoner_ray.agents.mat.worker import RolloutWorker
from reasoner_ray.agents.sequence.collect import TeamPolicy, collect
from reasoner_ray.agents.sequence.recordings import read_minari
from reasoner_ray.config import parse_config
from reasoner_ray.envs.multi_agent.adapters import make_single
from reasoner_ray.envs.multi_agent.teams import episode_seed
from reasoner_ray.errors import ModelError
from tests.agents.sequence.jobs import job


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("id", ["CartPole-v1", "Pendulum-v1"])
def test_a_team_of_one(id: str) -> None:
    parallel_api_test(make_single(id=id), num_cycles=30)
    env = make_single(id="CartPole-v1", max_episode_steps=3)
    env.reset(seed=0)
    ends = [env.step({"agent": step % 2})[2:4] for step in range(3)]
    assert ends[-1] == ({"agent": False}, {"agent": True}) and env.agents == [], "an end by time is none by success"


@pytest.mark.parametrize("id", ["CartPole-v1", "Pendulum-v1"])
def test_what_a_trained_team_of_one_plays_is_recorded(tmp_path: Path, id: str) -> None:
    tree = {
        "kind": "mat",
        "multi_agent": {"name": "single", "args": {"id": id}, "envs": 2, "segment_steps": 4},
        "mat": {"width": 8},
        "learner": {"torch_threads": 1},
    }
    team = parse_config(tree)
    worker = RolloutWorker(team, 0)
    learner = MatLearner(team, team=worker.team)
    learner.train_step([worker.collect(0, fresh=True)[0]])
    learner.export(tmp_path / "model")
    world = {"id": id, "max_steps": 10}
    settings = {"policy": str(tmp_path / "model"), "episodes": 3, "out": str(tmp_path / "medium-v0")}
    figures = collect(job(tmp_path, sequence={"world": world, "collect": settings}))
    assert figures["episodes"] == 3 and len(read_minari(tmp_path / "medium-v0")[0]) == 3
    if id == "Pendulum-v1":  # a team's numbers lie in [-1, 1], the torque in [-2, 2]
        env = gymnasium.make(id)
        policy = TeamPolicy(tmp_path / "model", env, np.random.default_rng(0))
        for said, told in ((1.0, 2.0), (-0.5, -1.0), (3.0, 2.0)):
            acted = SimpleNamespace(actions=torch.full((1, 1, 1), said))
            policy._network.act = lambda *_, acted=acted, **__: acted  # type: ignore[method-assign]
            assert policy(env.reset(seed=0)[0], 0.0, None) == pytest.approx([told])
    other = {"id": "MountainCar-v0", "max_steps": 10}
    settings["out"] = str(tmp_path / "other-v0")
    with pytest.raises(ModelError, match=r"acts for 1 that see \d numbers, by \d choices and \d dimensions; here one sees 2 and acts by 3"):
        collect(job(tmp_path, sequence={"world": other, "collect": settings}))


PADDED = {"features": [(1, 2), (2, 3)], "pad": {"observation": 7, "agents": 3, "choices": 4, "dims": 2}}


@pytest.mark.parametrize(
    ("settings", "known"),
    [
        ({"standardise": True}, True),
        (PADDED, True),
        ({"standardise": True, "features": [(2, 3), (1, 1)], "pad": {"agents": 2}}, True),
        ({}, True),
        ({}, False),  # as files from before it was kept
    ],
)
def test_a_recorded_team_of_one_sees_what_it_saw_in_training(tmp_path: Path, settings: dict[str, Any], known: bool) -> None:
    """Every observation that the network is given is what a rollout worker gives it, bit for bit."""
    multi_agent = {"name": "single", "args": {"id": "Pendulum-v1"}, "envs": 1, "segment_steps": 4, **settings}
    team = parse_config({"kind": "mat", "multi_agent": multi_agent, "mat": {"width": 8}, "learner": {"torch_threads": 1}})
    worker = RolloutWorker(team, 0)
    MatLearner(team, team=worker.team if known else replace(worker.team, sight=None)).export(tmp_path / "model")
    segment, _ = worker.collect(0, fresh=True)
    env = gymnasium.make("Pendulum-v1")
    policy, given = TeamPolicy(tmp_path / "model", env, np.random.default_rng(0)), []
    act = policy._network.act

    def watched(shown: torch.Tensor, legal: torch.Tensor, **options: Any) -> Any:
        given.append(shown)
        return act(shown, legal, **options)

    policy._network.act = watched  # type: ignore[method-assign]
    env.reset(seed=episode_seed(worker._seed(0, 0), 0))
    angle, speed = cast(Any, env.unwrapped).state
    told = policy(np.array([np.cos(angle), np.sin(angle), speed], np.float32), 0.0, None)
    assert torch.equal(given[0], segment.observations[0]) and told.shape == (1,) and abs(float(told[0])) <= 2.0
    if settings:
        assert given[0][0, 0, :3].tolist() != pytest.approx([np.cos(angle), np.sin(angle), speed], abs=1e-3)
