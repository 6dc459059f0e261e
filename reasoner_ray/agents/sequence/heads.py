"""Action heads: choices (cross-entropy), numbers (tanh, squared error), and numbers from a squashed normal (Online DT).

A head reads hidden states [..., width] and gives its parameters [..., outputs]; losses and entropies are of one step each.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Distribution, Independent, Normal, TanhTransform, TransformedDistribution

from reasoner_ray.agents.sequence.spaces import Interface

Kind = Literal["choice", "tanh", "gaussian"]
LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0
EDGE = 1e-6
"""Recorded actions are kept this far from -1 and 1, where a squashed normal has no density."""


class Head(nn.Module):
    """One of the kinds. ``stochastic`` ones can be sampled and have an entropy."""

    def __init__(self, width: int, interface: Interface, *, stochastic: bool) -> None:
        super().__init__()
        self.kind: Kind = "choice" if interface.choices else "gaussian" if stochastic else "tanh"
        self.layer = nn.Linear(width, interface.action * (2 if self.kind == "gaussian" else 1))

    @property
    def stochastic(self) -> bool:
        """Whether it is a distribution."""
        return self.kind != "tanh"

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits; or actions in [-1, 1]; or means and log deviations."""
        out: torch.Tensor = self.layer(hidden)
        return out.tanh() if self.kind == "tanh" else out

    def loss(self, out: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """Of each step, [...]: -log pi(action), or the squared error averaged over the action's dimensions."""
        if self.kind == "choice":
            return -(F.log_softmax(out, -1) * actions).sum(-1)
        if self.kind == "tanh":
            return (out - actions).square().mean(-1)
        logprobs: torch.Tensor = squashed_normal(out).log_prob(actions.clamp(-1 + EDGE, 1 - EDGE))
        return -logprobs

    def entropy(self, out: torch.Tensor) -> torch.Tensor:
        """Of each step, nats [...]: exact for choices, by one sample -log pi(a), which has a gradient, for a squashed normal.

        Raises ``ValueError`` for a head that is no distribution.
        """
        if self.kind == "choice":
            logprobs = F.log_softmax(out, -1)
            return -(logprobs.exp() * logprobs).sum(-1)
        if self.kind == "tanh":
            raise ValueError("a tanh head is no distribution, so it has no entropy")
        policy = squashed_normal(out)
        sampled: torch.Tensor = -policy.log_prob(policy.rsample())
        return sampled

    def act(self, out: torch.Tensor, *, greedy: bool, generator: torch.Generator | None = None) -> torch.Tensor:
        """Encoded actions [..., action]: the likeliest choice or the mean where ``greedy``, else drawn."""
        if self.kind == "tanh":
            return out
        if self.kind == "choice":
            rows = F.softmax(out, -1).flatten(0, -2)
            choice = rows.argmax(-1) if greedy else torch.multinomial(rows, 1, generator=generator).squeeze(-1)
            return F.one_hot(choice.view(out.shape[:-1]), out.shape[-1]).to(out.dtype)
        mean, std = _normal(out)
        noise = 0.0 if greedy else torch.randn(mean.shape, generator=generator, device=mean.device) * std
        return (mean + noise).tanh()


def squashed_normal(out: torch.Tensor) -> Distribution:
    """a = tanh(x), x from a normal with means and log deviations ``out`` [..., 2 action]; one event an action."""
    mean, std = _normal(out)
    # Unchecked: what is not finite must reach the learner's own check, which all ranks come to.
    base = Normal(mean, std, validate_args=False)
    return Independent(TransformedDistribution(base, [TanhTransform(cache_size=1)], validate_args=False), 1, validate_args=False)


def _normal(out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mean, raw = out.chunk(2, -1)
    log_std = LOG_STD_MIN + 0.5 * (LOG_STD_MAX - LOG_STD_MIN) * (raw.tanh() + 1)
    return mean, log_std.exp()
