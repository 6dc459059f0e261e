"""Another problem with an undefined goal: how biased is a coin? The agent flips it until it thinks that it knows."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces

from reasoner_ray.agents.agdc.cessation import BeliefSummary
from tests.agents.agdc import my_search


class Coin(gymnasium.Env[np.ndarray, Any]):
    """Flip one of two coins (the action); the observation is which one and how it fell. No step ends it."""

    observation_space = spaces.Box(0, 1, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.bias, self.flips = self.np_random.uniform(0.05, 0.95, size=2), 0
        return self.flip(0), {"bias": self.bias}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.flips += 1
        return self.flip(int(action)), -1.0, False, self.flips >= 60, {"bias": self.bias}

    def flip(self, coin: int) -> np.ndarray:
        return np.array([coin, self.np_random.uniform() < self.bias[coin]], dtype=np.float32)


class CoinBelief(my_search.CoinBelief):
    """The README's belief, with a summary that says all that one may say."""

    def summary(self) -> BeliefSummary:
        total = self.counts.sum(-1)
        mean = self.counts[..., 1] / total
        deviation = (mean * (1 - mean) / (total + 1)).sqrt()
        spread = deviation.square().sum(-1).sqrt()
        return BeliefSummary(mean, deviation, spread, torch.exp(-spread), total.new_zeros(len(total), 0))
