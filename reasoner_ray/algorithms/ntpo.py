"""Naive token-level PPO."""

from __future__ import annotations

from pydantic import Field, model_validator

from reasoner_ray.algorithms.base import TokenCriticAlgorithm, register_algorithm
from reasoner_ray.algorithms.settings import TokenCriticSettings


class NtpoSettings(TokenCriticSettings):
    """One discount and one lambda for all steps; change both of a pair together."""

    gamma_token: float = Field(0.99, ge=0, le=1, description="discount between tokens; equal to gamma_action")
    gamma_action: float = Field(0.99, ge=0, le=1, description="discount from one action to the next; equal to gamma_token")
    lambda_token: float = Field(0.95, ge=0, le=1, description="GAE lambda between tokens; equal to lambda_action")
    lambda_action: float = Field(0.95, ge=0, le=1, description="GAE lambda from one action to the next; equal to lambda_token")

    @model_validator(mode="after")
    def _one_clock(self) -> NtpoSettings:
        if self.gamma_token != self.gamma_action or self.lambda_token != self.lambda_action:
            raise ValueError("ntpo treats all tokens alike: set gamma_token = gamma_action and lambda_token = lambda_action, or take poad")
        return self


@register_algorithm
class Ntpo(TokenCriticAlgorithm):
    """Naive token-level PPO (the NTPO baseline of Wen et al. 2024, arXiv 2405.15821; common in RLHF).

    Estimator: classic GAE in which every token is one step of the decision process,

        delta_j = r_j + gamma V_{j+1} - V_j                 A_j = delta_j + gamma lambda A_{j+1}

    with the same gamma and lambda inside an action and between actions.

    When: as the baseline for poad, or with gamma = lambda = 1, where it is the Monte-Carlo return minus the value.

    How it fails: time passes with every token, so it solves another problem than the one posed: the same action said in
    more tokens is worth gamma^(n-1) of it. Long answers lose their credit: at gamma = 0.99, lambda = 0.95 the first of 128
    tokens sees 0.0004 of the outcome, and short answers are preferred whether right or wrong.
    """

    name = "ntpo"
    settings_type = NtpoSettings
