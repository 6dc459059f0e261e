"""Key-to-Door: Gymnasium's own check, its rules, and how often random moves open the door."""

from __future__ import annotations

import itertools

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import reasoner_ray.envs  # noqa: F401 - registers it
from reasoner_ray.envs.key_to_door import MOVES, KeyToDoor, expert


def chance_of_one_room(size: int, steps: int) -> float:
    """The exact chance that random moves reach a random cell from another random cell, by the chances of one step less."""
    total = 0.0
    for goal in itertools.product(range(size), repeat=2):
        chance = np.zeros((size, size))
        chance[goal] = 1
        for _ in range(steps):
            walls = np.pad(chance, 1, mode="edge")  # a move into a wall leaves the agent where it is
            inner = slice(1, -1)
            chance = (walls[2:, inner] + walls[:-2, inner] + walls[inner, 2:] + walls[inner, :-2]) / 4
            chance[goal] = 1
        total += (chance.sum() - 1) / (size**2 - 1)
    return total / size**2


def test_gymnasium_takes_it() -> None:
    env = gymnasium.make("reasoner_ray/KeyToDoor-v0", render_mode="rgb_array")
    check_env(env.unwrapped)
    with pytest.raises(ValueError, match="a room has at least 2 x 2 cells"):
        KeyToDoor(size=1)


def test_random_moves_succeed_in_three_percent() -> None:
    """0.1775^2 = 3.15 %, which 4,000 episodes agree with within four standard errors."""
    chance = chance_of_one_room(5, 8) ** 2
    assert chance == pytest.approx(0.0315, abs=1e-4)
    env, rng, opened, episodes = KeyToDoor(), np.random.default_rng(0), 0, 4000
    for seed in range(episodes):
        env.reset(seed=seed)
        over, reward = False, 0.0
        while not over:
            _, reward, over, _, info = env.step(rng.integers(4))
        opened += reward == 1.0
        assert info["success"] == (reward == 1.0)
    assert abs(opened / episodes - chance) < 4 * (chance * (1 - chance) / episodes) ** 0.5


def test_the_expert_always_succeeds() -> None:
    env, rng = KeyToDoor(), np.random.default_rng(0)
    for seed in range(50):
        observation, _ = env.reset(seed=seed)
        over, earned = False, []
        while not over:
            observation, reward, over, truncated, _ = env.step(expert(observation, rng))
            earned.append(reward)
        assert earned[-1] == 1.0 and sum(earned) == 1.0 and not truncated and 17 <= len(earned) <= 24


def test_the_door_does_not_open_without_the_key_and_nothing_tells() -> None:
    """In the last room both agents see the same; the first room shows that the key is gone."""
    env, last = KeyToDoor(), []
    for fetch in (True, False):
        observation, _ = env.reset(seed=3)
        for _ in range(16):
            offset = env.offset
            away = [i for i, move in enumerate(MOVES) if env.room == 0 and offset is not None and (move != offset).any()]
            action = expert(observation, np.random.default_rng(0)) if fetch else np.int64(away[0] if away else 0)
            observation, reward, over, _, _ = env.step(action)
            assert reward == 0.0 and not over
        assert env.has_key == fetch and env.room == 2
        last.append(observation.tolist())
        over = False
        while not over:
            observation, reward, over, _, info = env.step(expert(observation, np.random.default_rng(0)))
        assert reward == float(fetch) and info == {"success": fetch}
    assert last[0] == last[1] and last[0][:3] == [0.0, 0.0, 1.0]
    assert env.observation_space.contains(observation)
