"""What a loss sees and returns, and the denominators that make it independent of how a batch was cut.

A loss divides by counts over the *whole* optimiser step (all ranks, all micro-batches), so the losses and the metrics
of micro-batches simply add up to those of the batch. Trajectories are never split over micro-batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from reasoner_ray.credit import Credit
from reasoner_ray.trajectory import TokenStreams

Average = Literal["token", "sequence", "constant"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Denominators:
    """How much an optimiser step trains on: sum of token weights, actions with weight, trajectories with weight."""

    tokens: float
    actions: float
    sequences: float

    @classmethod
    def of(cls, streams: TokenStreams, weights: torch.Tensor, index: torch.Tensor | None = None) -> Denominators:
        """Those of the tokens ``index`` (int64; all by default) of ``streams``; ``weights`` is float [K]."""
        if index is None:
            index = torch.arange(streams.n_tokens, device=weights.device)
        chosen = weights[index]
        _, action = torch.unique(streams.action_index[index], return_inverse=True)
        trained = torch.unique(streams.trajectory_index[index][chosen > 0])
        return cls(tokens=float(chosen.sum()), actions=float(smallest_weights(chosen, action).sum()), sequences=float(len(trained)))

    @classmethod
    def from_tensor(cls, counts: torch.Tensor) -> Denominators:
        """Back from ``to_tensor``, after the all-reduce."""
        tokens, actions, sequences = counts.tolist()
        return cls(tokens=tokens, actions=actions, sequences=sequences)

    def to_tensor(self) -> torch.Tensor:
        """float64 [3], to be summed over ranks."""
        return torch.tensor([self.tokens, self.actions, self.sequences], dtype=torch.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class LossInputs:
    """The k trainable tokens of one micro-batch, in any order. The first three and the last three carry gradients."""

    logprobs: torch.Tensor  # float32 [k]; log pi of the sampled token
    entropy: torch.Tensor | None  # float32 [k]; of the whole next-token distribution, nats
    values: torch.Tensor | None  # float32 [k]; V(state that predicts the token)
    advantages: torch.Tensor  # float32 [k]
    returns: torch.Tensor  # float32 [k]; value targets
    old_values: torch.Tensor | None  # float32 [k]; V before the update
    old_logprobs: torch.Tensor  # float32 [k]; log pi_old, learner's, before the update
    behaviour_logprobs: torch.Tensor  # float32 [k]; log mu, from the rollout engine; may be NaN where weights is 0
    ref_logprobs: torch.Tensor | None  # float32 [k]; log pi_ref
    weights: torch.Tensor  # float32 [k]; 0 drops a token from every numerator
    action_index: torch.Tensor  # int64 [k]
    action_start: torch.Tensor  # bool [k]; first token of its action
    trajectory_index: torch.Tensor  # int64 [k]
    trajectory_lengths: torch.Tensor  # float32 [k]; sum of the weights of the token's trajectory
    token_denominator: float
    action_denominator: float
    sequence_denominator: float
    q: torch.Tensor | None = None  # float32 [k]; Q of the token; these three with a soft critic
    expected_q: torch.Tensor | None = None  # float32 [k]; E_pi[Q] in the state that predicts the token
    kl: torch.Tensor | None = None  # float32 [k]; KL(pi || rho) of that state's distribution, nats


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOutput:
    """A loss to call ``backward`` on, and its metrics.

    Both are already divided by the denominators of the step: sum them over micro-batches and ranks, then pass the
    metrics through ``summarise``.
    """

    loss: torch.Tensor  # float32 []
    metrics: dict[str, torch.Tensor]  # float32 [], detached


def trainable_weights(streams: TokenStreams) -> torch.Tensor:
    """1 for each token, 0 where the rollout engine gave no finite log-prob: float32 [K]."""
    return torch.isfinite(streams.behaviour_logprobs).float()


def gather_inputs(
    streams: TokenStreams,
    credit: Credit,
    weights: torch.Tensor,
    index: torch.Tensor,
    denominators: Denominators,
    *,
    logprobs: torch.Tensor,
    entropy: torch.Tensor | None,
    values: torch.Tensor | None,
    q: torch.Tensor | None = None,
    expected_q: torch.Tensor | None = None,
    kl: torch.Tensor | None = None,
) -> LossInputs:
    """The tokens ``index`` (int64 [k], ``Batch.stream_index``) of ``streams`` beside a forward pass's outputs [k].

    ``weights`` is float [K] (``trainable_weights``). Everything moves to the device of ``logprobs``. Where the streams
    hold no old log-probs this is the first and only update on them, so pi_old is the current policy, detached.
    """
    index = index.to(streams.rewards.device)
    device = logprobs.device
    lengths = weights.new_zeros(streams.n_trajectories).index_add(0, streams.trajectory_index, weights)
    starts = torch.ones_like(streams.action_end)
    starts[1:] = streams.action_end[:-1]

    def take(x: torch.Tensor) -> torch.Tensor:
        return x[index].to(device)

    def take_optional(x: torch.Tensor | None) -> torch.Tensor | None:
        return None if x is None else take(x)

    return LossInputs(
        logprobs=logprobs,
        entropy=entropy,
        values=values,
        advantages=take(credit.advantages),
        returns=take(credit.returns),
        old_values=take_optional(streams.values),
        old_logprobs=logprobs.detach() if streams.old_logprobs is None else take(streams.old_logprobs),
        behaviour_logprobs=take(streams.behaviour_logprobs),
        ref_logprobs=take_optional(streams.ref_logprobs),
        weights=take(weights),
        action_index=take(streams.action_index),
        action_start=take(starts),
        trajectory_index=take(streams.trajectory_index),
        trajectory_lengths=take(lengths[streams.trajectory_index]),
        token_denominator=denominators.tokens,
        action_denominator=denominators.actions,
        sequence_denominator=denominators.sequences,
        q=q,
        expected_q=expected_q,
        kl=kl,
    )


def average(x: torch.Tensor, inputs: LossInputs, how: Average = "token", constant_length: float = 1.0) -> torch.Tensor:
    """The micro-batch's share of the step's mean of ``x`` ([k]): a scalar.

    ``token``: every token of the step counts alike; ``sequence``: the mean over trajectories of each one's token mean
    (GRPO's original form: tokens of long answers count less); ``constant``: the sum over a trajectory divided by
    ``constant_length`` tokens, averaged over trajectories (Dr. GRPO: no length term).

    Raises ``ValueError`` where the step's denominator is 0 although this micro-batch has tokens.
    """
    if len(x) and min(inputs.token_denominator, inputs.sequence_denominator) <= 0:
        raise ValueError("the optimiser step trains on no token: every weight is 0")
    weighted = x * inputs.weights
    if how == "sequence":
        return (weighted / inputs.trajectory_lengths.clamp(min=1e-9)).sum() / max(inputs.sequence_denominator, 1e-9)
    if how == "constant":
        return weighted.sum() / max(inputs.sequence_denominator * constant_length, 1e-9)
    return weighted.sum() / max(inputs.token_denominator, 1e-9)


def smallest_weights(weights: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
    """Smallest weight [number of owners] of each of ``owner``'s numbers ([k], dense): one dropped token drops its action."""
    n = int(owner.max()) + 1 if len(owner) else 0
    return weights.new_full((n,), torch.inf).scatter_reduce(0, owner, weights, "amin")
