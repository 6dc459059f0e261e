"""Estimators of KL(pi || reference) from the log-probs of tokens that pi sampled (Schulman 2020, "Approximating KL")."""

from __future__ import annotations

from typing import Literal

import torch

KlKind = Literal["k1", "k2", "k3"]


def kl_estimate(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, kind: KlKind) -> torch.Tensor:
    """Per-token estimate in nats, same shape as the inputs.

    With d = log pi - log ref: k1 = d (unbiased, may be negative); k2 = d^2/2 (biased, low variance, its gradient is
    that of the KL); k3 = exp(-d) - 1 + d (unbiased, never negative).
    """
    d = logprobs - ref_logprobs
    if kind == "k1":
        return d
    if kind == "k2":
        return 0.5 * d**2
    # expm1 keeps the digits that exp(-d) - 1 would lose for the small d of an update.
    return torch.expm1(-d) + d
