"""Scores of steps as rewards of steps. Pure functions on flat tensors: S steps in order, each with its solution's number.

With s_t the score of the state after step t of a solution of T steps, g the algorithm's discount from one step to the next:

    raw         r_t = s_t
    difference  r_t = g s_t - s_{t-1}, g := 1 at T   s_0 = ``initial``; the return is that of s_T, earned at the end, less s_0
    shaping     r_t = g s_t - s_{t-1}, s_T := 0      potential-based shaping (Ng, Harada and Russell 1999, F = g Phi(s') - Phi(s)):
                                                     the return is -s_0, whatever was written, so the best policy stays the best;
                                                     s_T stays where the algorithm goes on with the value of the state behind it
    minimum     r_t = m_t - m_{t-1}                  m_t the lowest score so far, r_1 = s_1; they add up to the lowest score

``raw`` pays a solution for every step it has, and ``difference`` for where it ends; ``minimum`` pays for no step, so length
earns nothing (the argument of PURE, Cheng et al. 2025, arXiv 2504.15275, for credit in min form). With another discount than the
algorithm's own, shaping would pay for taking more steps, or fewer.
"""

from __future__ import annotations

from typing import Literal

import torch

Transform = Literal["raw", "difference", "shaping", "minimum"]


def step_rewards(
    scores: torch.Tensor,
    solution: torch.Tensor,
    transform: Transform,
    *,
    initial: float = 0.0,
    discount: torch.Tensor | None = None,
    inside: torch.Tensor | None = None,
    goes_on: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rewards [S] of steps from their ``scores`` (float [S]); ``solution`` (int64 [S]) is ascending.

    ``discount`` (float [S], 1 by default) is what lies between the last token of each step, where its reward is, and the first of
    the next; ``inside`` (float [S], above 0) what lies between a step's first token and its last: where tokens are discounted, the
    reward comes later than the state it is taken back for, and is the larger for it. ``goes_on`` (bool [S], none by default) are the
    steps of solutions that the algorithm bootstraps at their end.

    Raises ``ValueError`` where the two do not fit or ``solution`` is not ascending.
    """
    first = _first_steps(scores, solution)
    if transform == "raw" or not len(scores):
        return scores.clone()
    if transform == "minimum":
        lowest = _running_minimum(scores, solution)
        return torch.where(first, lowest, lowest - lowest.roll(1))
    later = scores if discount is None else discount * scores
    at_end = scores
    if transform == "shaping":
        at_end = torch.zeros_like(scores) if goes_on is None else torch.where(goes_on, later, 0.0)
    kept = torch.where(first.roll(-1), at_end, later)  # before a first step is a last one
    before = torch.where(first, torch.full_like(scores, initial), scores.roll(1))
    return kept - (before if inside is None else before / inside)


def normalise_groups(rewards: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """``(r - mean) / std`` over all steps of a group's solutions (DeepSeekMath, Shao et al. 2024, arXiv 2402.03300, section 4.1.3).

    ``group`` is int64 [S]. A group whose rewards are all equal says nothing: zeros.
    """
    numbers, group = torch.unique(group, return_inverse=True)
    zeros = rewards.new_zeros(len(numbers), dtype=torch.float64)
    counts = zeros.index_add(0, group, torch.ones_like(rewards, dtype=torch.float64))
    mean = zeros.index_add(0, group, rewards.double()) / counts
    centred = rewards.double() - mean[group]
    std = (zeros.index_add(0, group, centred**2) / counts).sqrt()
    scale = torch.where(std > 1e-8, std, torch.inf)
    return (centred / scale[group]).to(rewards.dtype)


def _first_steps(scores: torch.Tensor, solution: torch.Tensor) -> torch.Tensor:
    """bool [S]: the first step of its solution."""
    if scores.shape != solution.shape or scores.dim() != 1:
        raise ValueError(f"{tuple(scores.shape)} scores and {tuple(solution.shape)} numbers of solutions do not align")
    steps = solution.diff()
    if (steps < 0).any():
        raise ValueError("the numbers of the steps' solutions must be ascending")
    return torch.cat([torch.ones_like(solution[:1], dtype=torch.bool), steps > 0])


def _running_minimum(scores: torch.Tensor, solution: torch.Tensor) -> torch.Tensor:
    """The lowest score of each solution up to each step, [S]."""
    _, counts = torch.unique_consecutive(solution, return_counts=True)
    return torch.cat([part.cummin(0).values for part in scores.split(counts.tolist())])
