"""From tokens to actions: one entry an action, on which the token losses become action-level losses."""

from __future__ import annotations

from dataclasses import replace

import torch

from reasoner_ray.losses.inputs import LossInputs, smallest_weights


def to_actions(inputs: LossInputs) -> LossInputs:
    """The same micro-batch with one entry for each action.

    Log-probs and entropies are summed over an action's tokens (log pi(a|o) = sum_j log pi(w^j|o, w^<j); GLAM,
    Carta et al. 2023), so the ratio is that of whole actions; advantage, return and value are those at its first token,
    the state the action was chosen in. An action with a dropped token is dropped. The token denominator becomes the
    action denominator, and a trajectory's length its number of actions.
    """
    _, owner = torch.unique(inputs.action_index, return_inverse=True)
    starts = inputs.action_start.nonzero().squeeze(-1)
    n = len(starts)
    if n != (int(owner.max()) + 1 if len(owner) else 0):
        raise ValueError("a micro-batch holds actions without their first token: trajectories must not be split")
    first = torch.empty(n, dtype=torch.int64, device=owner.device)
    first[owner[starts]] = starts

    def summed(x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(n).index_add(0, owner, x)

    def at_start(x: torch.Tensor) -> torch.Tensor:
        return x[first]

    weights = smallest_weights(inputs.weights, owner)
    _, sequence = torch.unique(inputs.trajectory_index[first], return_inverse=True)
    lengths = weights.new_zeros(n).index_add(0, sequence, weights)[sequence]
    return replace(
        inputs,
        logprobs=summed(inputs.logprobs),
        entropy=None if inputs.entropy is None else summed(inputs.entropy),
        values=None if inputs.values is None else at_start(inputs.values),
        advantages=at_start(inputs.advantages),
        returns=at_start(inputs.returns),
        old_values=None if inputs.old_values is None else at_start(inputs.old_values),
        old_logprobs=summed(inputs.old_logprobs),
        behaviour_logprobs=summed(inputs.behaviour_logprobs),
        ref_logprobs=None if inputs.ref_logprobs is None else summed(inputs.ref_logprobs),
        weights=weights,
        action_index=at_start(inputs.action_index),
        action_start=at_start(inputs.action_start),
        trajectory_index=at_start(inputs.trajectory_index),
        trajectory_lengths=lengths,
        token_denominator=inputs.action_denominator,
    )
