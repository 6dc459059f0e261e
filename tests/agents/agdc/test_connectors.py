"""Goal detection in RLlib's pipeline: what an env runner records is what the belief and the rule say, episode by episode."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import SyncVectorEnv
from ray.rllib.algorithms.ppo.ppo import PPOConfig
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner
from ray.tune.registry import register_env

from reasoner_ray.agents.agdc.cessation import make_rule
from reasoner_ray.agents.agdc.connectors import DetectGoals, detect_goals
from reasoner_ray.agents.agdc.rllib import CountFaults
from reasoner_ray.agents.agdc.settings import CessationConfig, FeedbackConfig
from reasoner_ray.agents.agdc.wrappers import Ceasing
from reasoner_ray.errors import ConfigError
from tests.agents.agdc.test_detection import Broken, Deaf, Drawn
from tests.agents.agdc.toy import Coin, CoinBelief

RULE = make_rule(CessationConfig(rule="spread", threshold=0.12))
FEEDBACK = FeedbackConfig(stop=20, information=2)


def runner(
    wrap: bool, envs: int = 3, coin: type[Coin] = Coin, belief: type[CoinBelief] = CoinBelief, index: int = 0
) -> SingleAgentEnvRunner:
    def make(context: Any) -> Any:
        vector = SyncVectorEnv([coin] * int(context.get("num_envs", 1)))
        return Ceasing(vector) if wrap else vector

    register_env("coins", make)
    config = PPOConfig().environment("coins").debugging(seed=1)
    config.env_runners(
        num_env_runners=0,
        num_envs_per_env_runner=envs,
        gym_env_vectorize_mode=gymnasium.VectorizeMode.VECTOR_ENTRY_POINT,
        env_to_module_connector=detect_goals(belief, RULE, FEEDBACK),
    )
    config.callbacks(CountFaults)
    return SingleAgentEnvRunner(config=config, worker_index=index)


def test_a_runner_records_features_feedback_and_endings() -> None:
    found = runner(wrap=True).sample(num_episodes=12, random_actions=False)
    lengths, one = [], torch.ones(1, dtype=torch.bool)
    for episode in found:
        seen = np.asarray(episode.get_observations())
        belief = CoinBelief(1)
        belief.reset(one, torch.as_tensor(seen[:1, :2]))
        spread = float(belief.summary().spread)
        assert np.allclose(seen[0, 2:], belief.features()[0], atol=1e-6)
        for t, reward in enumerate(episode.get_rewards()):
            belief.update(one, torch.as_tensor(seen[t + 1 : t + 2, :2]))
            assert np.allclose(seen[t + 1, 2:], belief.features()[0], atol=1e-6)
            now = float(belief.summary().spread)
            last, sure = t == len(episode) - 1, now < 0.12
            assert sure == (last and episode.is_terminated), "it ends where the rule holds, and nowhere else"
            assert reward == pytest.approx(-1 + 20 * sure + 2 * np.log(spread / now), abs=1e-4)
            spread = now
        lengths.append(len(episode))
    assert any(episode.is_terminated for episode in found)
    assert max(lengths) <= 60
    assert len(set(lengths)) > 1


def test_beliefs_of_two_runners_draw_other_numbers_and_repeat_with_the_seed() -> None:
    seeds = []
    for index in (1, 2, 1):
        made = runner(wrap=True, belief=Drawn, index=index)
        made.sample(num_timesteps=6, random_actions=True)
        (piece,) = (piece for piece in made._env_to_module if isinstance(piece, DetectGoals))
        seeds.append(piece.detector.belief.seeded)  # type: ignore[attr-defined]
    assert seeds[0] != seeds[1] and seeds[0] == seeds[2]


def test_what_connectors_count_is_logged() -> None:
    made = runner(wrap=True, coin=Broken, belief=Deaf)
    made.sample(num_episodes=4, random_actions=False)
    assert made.get_metrics()["belief_unreadable"] > 0


def test_an_environment_that_nobody_can_end_is_refused() -> None:
    with pytest.raises(ConfigError, match="must be wrapped in"):
        runner(wrap=False)


def test_a_record_holds_only_numbers() -> None:
    found = runner(wrap=True, coin=Broken, belief=Deaf).sample(num_episodes=4, random_actions=False)
    for episode in found:
        seen = np.asarray(episode.get_observations())
        assert np.isfinite(seen).all()
        assert (seen[1:3, :2] == 0).all(), "what could not be read is shown as 0"
