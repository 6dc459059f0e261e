"""What the Multi-Agent Transformer is compared with: RLlib's PPO under masks and by numbers, normalised returns, finished curves."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

pytest.importorskip("ray.rllib")

from ray.rllib.core.columns import Columns
from ray.rllib.evaluation.postprocessing import Postprocessing

from benchmarks import _rllib, mat_baselines
from benchmarks._rllib import (
    Greedy,
    NormalisedLearner,
    PpoSettings,
    SharedModule,
    TeamBatch,
    TeamEnvironment,
    action_space,
    evaluation_of,
    inputs,
)
from reasoner_ray.agents.mat.worker import RolloutWorker
from reasoner_ray.envs.multi_agent.spec import ActionLayout
from reasoner_ray.errors import ConfigError
from tests.agents.mat.teams import LAYOUTS
from tests.agents.mat.test_learner import job
from tests.agents.mat.worlds import Crowd, Island

HERE = "tests.agents.mat.test_baselines"


class Doors(Crowd):
    """Two agents; of three choices the one whose number is the time (modulo 3) is forbidden. The choice is what is earned."""

    def step(self, actions: dict[str, Any]) -> Any:
        assert all(action != self._time % 3 for action in actions.values()), "a forbidden choice"
        seen, _, dead, cut, infos = super().step(actions)
        return seen, {agent: float(action) for agent, action in actions.items()}, dead, cut, self._masked(infos)

    def reset(self, seed: int | None = None, options: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
        seen, infos = super().reset(seed, options)
        return seen, self._masked(infos)

    def _masked(self, infos: dict[str, Any]) -> dict[str, Any]:
        return {agent: {"action_mask": np.arange(3) != self._time % 3} for agent in infos}


def make_doors(*, render_mode: str | None = None) -> Doors:
    """For ``multi_agent.name``."""
    return Doors(2, 4)


class Slope(Island):
    """Two agents that act by two numbers each; what they do has no effect."""

    possible_agents = ["a", "b"]  # noqa: RUF012

    def action_space(self, agent: str) -> Any:
        return gymnasium.spaces.Box(-2.0, 2.0, (2,), np.float32)


def make_slope(*, render_mode: str | None = None) -> Slope:
    """For ``multi_agent.name``."""
    return Slope(length=3)


def module(choices: int = 3, central: bool = True, beta: float | None = 0.9, seed: int = 0) -> SharedModule:
    """For two agents that see four numbers each."""
    torch.manual_seed(seed)
    space = gymnasium.spaces.Discrete(choices) if choices else gymnasium.spaces.Box(-1.0, 1.0, (2,))
    model = {"own": 4, "choices": choices, "width": 8, "central": central, "std_init": 1.0, "value_norm_beta": beta}
    return SharedModule(observation_space=gymnasium.spaces.Box(-1.0, 1.0, (12 + choices,)), action_space=space, model_config=model)


def environment(name: str, index: int = 0, **settings: Any) -> TeamEnvironment:
    return TeamEnvironment({"multi_agent": {"name": f"{HERE}:{name}", **settings}, "seed": index})


# -- what acts -------------------------------------------------------------------------------------------------


def test_a_forbidden_choice_is_never_sampled_nor_the_likeliest() -> None:
    net, seen = module(), torch.randn(200, 15)
    seen[:, -3:] = torch.tensor([1.0, 0.0, 1.0])
    dist = net.get_exploration_action_dist_cls().from_logits(net.forward_exploration({Columns.OBS: seen})[Columns.ACTION_DIST_INPUTS])
    assert set(dist.sample().tolist()) == {0, 2} and torch.isfinite(dist.entropy()).all() and dist.entropy().max() <= np.log(2) + 1e-5
    legal = torch.tensor([False, True, False]).expand(5, 2, 3)
    assert (Greedy(net).act(torch.randn(5, 2, 4), legal, greedy=True).actions == 1).all()


def test_numbers_have_the_transformer_s_own_deviation() -> None:
    net, observations = module(choices=0), torch.randn(5, 2, 4)
    none = torch.ones(5, 2, 0, dtype=torch.bool)
    seen = torch.from_numpy(inputs(observations.numpy(), none.numpy()))
    out = net.forward_inference({Columns.OBS: seen})[Columns.ACTION_DIST_INPUTS]
    dist = net.get_inference_action_dist_cls().from_logits(out)
    assert dist._dist.scale.flatten().tolist() == pytest.approx([0.3655] * 20, abs=1e-4), "0.5 sigmoid(1)"
    assert torch.equal(Greedy(net).act(observations, none, greedy=True).actions, dist._dist.loc)


@pytest.mark.parametrize(("central", "changes"), [(True, True), (False, False)])
def test_who_sees_what_the_others_see(central: bool, changes: bool) -> None:
    net, seen = module(central=central), torch.randn(6, 15)
    other = seen.clone()
    other[:, 4:12] += 1.0
    both = [net.compute_values({Columns.OBS: x}) for x in (seen, other)]
    acted = [net.forward_inference({Columns.OBS: x})[Columns.ACTION_DIST_INPUTS] for x in (seen, other)]
    assert torch.equal(*acted) and torch.equal(*both) != changes
    mask = seen.clone()
    mask[:, 12:] += 5.0
    assert torch.equal(net.compute_values({Columns.OBS: mask}), both[0]), "a mask is no observation of the critic's"


def test_each_agent_s_row_is_its_own_view_everybody_s_and_its_mask() -> None:
    rows = inputs(np.arange(4.0).reshape(1, 2, 2), np.array([[[True, False], [True, True]]]))
    assert rows.tolist() == [[[0, 1, 0, 1, 2, 3, 1, 0], [2, 3, 0, 1, 2, 3, 1, 1]]]


def test_teams_that_one_module_cannot_act_for_are_refused() -> None:
    assert action_space(LAYOUTS["unequal"]) == gymnasium.spaces.Discrete(4)
    assert action_space(ActionLayout(choices=(0, 0), dims=(2, 2))) == gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)
    for name in ("continuous", "semi_discrete", "both"):
        with pytest.raises(ConfigError, match="one module of RLlib acts for all by choices, or for all by equally many dimensions"):
            action_space(LAYOUTS[name])


# -- its environment -------------------------------------------------------------------------------------------


def test_masks_and_numbers_reach_the_environment() -> None:
    doors = environment("make_doors")
    seen, _ = doors.reset(seed=1)
    assert seen["agent_0"][-3:].tolist() == [0, 1, 1]
    seen, rewards, over, cut, _ = doors.step({"agent_0": 1, "agent_1": 2})
    assert seen["agent_1"][-3:].tolist() == [1, 0, 1] and rewards == {"agent_0": 1.5, "agent_1": 1.5} and not over["__all__"]
    slope = environment("make_slope", reward="sum")
    slope.reset(seed=1)
    for _ in range(3):
        _, _, over, cut, _ = slope.step({"a": np.array([0.5, -3.0]), "b": np.zeros(2)})
    assert slope._teams._envs[0].told["a"].tolist() == [1.0, -2.0] and cut["__all__"] and not over["__all__"]  # type: ignore[attr-defined]


def test_environments_of_one_runner_have_episodes_of_their_own() -> None:
    """RLlib gives each its own seed at its first reset, and none after that."""
    firsts = [environment("make_slope").reset(seed=seed)[0]["a"][1] for seed in (7, 8)]
    again = environment("make_slope")
    assert firsts[0] != firsts[1] and again.reset(seed=7)[0]["a"][1] == firsts[0] != again.reset()[0]["a"][1]


def test_a_batch_hands_out_last_views_then_first_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """As RLlib's own vector does: an episode's end, then a step in which that environment begins anew, then its first step."""
    pytest.importorskip("vmas", reason="the extra multi-agent is not installed")
    settings = {"name": "vmas", "args": {"scenario": "balance", "n_agents": 3}, "max_steps": 4}
    batch = TeamBatch({"multi_agent": settings, "seed": 5}, 2, 1)
    firsts, _ = batch.reset()
    act = [{agent: np.full(2, 0.5, np.float32) for agent in batch._teams.spec.agents} for _ in range(2)]
    batch._teams._env.steps[1] = 2  # the second environment is two steps ahead
    ends, step = [], batch._teams.step
    monkeypatch.setattr(batch._teams, "step", lambda actions: ends.append(step(actions)) or ends[-1])
    found = [batch.step(act) for _ in range(2)]
    last, first = (batch._seen(view)[row]["agent_0"] for view, row in ((ends[-1].last, 0), (ends[-1].view, 1)))
    assert np.array_equal(found[-1][0][1]["agent_0"], last) and not np.allclose(last, first), "what the return is bootstrapped from"
    assert [cut["__all__"] for cut in found[-1][3]] == [False, True] and not found[-1][2][1]["__all__"]
    ahead = batch.step([act[0], {}])
    assert not np.allclose(ahead[0][1]["agent_0"], found[-1][0][1]["agent_0"]), "a new episode"
    assert set(ahead[1][1].values()) == {0.0} and set(ahead[1][0].values()) != {0.0}
    assert int(batch._teams._env.steps[1]) == 0, "nothing of the new episode is lost"
    assert np.allclose(ahead[0][1]["agent_0"], batch._seen(batch._teams._view())[1]["agent_0"])
    assert not ahead[3][1]["__all__"] and not batch._autoreset_envs[1]
    late = batch.step(act)
    assert [cut["__all__"] for cut in late[3]] == [True, False] and int(batch._teams._env.steps[1]) == 1
    again = TeamBatch({"multi_agent": settings, "seed": 5}, 2, 1)
    assert np.array_equal(again.reset()[0][0]["agent_1"], firsts[0]["agent_1"])
    other = TeamBatch({"multi_agent": settings, "seed": 5}, 2, 2)
    assert not np.array_equal(other.reset()[0][0]["agent_1"], firsts[0]["agent_1"]), "each runner has episodes of its own"
    with pytest.raises(TypeError, match="an environment at a time"):
        TeamBatch({"multi_agent": {"name": f"{HERE}:make_slope"}, "seed": 5}, 2, 1)


def test_episodes_are_those_that_jobs_are_evaluated_by(tmp_path: Path) -> None:
    config = job(tmp_path, multi_agent={"name": f"{HERE}:make_doors", "args": {}}, rollout={"workers": 2})
    workers = [RolloutWorker(config, index) for index in range(2)]
    net = SharedModule(
        observation_space=gymnasium.spaces.Box(-1.0, 1.0, (15,)),
        action_space=gymnasium.spaces.Discrete(3),
        model_config={"own": 4, "choices": 3, "width": 8, "central": False, "std_init": 1.0, "value_norm_beta": None},
    )
    with torch.no_grad():
        net._actor[-1].weight.zero_()
        net._actor[-1].bias.copy_(torch.tensor([0.0, 1.0, 2.0]))
    figures = evaluation_of(net, workers, 3)
    assert figures["eval/return"] == 2 + 2 + 1 + 2 and figures["eval/episodes"] == 3 and figures["eval/truncated"] == 1.0


# -- its returns -----------------------------------------------------------------------------------------------


def test_the_critic_learns_normalised_returns_and_values_in_units_of_rewards(monkeypatch: pytest.MonkeyPatch) -> None:
    net, seen = module(), torch.randn(3, 15)
    raw = net.compute_values({Columns.OBS: seen})
    given: dict[str, Any] = {}

    def loss(self: Any, *, batch: dict[str, Any], **_: Any) -> float:
        given.update(targets=batch[Postprocessing.VALUE_TARGETS], values=net.compute_values(batch))
        return 1.0

    monkeypatch.setattr(_rllib.PPOTorchLearner, "compute_loss_for_module", loss)
    learner = NormalisedLearner.__new__(NormalisedLearner)
    monkeypatch.setattr(NormalisedLearner, "module", {"shared": type("Wrapped", (), {"unwrapped": lambda _: net})()}, raising=False)
    targets, counted = torch.tensor([100.0, 300.0, 9999.0]), torch.tensor([True, True, False])
    batch = {Columns.OBS: seen, Postprocessing.VALUE_TARGETS: targets, Columns.LOSS_MASK: counted}
    assert learner.compute_loss_for_module(module_id="shared", config=None, batch=batch, fwd_out={}) == 1.0
    assert given["targets"][:2].tolist() == pytest.approx([-1.0, 1.0]) and torch.equal(given["values"], raw)
    assert net.norm is not None and net.norm.moments == pytest.approx((200.0, 100.0))
    torch.testing.assert_close(net.compute_values({Columns.OBS: seen}), raw * 100 + 200)
    assert torch.equal(batch[Postprocessing.VALUE_TARGETS], targets), "the batch is as it was"


# -- its runs --------------------------------------------------------------------------------------------------


def namespace(tmp_path: Path, *overrides: str, **given: Any) -> argparse.Namespace:
    file = mat_baselines.ROOT / "jobs/mat/simple_spread.yaml"
    settings = {"job": file, "name": "duel", "out": tmp_path, "lr": 1e-3, "clip": 0.2, "epochs": 2, "minibatches": 1}
    return argparse.Namespace(**settings | given, overrides=["trainer.steps=2", *overrides])


def test_a_finished_curve_is_taken_as_it_is_and_another_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[bool, PpoSettings]] = []

    def curve(config: Any, *, central: bool, ppo: PpoSettings) -> list[dict[str, float]]:
        asked.append((central, ppo))
        return [
            {"step": step, "episode/actions_in_all": step * _rllib.steps_of(config), "eval/return": step - 9.0, "eval/return_ci95": 0.5}
            for step in (0, config.trainer.steps)
        ]

    monkeypatch.setattr(mat_baselines, "learning_curve", curve)
    run = mat_baselines.run_of("mappo", 3, namespace(tmp_path))
    assert run == tmp_path / "duel" / "mappo-seed3" and asked == [(True, PpoSettings(lr=1e-3, clip=0.2, epochs=2, minibatches=1))]
    assert mat_baselines.run_of("mappo", 3, namespace(tmp_path)) == run and len(asked) == 1
    assert json.loads((run / "curve.json").read_text())["settings"]["trainer.steps"] == 2
    for message, args in (
        (r"trainer\.steps: 2, not 4", namespace(tmp_path, "trainer.steps=4")),
        (r"lr: 0\.001, not 0\.1", namespace(tmp_path, lr=0.1)),
        (r"mat\.width: 64, not 8", namespace(tmp_path, "mat.width=8")),
        (r"multi_agent\.reward: mean, not sum", namespace(tmp_path, "multi_agent.reward=sum")),
    ):
        with pytest.raises(ConfigError, match=rf"curve\.json was made otherwise \({message}\)"):
            mat_baselines.run_of("mappo", 3, args)
    mat_baselines.run_of("mappo", 3, namespace(tmp_path, "mat.blocks=2", "learner.lr=1e-3"))
    assert len(asked) == 1, "what RLlib's side never reads"
    other = mat_baselines.run_of("ippo", 3, namespace(tmp_path))
    assert asked[-1][0] is False
    figures = mat_baselines.figures_of({"mappo": [run], "ippo": [other]})
    assert figures["mappo_return"] == [-7.0] and figures["mappo/return_at_0"] == [-9.0] and figures["mappo/return_at_3200"] == [-7.0]


def test_the_transformer_s_side_is_a_run_of_its_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Path, list[str]]] = []
    monkeypatch.setattr(mat_baselines, "trained", lambda *given: asked.append(given) or tmp_path)
    mat_baselines.run_of("mat", 1, namespace(tmp_path))
    fixed = ["trainer.steps=2", "name=mat-seed1", "seed=1", f"out={tmp_path / 'duel'}", "tracking.wandb=off"]
    assert asked == [(mat_baselines.ROOT / "jobs/mat/simple_spread.yaml", fixed)]


def test_several_tasks_are_refused(tmp_path: Path) -> None:
    config = job(tmp_path, multi_agent={"tasks": {"a": {}, "b": {}}}, rollout={"workers": 2})
    with pytest.raises(ConfigError, match=r"multi_agent\.tasks: one module of RLlib plays one task"):
        _rllib.learning_curve(config, central=True, ppo=PpoSettings(lr=1e-3, clip=0.2, epochs=1, minibatches=1))


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("world", ["make_doors", "make_slope", "vmas"])
def test_rllib_learns_under_masks_by_numbers_and_in_a_batch(tmp_path: Path, world: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(mat_baselines.ROOT))
    own = {"name": f"{HERE}:{world}", "args": {}}
    batch = {"name": "vmas", "args": {"scenario": "balance", "n_agents": 3}, "max_steps": 4}
    config = job(tmp_path, multi_agent=batch if world == "vmas" else own, trainer={"steps": 2, "eval_every": 1})
    rows = _rllib.learning_curve(config, central=True, ppo=PpoSettings(lr=1e-2, clip=0.2, epochs=2, minibatches=2))
    assert [(row["step"], row["episode/actions_in_all"]) for row in rows] == [(0, 0), (1, 24), (2, 48)]
    assert all(row["eval/episodes"] == 3 for row in rows)
