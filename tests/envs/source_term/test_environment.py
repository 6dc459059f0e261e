"""The search as an environment: one and many episodes agree, bounds, seeds, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from PIL import Image

import reasoner_ray.envs  # noqa: F401 - registers SourceTerm
from reasoner_ray.envs.source_term.core import SourceTermBatch
from reasoner_ray.envs.source_term.environment import SourceTerm, SourceTermVector
from reasoner_ray.envs.source_term.plume import concentration
from reasoner_ray.envs.source_term.settings import SourceTermConfig
from reasoner_ray.errors import ConfigError, EnvironmentFault
from reasoner_ray.pictures import write_gif
from reasoner_ray.seeds import derived_seeds

VARIED = {"scene": {"wind": (1.0, 3.0), "direction": (0, 360), "z": (0, 2), "strength": (2, 9)}, "start": "random", "max_steps": 12}


@pytest.mark.filterwarnings("ignore:.*(infinity|Box action spaces).*")  # estimates have no bounds, a heading is in radians
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("moves", ["discrete", "heading"])
def test_gymnasium_finds_no_fault(moves: str) -> None:
    check_env(gymnasium.make("reasoner_ray/SourceTerm-v0", config={"moves": moves}, render_mode="rgb_array").unwrapped)


@pytest.mark.parametrize("moves", ["discrete", "heading"])
def test_many_at_once_are_the_same_as_each_alone(moves: str) -> None:
    config = {**VARIED, "moves": moves}
    many = SourceTermVector(5, config)
    singles = [SourceTerm(config) for _ in range(5)]
    observations, infos = many.reset(seed=40)
    alone = [env.reset(seed=seed) for env, seed in zip(singles, derived_seeds(40, 5), strict=True)]
    stream = np.random.default_rng(0)
    for t in range(30):  # past the end of an episode: its successor is the same too
        for i, (observation, info) in enumerate(alone):
            assert np.array_equal(observations[i], observation), (t, i)
            assert np.array_equal(infos["source"][i], info["source"])
            assert infos["distance"][i] == pytest.approx(info["distance"])
        actions = stream.integers(4, size=5) if moves == "discrete" else stream.uniform(-math.pi, math.pi, (5, 1)).astype(np.float32)
        over = alone_over(singles)
        observations, rewards, terminated, truncated, infos = many.step(actions)
        assert not terminated.any()
        alone = []
        for i, env in enumerate(singles):
            if over[i]:
                alone.append(env.reset())
                assert rewards[i] == 0
                continue
            observation, reward, _, cut, info = env.step(actions[i])
            assert (reward, cut) == (rewards[i], truncated[i])
            assert info["travelled"] == pytest.approx(infos["travelled"][i])
            alone.append((observation, info))


def test_neighbouring_seeds_share_no_episode() -> None:
    """Env runners of RLlib have seeds s, s + 1, ...; so may jobs."""
    seen = np.concatenate([SourceTermVector(16, VARIED).reset(seed=seed)[1]["source"] for seed in range(4)])
    assert len(np.unique(seen, axis=0)) == 4 * 16


def alone_over(envs: list[SourceTerm]) -> list[bool]:
    return [int(env.core.elapsed[0]) >= env.config.max_steps for env in envs]


def test_a_mask_begins_some_episodes_alone() -> None:
    env = SourceTermVector(3, VARIED)
    env.reset(seed=1)
    before, *_ = env.step(np.zeros(3, dtype=int))
    after, _ = env.reset(options={"reset_mask": np.array([False, True, False])})
    assert np.array_equal(after[[0, 2]], before[[0, 2]])
    assert not np.array_equal(after[1], before[1])


def test_moves_stay_in_the_domain_and_count_their_way() -> None:
    core = SourceTermBatch(SourceTermConfig(speed=2.0, start=(1.0, 24.5)), 4)
    core.reset(seeds=[0, 1, 2, 3])
    step = core.step(torch.tensor([0, 1, 2, 3]))
    assert core.position.tolist() == [[3.0, 24.5], [1.0, 25.0], [0.0, 24.5], [1.0, 22.5]]
    assert step.travelled.tolist() == pytest.approx([2.0, 0.5, 1.0, 2.0])


def test_without_noise_a_reading_is_the_concentration() -> None:
    exact = {"noise": 0.0, "background": 0.0, "detection": 1.0, "threshold": 5e-10}
    core = SourceTermBatch(SourceTermConfig.model_validate({"sensor": exact}), 2)
    observation = core.reset(seeds=[5, 6])
    expected = concentration(core.source, torch.tensor([0.0, 0.0, 0.0]))
    assert torch.equal(observation[:, 2], expected)


def test_estimates_err_as_the_prior_says_unless_centred() -> None:
    core = SourceTermBatch(SourceTermConfig(), 400)
    core.reset(seeds=list(range(400)))
    truth = core.source[:, 4:]
    error = truth - core.estimates
    assert float(error[:, 1].mean()) == pytest.approx(0, abs=4 * math.radians(10) / 20)
    assert float(error[:, 1].std()) == pytest.approx(math.radians(10), rel=0.15)
    assert 0 <= float(error[:, 2].min()) < float(error[:, 2].max()) <= 2 + 1e-6
    assert -2 - 1e-6 <= float(error[:, 3].min()) < float(error[:, 3].max()) <= 1e-6
    centred = SourceTermBatch(SourceTermConfig.model_validate({"prior": {"centred": True}}), 3)
    centred.reset()
    assert torch.equal(centred.estimates, centred.source[:, 4:])


def test_start_keeps_its_clearance_unless_none_is_asked_for() -> None:
    core = SourceTermBatch(SourceTermConfig.model_validate({**VARIED, "clearance": 8.0}), 200)
    core.reset(seeds=list(range(200)))
    assert float(core.distance.min()) >= 8
    on_top = {"start": (10, 10), "scene": {"x": (10, 10), "y": (10, 10)}, "clearance": 0}
    observation, info = SourceTerm(on_top).reset(seed=1)
    assert info["distance"] == 0
    assert np.isfinite(observation).all(), "a start on top of the source reads a finite concentration"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"scene": {"width": 0}}, r"scene\.width.*greater than 0"),
        ({"scene": {"x": (5, 30)}}, r"x: the source would lie outside the domain"),
        ({"scene": {"wind": (3, 1)}}, r"wind: the lowest value 3 is above the highest 1"),
        ({"start": (26, 0)}, r"start: \(26, 0\) lies outside the domain of 25 x 25 m"),
        ({"start": (10, 10), "scene": {"x": (10, 10), "y": (10, 10)}}, r"clearance: no source lies 1 m away from the start"),
        ({"scene": {"diffusivity": (1, 2)}}, r"prior\.diffusivity_width=2: estimates of a diffusivity of 1 could be negative"),
        ({"prior": {"lifetime_width": 10}}, r"prior\.lifetime_width=10: beliefs about a lifetime of 10 s could have it below 0"),
        ({"prior": {"lifetime_width": 11, "centred": True}}, r"prior\.lifetime_width=11"),
        ({"prior": {"z": (5, 0)}}, r"z: \(5, 0\) is no range of heights"),
        ({"prior": {"z": (0, math.nan)}}, r"prior\.z\.1: .*finite number"),
        ({"scene": {"width": math.inf}}, r"scene\.width: .*finite number"),
        ({"scene": {"x": (math.nan, 20)}}, r"scene\.x\.0: .*finite number"),
        ({"scene": {"strength": (math.nan, math.nan)}}, r"scene\.strength\.0: .*finite number"),
        ({"sensor": {"noise": math.inf}}, r"sensor\.noise: .*finite number"),
        ({"prior": {"wind_sd": math.nan}}, r"prior\.wind_sd: .*finite number"),
        ({"speed": math.inf}, r"speed: .*finite number"),
        ({"start": (math.nan, 0)}, r"start.*finite number"),
        ({"sensor": {"detection": 0}}, r"sensor\.detection.*greater than 0"),
        ({"sped": 1}, r"sped"),
    ],
)
def test_what_cannot_work_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SourceTerm(config)


def test_a_step_outside_an_episode_is_an_error() -> None:
    env = SourceTerm({"max_steps": 1})
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(0)
    env.reset()
    assert env.step(0)[3]
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(0)


@pytest.mark.parametrize(
    ("moves", "action", "message"),
    [
        ("discrete", 4, "one of 4 moves, not 4"),
        ("discrete", -1, "not -1"),
        ("heading", math.nan, "heading between -pi and pi, not nan"),
        ("heading", 4.0, "not 4"),
    ],
)
def test_what_is_no_action_is_refused(moves: str, action: float, message: str) -> None:
    many = SourceTermVector(2, {"moves": moves, "max_steps": 1})
    many.reset(seed=0)
    with pytest.raises(EnvironmentFault, match=message):
        many.step(np.array([0, action]))
    many.step(np.array([0, 0]))
    many.step(np.array([0, action]))  # episodes that begin anew take no action


def test_pictures_show_way_and_particles_and_make_a_gif(tmp_path: Path) -> None:
    env = SourceTerm({"scene": {"height": 12.5, "y": (5, 12)}}, render_mode="rgb_array")
    env.reset(seed=0)
    frames = [env.render()]
    env.step(0)
    env.particles = np.tile(env.core.source[0].numpy(), (50, 1)) + np.random.default_rng(0).normal(size=(50, 8))
    frames.append(env.render())
    assert all(f is not None and f.dtype == np.uint8 and f.ndim == 3 for f in frames)
    assert not np.array_equal(frames[0], frames[1])
    write_gif([f for f in frames if f is not None], tmp_path / "a" / "search.gif")
    with Image.open(tmp_path / "a" / "search.gif") as gif:
        assert gif.n_frames == 2  # type: ignore[attr-defined]


def test_the_reward_may_be_what_a_move_gained_on_the_source() -> None:
    config = SourceTermConfig.model_validate({"start": (10, 10), "scene": {"x": (13, 13), "y": (14, 14)}, "reward": "approach"})
    core = SourceTermBatch(config, 4)
    core.reset(seeds=[0, 1, 2, 3])
    reward = core.step(torch.arange(4)).reward
    after = torch.linalg.vector_norm(core.position - torch.tensor([13.0, 14.0]), dim=-1)
    assert reward.tolist() == pytest.approx((5.0 - after).tolist(), abs=1e-5)
    assert (reward > 0).sum() == 2, "two of four moves lead nearer"
