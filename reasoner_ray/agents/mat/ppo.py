"""PPO for teams as pure functions on tensors [T, E, n] (time, environment, agent) and on rows of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from reasoner_ray.credit.normalise import mean_std, moments, whiten
from reasoner_ray.losses.policy import clipped_surrogate


@dataclass(frozen=True, slots=True, kw_only=True)
class TeamCredit:
    """What an agent's step is worth."""

    advantages: torch.Tensor  # float32 [T, E, n]
    returns: torch.Tensor  # float32 [T, E, n]; the critic's targets, in units of reward


def team_gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    next_values: torch.Tensor,
    terminated: torch.Tensor,
    truncated: torch.Tensor,
    *,
    gamma: float,
    gae_lambda: float,
) -> TeamCredit:
    """Generalised advantages (Schulman et al. 2016, eq. 16) of each agent, all tensors [T, E, n].

        delta_t = r_t + gamma (1 - terminated_t) V(s_{t+1}) - V(s_t)
        A_t = delta_t + gamma lambda (1 - terminated_t)(1 - truncated_t) A_{t+1}

    ``next_values`` is the value of the state that step t led to *in the same episode*: at a truncation that of the last
    observation, not of the next episode's first. So an end by time is bootstrapped and an end by success or failure is not.
    Computed in float64. Values and the returns A + V are in units of reward.
    """
    alive = (~terminated).double()
    deltas = rewards.double() + gamma * alive * next_values.double() - values.double()
    carry = gamma * gae_lambda * alive * (~truncated).double()
    advantages = torch.zeros_like(deltas)
    ahead = torch.zeros_like(deltas[0])
    for t in range(len(deltas) - 1, -1, -1):
        ahead = deltas[t] + carry[t] * ahead
        advantages[t] = ahead
    return TeamCredit(advantages=advantages.float(), returns=(advantages + values.double()).float())


def team_credit(
    rewards: torch.Tensor,
    values: torch.Tensor,
    next_values: torch.Tensor,
    terminated: torch.Tensor,
    truncated: torch.Tensor,
    active: torch.Tensor,
    next_active: torch.Tensor,
    *,
    advantage: Literal["joint", "per_agent"],
    gamma: float,
    gae_lambda: float,
) -> TeamCredit:
    """``team_gae`` by agent, or one advantage for the team from ``mean_m V(o^m)`` over the living agents (Wen et al. 2022, section 4.2).

    ``joint`` averages rewards and values over agents and ends with the last of them; the critics' targets stay each agent's
    own reward and return. ``active`` are those alive as the step begins, ``next_active`` after it in the same episode: the value
    of a state is the mean over the agents alive in it, whether it is met as V(s_t) or as V(s_{t+1}).
    """
    each = team_gae(rewards, values, next_values, terminated, truncated, gamma=gamma, gae_lambda=gae_lambda)
    if advantage == "per_agent":
        return each

    def mean(x: torch.Tensor, living: torch.Tensor) -> torch.Tensor:
        return (x * living).sum(-1, keepdim=True) / living.sum(-1, keepdim=True).clamp(min=1)

    team = team_gae(
        mean(rewards, active),
        mean(values, active),
        mean(next_values, next_active),
        terminated.all(-1, keepdim=True),
        (terminated | truncated).all(-1, keepdim=True) & truncated.any(-1, keepdim=True),  # one agent's time may be up before the team's
        gamma=gamma,
        gae_lambda=gae_lambda,
    )
    return TeamCredit(advantages=team.advantages.expand_as(each.advantages), returns=each.returns)


def normalised(advantages: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
    """Advantages with mean 0 and deviation 1 over the steps of living agents (bool ``active``, the same shape)."""
    mean, std = mean_std(moments(advantages, active))
    return whiten(advantages, mean, std)


def huber(error: torch.Tensor, delta: float) -> torch.Tensor:
    """``e^2 / 2`` up to ``|e| = delta``, ``delta (|e| - delta / 2)`` beyond, on both sides.

    (MAPPO's code and its descendants test ``e > delta`` alone, so an error below ``-delta`` has loss 0.)
    """
    size = error.abs()
    return torch.where(size <= delta, 0.5 * error**2, delta * (size - 0.5 * delta))


def value_loss(values: torch.Tensor, old_values: torch.Tensor, targets: torch.Tensor, *, clip: float | None, delta: float) -> torch.Tensor:
    """``max(huber(G - V), huber(G - V_old - clamp(V - V_old, -clip, clip)))`` elementwise; without ``clip`` the first alone."""
    free = huber(targets - values, delta)
    if clip is None:
        return free
    return torch.maximum(free, huber(targets - old_values - (values - old_values).clamp(-clip, clip), delta))


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Joint actions of R environment steps, as the loss sees them; the first three carry gradients."""

    logprobs: torch.Tensor  # float32 [R, n, parts]
    entropy: torch.Tensor  # float32 [R, n, parts]
    values: torch.Tensor  # float32 [R, n]
    old_logprobs: torch.Tensor  # float32 [R, n, parts]
    old_values: torch.Tensor  # float32 [R, n]
    advantages: torch.Tensor  # float32 [R, n]
    targets: torch.Tensor  # float32 [R, n]; in the units of the values
    policy_weights: torch.Tensor  # float32 [R, n]; 0 drops an agent's step from the policy's loss and the entropy
    value_weights: torch.Tensor  # float32 [R, n]; and from the value's loss
    parts: torch.Tensor  # float32 [n, parts]; 0 where an agent's action has no such part


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """Sums of the weights over the whole minibatch, all micro-batches and ranks: what losses are divided by."""

    policy: float
    value: float


def team_loss(
    rows: Rows, totals: Totals, *, clip: float, clip_value: bool, huber_delta: float, entropy_coef: float, value_coef: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """``L_pi - c_H H + c_V L_V`` of a micro-batch, as its share of the minibatch's mean over the steps of living agents; and its metrics.

    The ratio is taken of each part of an action and the parts' clipped terms are summed (the paper's code; for discrete actions
    there is one part). Losses and metrics of micro-batches and ranks add up to those of the minibatch.
    """
    weight, value_weight = rows.policy_weights / totals.policy, rows.value_weights / totals.value
    each, cut = clipped_surrogate(rows.logprobs, rows.old_logprobs, rows.advantages[..., None], clip_low=clip, clip_high=clip)
    policy = ((each * rows.parts).sum(-1) * weight).sum()
    entropy = (rows.entropy.sum(-1) * weight).sum()
    value = (
        value_loss(rows.values, rows.old_values, rows.targets, clip=clip if clip_value else None, delta=huber_delta) * value_weight
    ).sum()
    loss = policy - entropy_coef * entropy + value_coef * value
    with torch.no_grad():
        log_ratio = rows.logprobs - rows.old_logprobs
        share = rows.parts / rows.parts.sum(-1, keepdim=True) * weight[..., None]
        error = rows.targets - rows.values
        metrics = {
            "loss": loss.detach(),
            "policy_loss": policy.detach(),
            "value_loss": value.detach(),
            "entropy": entropy.detach(),
            "clip_fraction": (cut.float() * share).sum(),
            "approx_kl": ((log_ratio.exp() - 1 - log_ratio) * share).sum(),
            "return_mean": (rows.targets * value_weight).sum(),
            "return_square": (rows.targets**2 * value_weight).sum(),
            "error_mean": (error * value_weight).sum(),
            "error_square": (error**2 * value_weight).sum(),
        }
    return loss, metrics
