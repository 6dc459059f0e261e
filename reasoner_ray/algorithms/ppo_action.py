"""Action-level PPO."""

from __future__ import annotations

from dataclasses import replace

import torch
from pydantic import Field

from reasoner_ray.algorithms.base import CriticAlgorithm, register_algorithm
from reasoner_ray.algorithms.settings import CriticSettings
from reasoner_ray.credit import Credit, action_streams, hierarchical_gae
from reasoner_ray.losses.inputs import Average
from reasoner_ray.trajectory import TokenStreams


class PpoActionSettings(CriticSettings):
    """Settings at the level of actions: there is no discount or lambda between the tokens of one."""

    loss_average: Average = Field("token", description="token: every action alike; sequence: every trajectory alike; constant: as in poad")
    loss_length: float = Field(1.0, gt=0, description="actions; the divisor of loss_average=constant")


@register_algorithm
class PpoAction(CriticAlgorithm[PpoActionSettings]):
    """Action-level PPO (GLAM, Carta et al. 2023, arXiv 2302.02662; TWOSOME, Tan et al. 2024, arXiv 2401.14151).

    Estimator: a whole action is one step, with the value at its first token, log pi(a|o) = sum_j log pi(w^j|o, w^<j) and

        delta_t = R_t + gamma_action V(o_{t+1}) - V(o_t)    A_t = delta_t + gamma_action lambda_action A_{t+1}

    The ratio, its clipping, the behaviour weight, the KL and the entropy (summed over the tokens, by the chain rule) are
    those of the action; means run over actions.

    When: short actions (about ten tokens or fewer), or as the baseline that poad is compared with. TWOSOME also divides
    log pi(a|o) by the number of words or tokens and renormalises over a list of admissible actions; for free text there
    is no such list, so this entry is GLAM's unnormalised form.

    How it fails: the variance of the ratio grows with the length of an action; on answers of hundreds of tokens nearly
    every ratio leaves the clipping range (clip_fraction near 1) and small numeric differences between rollout and learner
    add up (behaviour_capped). One advantage for all tokens of an action says nothing about which of them mattered.
    """

    name = "ppo_action"
    settings_type = PpoActionSettings
    action_level = True

    def estimate(self, streams: TokenStreams, settings: PpoActionSettings) -> Credit:
        per_action = hierarchical_gae(
            action_streams(streams),
            gamma_token=1.0,
            gamma_action=settings.gamma_action,
            lambda_token=1.0,
            lambda_action=settings.lambda_action,
            bootstrap_truncated=settings.bootstrap_truncated,
        )
        _, action = torch.unique_consecutive(streams.action_index, return_inverse=True)
        return replace(per_action, advantages=per_action.advantages[action], returns=per_action.returns[action])
