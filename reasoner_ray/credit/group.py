"""Baselines from the other samples of the same prompt: GRPO, its unbiased form, RLOO."""

from __future__ import annotations

from typing import Literal

import torch

from reasoner_ray.trajectory import TokenStreams

STD_FLOOR = 1e-6
"""Added to a group's standard deviation, in units of reward: a group whose samples all score alike gets advantage 0."""


def group_advantages(
    returns: torch.Tensor, group_index: torch.Tensor, *, baseline: Literal["mean", "leave_one_out"], scale_by_std: bool
) -> torch.Tensor:
    """Returns minus their group's baseline, float32, of the shape of ``returns`` ([n] or [n, turns]).

    ``mean`` is GRPO's (Shao et al. 2024, sec. 4.1.2), divided by the group's standard deviation (n - 1 in the
    denominator) where ``scale_by_std``; without it the unbiased form of Dr. GRPO (Liu et al. 2025), equal to
    (n - 1)/n of ``leave_one_out``, RLOO's (Ahmadian et al. 2024). The number of terms in a baseline is always the
    group's size, also for turns that some samples never reach: were it the number of samples that got there, it would
    depend on the sample's own choice to stop, which biases the gradient (verl issue 7244).
    A group of one has nothing to compare with: advantage 0.
    """
    samples = returns.double()
    count = torch.bincount(group_index).double()[group_index]
    count = count.reshape(-1, *[1] * (samples.dim() - 1))
    others = (count - 1).clamp(min=1)
    centred = samples - _group_sum(samples, group_index) / count
    if baseline == "leave_one_out":
        centred = centred * count / others
    if scale_by_std:
        centred = centred / ((_group_sum(centred**2, group_index) / others).sqrt() + STD_FLOOR)
    return torch.where(count > 1, centred, 0.0).float()


def action_returns_to_go(streams: TokenStreams) -> tuple[torch.Tensor, torch.Tensor]:
    """Undiscounted return from each action on, float32 [n, turns], and each token's turn within its trajectory, int64 [K].

    A trajectory with fewer actions has 0 in the turns it did not take: nothing was left to earn.
    """
    _, action = torch.unique_consecutive(streams.action_index, return_inverse=True)
    n_actions = int(streams.action_end.sum())
    owner = streams.trajectory_index[streams.action_end]
    per_trajectory = torch.bincount(owner, minlength=streams.n_trajectories)
    first = per_trajectory.cumsum(0) - per_trajectory
    turn = torch.arange(n_actions, device=owner.device) - first[owner]
    rewards = streams.rewards.new_zeros(streams.n_trajectories, int(per_trajectory.max()) if n_actions else 0)
    rewards.index_put_((streams.trajectory_index, turn[action]), streams.rewards, accumulate=True)
    return rewards.flip(-1).cumsum(-1).flip(-1), turn[action]


def _group_sum(x: torch.Tensor, group_index: torch.Tensor) -> torch.Tensor:
    """Sum of ``x`` over each sample's group, of the shape of ``x``."""
    n_groups = int(group_index.max()) + 1 if len(group_index) else 0
    return x.new_zeros(n_groups, *x.shape[1:]).index_add(0, group_index, x)[group_index]
