"""The two losses of ETPO: soft Q learning and its policy improvement."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def soft_q_loss(q: torch.Tensor, targets: torch.Tensor, *, delta: float) -> torch.Tensor:
    """Huber loss of ``targets - q``, [k]: half the square up to ``delta`` (in units of reward), linear beyond it."""
    return F.huber_loss(q, targets, reduction="none", delta=delta)


def soft_policy_loss(expected_q: torch.Tensor, kl: torch.Tensor, *, beta: float) -> torch.Tensor:
    """``beta KL(pi || rho) - E_pi[Q]`` of each state, [k], least where ``pi = rho exp(Q / beta) / Z``.

    Its gradient is exact, a sum over all that the state allows: neither the sampled token nor its probability enter.
    """
    return beta * kl - expected_q
