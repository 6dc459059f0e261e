"""Running moments of returns, so that the value head learns numbers of one size whatever the rewards'."""

from __future__ import annotations

import torch

VARIANCE_FLOOR = 1e-2


class ValueNorm:
    """Exponential means of the returns and of their squares, with the bias towards their zero start taken out.

    After k updates with weight b of the past the means are divided by 1 - b^k. The variance is at least 0.01. Before the first
    update nothing is changed.
    """

    def __init__(self, beta: float) -> None:
        self._beta = beta
        self._mean = self._square = self._weight = 0.0

    def update(self, returns: torch.Tensor, weights: torch.Tensor) -> None:
        """Take in ``returns``, of which ``weights`` (0 or 1, the same shape) count. Nothing happens where none does."""
        count = float(weights.sum())
        if not count:
            return
        x, w = returns.double(), weights.double()
        past = self._beta
        self._mean = past * self._mean + (1 - past) * float((x * w).sum()) / count
        self._square = past * self._square + (1 - past) * float((x**2 * w).sum()) / count
        self._weight = past * self._weight + (1 - past)

    @property
    def moments(self) -> tuple[float, float]:
        """Mean and standard deviation of returns."""
        if not self._weight:
            return 0.0, 1.0
        mean = self._mean / self._weight
        return mean, max(self._square / self._weight - mean**2, VARIANCE_FLOOR) ** 0.5

    def normalise(self, returns: torch.Tensor) -> torch.Tensor:
        """``(returns - mean) / std``."""
        mean, std = self.moments
        return (returns - mean) / std

    def denormalise(self, values: torch.Tensor) -> torch.Tensor:
        """``values * std + mean``: the inverse."""
        mean, std = self.moments
        return values * std + mean

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"mean": self._mean, "square": self._square, "weight": self._weight}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """The inverse of ``state_dict``."""
        self._mean, self._square, self._weight = state["mean"], state["square"], state["weight"]
