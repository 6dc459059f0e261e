"""Action heads: discrete, masked, continuous, and teams or actions that are both (semi-discrete), with one log-prob a part.

A part is the choice or one dimension of an agent's action; PPO takes a ratio of each.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from reasoner_ray.envs.multi_agent.spec import ActionLayout

ILLEGAL = -1e10
"""Logit of what an action mask forbids."""


class ActionHead(nn.Module):
    """Distributions of actions from a network's outputs [..., choices + dims]: a categorical, and normals beside it.

    Normal(mean, 0.5 sigmoid(s)) with one learnt s a dimension; actions are not squashed, the environment clips them. An agent
    without a choice or with fewer dimensions has log-prob and entropy 0 in those parts.
    """

    parts: torch.Tensor

    def __init__(self, layout: ActionLayout, std_init: float) -> None:
        super().__init__()
        self.choices, self.dims = layout.n_choices, layout.n_dims
        self.outputs = self.choices + self.dims
        self.has_choice = self.choices > 0
        self.token = int(self.has_choice) + self.outputs
        self.log_std = nn.Parameter(torch.full((self.dims,), std_init)) if self.dims else None
        self.register_buffer("parts", torch.from_numpy(layout.parts).float(), persistent=False)

    def sample(self, out: torch.Tensor, legal: torch.Tensor, *, greedy: bool, generator: torch.Generator | None) -> torch.Tensor:
        """Actions [B, m, parts] from outputs [B, m, choices + dims]; ``greedy`` takes the likeliest choice and the means."""
        drawn = []
        if self.has_choice:
            logits = self._masked(out, legal)
            choice = logits.argmax(-1) if greedy else _draw(logits, generator)
            drawn.append(choice[..., None].to(out.dtype))
        if self.dims:
            mean = out[..., self.choices :]
            noise = 0.0 if greedy else torch.randn(mean.shape, generator=generator, device=mean.device) * self._std()
            drawn.append(mean + noise)
        return torch.cat(drawn, -1)

    def logprobs(self, out: torch.Tensor, legal: torch.Tensor, actions: torch.Tensor, parts: torch.Tensor) -> torch.Tensor:
        """log pi of each part of ``actions`` [B, m, parts], the same shape; 0 where ``parts`` (float, broadcast) is."""
        found = []
        if self.has_choice:
            logprobs = F.log_softmax(self._masked(out, legal), -1)
            found.append(logprobs.gather(-1, actions[..., :1].long()))
        if self.dims:
            std = self._std()
            z = (actions[..., int(self.has_choice) :] - out[..., self.choices :]) / std
            found.append(-0.5 * z**2 - std.log() - 0.5 * math.log(2 * math.pi))
        return torch.cat(found, -1) * parts

    def entropy(self, out: torch.Tensor, legal: torch.Tensor, parts: torch.Tensor) -> torch.Tensor:
        """Entropy of each part in nats, [B, m, parts]."""
        found = []
        if self.has_choice:
            logprobs = F.log_softmax(self._masked(out, legal), -1)
            found.append(-(logprobs.exp() * logprobs).sum(-1, keepdim=True))
        if self.dims:
            normal = 0.5 + 0.5 * math.log(2 * math.pi) + self._std().log()
            found.append(normal.expand(*out.shape[:-1], self.dims))
        return torch.cat(found, -1) * parts

    def tokens(self, actions: torch.Tensor, parts: torch.Tensor) -> torch.Tensor:
        """What a later agent is told of ``actions`` [B, m, parts]: a place for the start, the choice one-hot, then the dimensions."""
        told = []
        if self.has_choice:
            told.append(torch.zeros_like(actions[..., :1]))
            told.append(F.one_hot(actions[..., 0].long(), self.choices).to(actions.dtype) * parts[..., :1])
        if self.dims:
            told.append(actions[..., int(self.has_choice) :] * parts[..., int(self.has_choice) :])
        return torch.cat(told, -1)

    def start(self, rows: int, like: torch.Tensor) -> torch.Tensor:
        """What the first agent is told, [rows, 1, token]: a 1 in the place for the start; zeros where nobody chooses."""
        token = like.new_zeros(rows, 1, self.token)
        if self.has_choice:
            token[..., 0] = 1.0
        return token

    def _masked(self, out: torch.Tensor, legal: torch.Tensor) -> torch.Tensor:
        return out[..., : self.choices].masked_fill(~legal, ILLEGAL)

    def _std(self) -> torch.Tensor:
        assert self.log_std is not None
        return 0.5 * torch.sigmoid(self.log_std)


def _draw(logits: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """One choice [...] of each row of ``logits`` [..., choices]."""
    return torch.multinomial(F.softmax(logits, -1).flatten(0, -2), 1, generator=generator).view(logits.shape[:-1])
