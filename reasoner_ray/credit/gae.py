"""Hierarchical generalised advantage estimation: one kernel for every critic-based algorithm.

With V_k the value of the state that predicts token k, over the trainable tokens of one trajectory in order:

    delta_k = r_k + gamma_k V_{k+1} - V_k          A_k = delta_k + gamma_k lambda_k A_{k+1}

where (gamma_k, lambda_k) is (gamma_action, lambda_action) on the last token of an action and
(gamma_token, lambda_token) inside one. Settings of it: POAD's BAD backup (1, g, l, l), naive token-level PPO
(g, g, l, l), turn-level (1, g, 1, l); an action of one token is classic GAE (Schulman et al. 2016, eq. 16).
Where an action took d steps of the environment, gamma_k at its end is gamma_action^d: the discount of the semi-Markov
process (Sutton, Precup and Singh 1999, eq. 11; TWOSOME in Overcooked), so that what is trained is the return that is
reported. POAD's public code discounts each macro action once, whose optimum is another policy.
Environment tokens are not in the stream, so credit crosses them without decay.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from reasoner_ray.trajectory import TokenStreams


@dataclass(frozen=True, slots=True, kw_only=True)
class Credit:
    """What an estimator says about each trainable token."""

    advantages: torch.Tensor  # float32 [K]
    returns: torch.Tensor  # float32 [K]; the critic's regression target (a group algorithm's plain return)


def hierarchical_gae(
    streams: TokenStreams,
    *,
    gamma_token: float,
    gamma_action: float,
    lambda_token: float,
    lambda_action: float,
    bootstrap_truncated: bool,
) -> Credit:
    """Advantages and value targets ``A + V`` of each token, both float32 [K].

    With ``bootstrap_truncated`` a trajectory that a limit cut continues with ``streams.bootstrap`` (discounted by
    gamma_action), else only one that nothing but a limit of ours ended (``streams.unended``), where there are bootstrap values.
    Computed in float64, as a scan of log2(longest trajectory) steps.

    Raises ``ValueError`` where the streams carry no values, or no bootstrap values that are needed.
    """
    if streams.values is None:
        raise ValueError("hierarchical GAE needs streams.values: the learner has no critic")
    values = streams.values.double()
    between = torch.full_like(values, gamma_action)
    if streams.durations is not None:
        between = between ** streams.durations.double()
    gamma = torch.where(streams.action_end, between, gamma_token)
    lambda_ = torch.where(streams.action_end, lambda_action, lambda_token).double()
    next_values = torch.cat([values[1:], values.new_zeros(min(1, len(values)))])
    next_values = torch.where(streams.trajectory_end, _values_after_end(streams, bootstrap_truncated), next_values)
    deltas = streams.rewards.double() + gamma * next_values - values
    carry = torch.where(streams.trajectory_end, 0.0, gamma * lambda_)
    longest = int(torch.bincount(streams.trajectory_index).max()) if streams.n_tokens else 0
    advantages = _backward_scan(deltas, carry, longest)
    return Credit(advantages=advantages.float(), returns=(advantages + values).float())


def action_streams(streams: TokenStreams) -> TokenStreams:
    """One entry an action instead of one a token: its rewards summed, the value before its first token.

    This is the semi-Markov view of GLAM and TWOSOME, where a whole action is one step.
    """
    _, action = torch.unique_consecutive(streams.action_index, return_inverse=True)
    last = streams.action_end
    first = torch.cat([last.new_ones(min(1, len(last))), last[:-1]])

    def summed(x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(int(last.sum())).index_add(0, action, x)

    return replace(
        streams,
        rewards=summed(streams.rewards),
        behaviour_logprobs=summed(streams.behaviour_logprobs),
        trajectory_index=streams.trajectory_index[last],
        action_index=streams.action_index[last],
        action_end=last[last],
        durations=None if streams.durations is None else streams.durations[last],
        trajectory_end=streams.trajectory_end[last],
        values=None if streams.values is None else streams.values[first],
        old_logprobs=None if streams.old_logprobs is None else summed(streams.old_logprobs),
        ref_logprobs=None if streams.ref_logprobs is None else summed(streams.ref_logprobs),
    )


def _values_after_end(streams: TokenStreams, bootstrap_truncated: bool) -> torch.Tensor:
    """V(state after the last token) of each token's trajectory, float64 [K]; 0 where that state is terminal."""
    goes_on = streams.truncated if bootstrap_truncated else streams.unended
    if goes_on is None or not bool(goes_on.any()) or (streams.bootstrap is None and not bootstrap_truncated):
        return torch.zeros(streams.n_tokens, dtype=torch.float64, device=streams.rewards.device)
    if streams.bootstrap is None:
        raise ValueError("bootstrap_truncated needs streams.bootstrap")
    return torch.where(goes_on, streams.bootstrap.double(), 0.0)[streams.trajectory_index]


def _backward_scan(deltas: torch.Tensor, carry: torch.Tensor, longest: int) -> torch.Tensor:
    """Solve ``A_k = deltas_k + carry_k A_{k+1}`` by doubling: after step s, A_k covers 2^s tokens.

    ``carry`` is 0 at each trajectory's end, so ``longest`` bounds how far anything travels, and a trajectory's
    result is the same bits whatever lies beside it.
    """
    span = 1
    while span < longest:
        deltas = torch.cat([deltas[:-span] + carry[:-span] * deltas[span:], deltas[-span:]])
        carry = torch.cat([carry[:-span] * carry[span:], carry.new_zeros(span)])
        span *= 2
    return deltas
