"""Whitening of advantages with moments that add over ranks."""

from __future__ import annotations

import torch

STD_FLOOR = 1e-6
"""Added to the standard deviation, so that advantages that are all alike become 0 and not noise."""


def moments(advantages: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """``[count, sum, sum of squares]`` over the entries where ``mask`` (bool [K]) is True, float64 [3].

    Sum it over ranks (all-reduce), then take ``mean_std``. A true advantage of 0 counts: only the mask decides.
    """
    x = advantages[mask].double()
    return torch.stack([torch.tensor(float(len(x)), dtype=torch.float64, device=x.device), x.sum(), (x**2).sum()])


def mean_std(total: torch.Tensor) -> tuple[float, float]:
    """Mean and standard deviation (n in the denominator) of summed ``moments``.

    Raises ``ValueError`` where they count nothing.
    """
    count, first, second = total.tolist()
    if count <= 0:
        raise ValueError("no trainable token to normalise advantages over")
    mean = first / count
    return mean, max(second / count - mean**2, 0.0) ** 0.5


def whiten(advantages: torch.Tensor, mean: float, std: float) -> torch.Tensor:
    """``(advantages - mean) / std``, the same shape."""
    return (advantages - mean) / (std + STD_FLOOR)
