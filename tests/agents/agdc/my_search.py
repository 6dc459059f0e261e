from typing import Any

import gymnasium
import numpy as np
import torch
from ray.rllib.algorithms.ppo.ppo import PPOConfig
from ray.tune.registry import register_env

from reasoner_ray.agents.agdc.cessation import BeliefSummary, make_rule
from reasoner_ray.agents.agdc.settings import CessationConfig, FeedbackConfig
from reasoner_ray.agents.agdc.wrappers import AGDC


class Coins(gymnasium.Env[np.ndarray, Any]):
    """Which of two coins (the action) to flip, until it is known how biased they are. Nothing says when that is."""

    observation_space = gymnasium.spaces.Box(0, 1, (2,), np.float32)  # which coin, and whether it showed heads
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.bias, self.flips = self.np_random.uniform(size=2), 0
        return self.flip(0), {"bias": self.bias}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.flips += 1
        return self.flip(action), -1.0, False, self.flips >= 100, {"bias": self.bias}

    def flip(self, coin: int) -> np.ndarray:
        return np.array([coin, self.np_random.uniform() < self.bias[coin]], np.float32)


class CoinBelief:
    """Beta posteriors of E pairs of coins; tensors hold one row for each episode, and ``mask`` (bool [E]) says which of them to change."""

    n_features = 4

    def __init__(self, n: int) -> None:
        self.counts = torch.ones(n, 2, 2)  # [E, coin, tails or heads]

    def reset(self, mask: torch.Tensor, observation: torch.Tensor) -> None:
        self.counts[mask] = 1.0
        self.update(mask, observation)

    def update(self, mask: torch.Tensor, observation: torch.Tensor) -> None:
        coin, heads = observation[mask].long().unbind(-1)
        self.counts[mask.nonzero().flatten(), coin, heads] += 1

    def summary(self) -> BeliefSummary:
        posterior = torch.distributions.Beta(self.counts[..., 1], self.counts[..., 0])
        return BeliefSummary(posterior.mean, posterior.stddev)

    def features(self) -> torch.Tensor:
        return torch.cat([self.summary().mean, 4 * self.summary().deviation], dim=-1)


def make(context: Any = None) -> AGDC:
    rule = make_rule(CessationConfig(rule="spread", threshold=0.12))
    return AGDC(Coins(), CoinBelief(1), rule, FeedbackConfig(stop=20))


register_env("two-coins", make)
config = PPOConfig().environment("two-coins")
config.env_runners(num_env_runners=0, num_envs_per_env_runner=8)
config.training(lr=1e-3, train_batch_size_per_learner=512, minibatch_size=128, num_epochs=2)

if __name__ == "__main__":
    algorithm = config.build_algo()
    print(algorithm.train()["env_runners"]["episode_len_mean"], "flips until the agent ends its search")
