"""The clipped policy loss and its decoupled behaviour weight."""

from __future__ import annotations

import torch


def clipped_surrogate(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, *, clip_low: float, clip_high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss ``-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)`` [k] and where its gradient is cut, bool [k].

    r = pi/pi_old (Schulman et al. 2017, eq. 7); separate bounds as in DAPO (Yu et al. 2025, eq. 8).
    """
    ratio = torch.exp(logprobs - old_logprobs)
    free = ratio * advantages
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    return -torch.minimum(free, bounded), (bounded < free).detach()


def behaviour_weights(old_logprobs: torch.Tensor, behaviour_logprobs: torch.Tensor, weights: torch.Tensor, *, cap: float) -> torch.Tensor:
    """Truncated importance weight ``min(pi_old/mu, cap)`` [k], without gradient; 1 for tokens that ``weights`` drops.

    The decoupled objective (Hilton et al. 2022): clipping is about the step away from pi_old, the weight about who
    sampled. It corrects staleness and the difference in numerics between rollout engine and learner; the cap
    bounds its variance at the price of a bias.
    """
    difference = torch.where(weights > 0, old_logprobs.detach() - behaviour_logprobs, 0.0)
    return torch.exp(difference).clamp(max=cap)
