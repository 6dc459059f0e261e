"""ETPO."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field

from reasoner_ray.algorithms.base import Algorithm, register_algorithm
from reasoner_ray.algorithms.settings import AlgorithmSettings
from reasoner_ray.credit import Credit, hierarchical_gae, kl_estimate
from reasoner_ray.losses import LossInputs, LossOutput, average, soft_policy_loss, soft_q_loss
from reasoner_ray.trajectory import TokenStreams


class EtpoSettings(AlgorithmSettings):
    """Settings of soft Q learning. What belongs to a ratio, an advantage or a sampled KL is no setting here."""

    clip_low: ClassVar[float] = 0.2  # type: ignore[misc]
    clip_high: ClassVar[float] = 0.2  # type: ignore[misc]
    behaviour_cap: ClassVar[None] = None  # type: ignore[misc]
    entropy_coef: ClassVar[float] = 0.0  # type: ignore[misc]
    kl_coef: ClassVar[float] = 0.0  # type: ignore[misc]
    kl_in: ClassVar[Literal["loss"]] = "loss"  # type: ignore[misc]
    kl_estimator: ClassVar[Literal["auto"]] = "auto"  # type: ignore[misc]
    normalize_advantages: ClassVar[bool] = False  # type: ignore[misc]

    beta: float = Field(0.01, gt=0, description="weight of KL(pi || reference) at each token, in units of reward a nat")
    gamma_action: float = Field(0.99, ge=0, le=1, description="discount from one action to the next; inside one there is none")
    huber_delta: float = Field(10.0, gt=0, description="error of Q, in units of reward, from which on its loss is linear")
    lambda_token: float = Field(0.0, ge=0, le=1, description="inside an action: 0 takes the target from the next token, 1 from its end")
    lambda_action: float = Field(0.0, ge=0, le=1, description="from one action to the next: 0 looks one action ahead, 1 to the outcome")
    target_decay: float = Field(0.995, ge=0, lt=1, description="share of the target network that an optimiser step keeps")


@register_algorithm
class Etpo(Algorithm[EtpoSettings]):
    """Entropy-regularised token-level policy optimisation (Wen et al. 2024, arXiv 2402.06700): soft Q learning of tokens.

    Estimator: the goal is the discounted reward less beta KL(pi || rho) at each step, with rho the initial model. For the
    state x_j before token w_j of an action of n tokens, the target network Q' and ' for the next action elsewhere,

        V(x) = sum_w pi(w|x) Q'(x, w) - beta KL(pi(.|x) || rho(.|x))
        j < n:  y_j = V(x_{j+1})                            critic: mean of huber(y_j - Q(x_j, w_j))
        j = n:  y_n = R + gamma_action V(x'_1)              policy: mean of beta KL(pi || rho) - sum_w pi(w|x_j) Q(x_j, w)

    whose fixed point is pi = rho exp(Q / beta) / Z. No reward or discount falls between the tokens of an action: the KL of
    an action is the sum of the expected KLs of its tokens, so token by token this is soft Q learning of whole actions. The
    sums are exact: over the vocabulary, or over what a list of actions allows next. Q' moves towards Q after each update.

    When: a reward worth a trade against staying near the initial model, actions of few tokens, above all those chosen from
    a list; trajectories of older policies, since no probability ratio enters.

    How it fails: it trains on sampled tokens alone, yet the policy climbs Q on all: what Q says of tokens nobody tried is
    generalisation, and a small beta believes it. The targets look one token ahead and Q' lags by 1 / (1 - target_decay)
    updates, so an outcome reaches the first of many tokens late: in a run of few updates lower target_decay and raise
    lambda_token and lambda_action, which bring it there at once, for on-policy trajectories.
    beta has the unit of the reward: at 0.01 a reward of 1 outweighs 100 nats. In bfloat16 Q is rough by 0.05 to 0.1 (on
    135M parameters), ten times that beta: take model.dtype=float32. It holds four models, two of them trained;
    learner.critic=soft_q_frozen holds the policy, the initial model and two LM heads, and works with learner.lora. A wrong
    Q misleads the policy (an advantage's error would be noise), so the critic must be ahead of it: if success falls while
    value_loss stays at return's variance, lower learner.lr, or take more learner.updates_per_step.

    Deviations: Q(x, w) is the Q network's logit less the reference's, so Q and KL start at 0, where pi = rho is the best
    policy; the paper starts Q at the model's logits, whose spread of tens of nats over beta asks for a nearly certain
    policy before any reward. The public code's actor takes an unweighted mean over the vocabulary, which no Q can move, and
    its inner targets the KL of the next action's token; here both follow the paper. Policy and critic step together, by
    AdamW at two learning rates. lambda_token and lambda_action above 0 (the paper's value) mix what followed into the
    targets as Peng's Q(lambda) does: y = r + gamma ((1 - lambda) V(x') + lambda (y' - beta KL(x'))), with y' that of the
    token taken in x'. An episode that its environment's own limit cut ends with what it earned. One that only a limit of ours
    cut goes on: the state behind the cut, whose actions nobody listed, is taken to be worth what the one before its last action is.
    """

    name = "etpo"
    settings_type = EtpoSettings
    needs_soft_critic = True

    def estimate(self, streams: TokenStreams, settings: EtpoSettings) -> Credit:
        if streams.target_q is None or streams.kl is None:
            raise ValueError("etpo needs streams.target_q and streams.kl, which a soft critic gives")
        toll = settings.beta * streams.kl  # V(x) pays for the choice made in x, Q(x, w) only for those after it
        values = streams.target_q - toll
        credit = hierarchical_gae(
            replace(streams, values=values, rewards=streams.rewards - toll, bootstrap=_last_known(streams, values)),
            gamma_token=1.0,
            gamma_action=settings.gamma_action,
            lambda_token=settings.lambda_token,
            lambda_action=settings.lambda_action,
            bootstrap_truncated=False,
        )
        return replace(credit, returns=credit.returns + toll)

    def loss(self, inputs: LossInputs, settings: EtpoSettings) -> LossOutput:
        if inputs.q is None or inputs.expected_q is None or inputs.kl is None:
            raise ValueError("etpo needs q, expected_q and kl, which a soft critic gives")
        improvement = soft_policy_loss(inputs.expected_q, inputs.kl, beta=settings.beta)
        policy = average(improvement, inputs, settings.loss_average, settings.loss_length)
        critic = average(soft_q_loss(inputs.q, inputs.returns, delta=settings.huber_delta), inputs)
        error = inputs.returns - inputs.q
        shown = {
            "reference_kl": inputs.kl,
            "q": inputs.q,
            "expected_q": inputs.expected_q,
            "approx_kl": kl_estimate(inputs.old_logprobs, inputs.logprobs, "k3"),
            "return_mean": inputs.returns,
            "return_square": inputs.returns**2,
            "error_mean": error,
            "error_square": error**2,
        }
        if inputs.entropy is not None:
            shown["entropy"] = inputs.entropy
        metrics = {name: average(x.detach(), inputs) for name, x in shown.items()}
        loss = policy + critic
        return LossOutput(
            loss=loss, metrics=metrics | {"policy_loss": policy.detach(), "value_loss": critic.detach(), "loss": loss.detach()}
        )

    def target_decay(self, settings: EtpoSettings) -> float:
        return settings.target_decay


def _last_known(streams: TokenStreams, values: torch.Tensor) -> torch.Tensor:
    """The value of the state before each trajectory's last action, float32 [n], from those of all tokens [K]."""
    starts = torch.cat([streams.action_end.new_ones(min(1, streams.n_tokens)), streams.action_end[:-1]])
    place = torch.where(starts, torch.arange(streams.n_tokens, device=values.device), 0).cummax(0).values
    ends = streams.trajectory_end.nonzero()[:, 0]
    found = values.new_zeros(streams.n_trajectories)
    found[streams.trajectory_index[ends]] = values[place[ends]]
    return found
