"""The settings algorithms share; each algorithm's own class sets the defaults that are vetted for it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from reasoner_ray.credit import KlKind
from reasoner_ray.losses.inputs import Average


class AlgorithmSettings(BaseModel):
    """Settings of the policy loss, which every algorithm has."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    clip_low: float = Field(0.2, gt=0, le=1, description="the ratio pi/pi_old is clipped at 1 - clip_low")
    clip_high: float = Field(0.2, gt=0, description="and at 1 + clip_high")
    behaviour_cap: float | None = Field(
        2.0, gt=0, description="cap of the weight pi_old/mu that corrects stale or differently rounded rollouts; null: no weight"
    )
    entropy_coef: float = Field(0.0, ge=0, description="bonus on the entropy of the next-token distribution, nats")
    kl_coef: float = Field(0.0, ge=0, description="penalty on KL(pi || reference); above 0 the learner keeps a reference model")
    kl_in: Literal["loss", "reward"] = Field("loss", description="where the KL penalty enters")
    kl_estimator: Literal["auto", "k1", "k2", "k3"] = Field(
        "auto", description="auto: k3 in the loss, k1 in the reward; both give the gradient of the KL, k2 and k3 in the reward do not"
    )
    normalize_advantages: bool = Field(False, description="whiten advantages over all tokens of the training step")
    loss_average: Average = Field(
        "token", description="token: every token alike; sequence: every trajectory alike; constant: sum over a trajectory / loss_length"
    )
    loss_length: float = Field(256.0, gt=0, description="tokens; the divisor of loss_average=constant")

    @property
    def kl_kind(self) -> KlKind:
        """The estimator that ``kl_estimator`` stands for."""
        if self.kl_estimator != "auto":
            return self.kl_estimator
        return "k3" if self.kl_in == "loss" else "k1"


class CriticSettings(AlgorithmSettings):
    """Settings of algorithms with a critic and GAE between actions."""

    gamma_action: float = Field(0.99, ge=0, le=1, description="discount from one action to the next")
    lambda_action: float = Field(0.95, ge=0, le=1, description="GAE lambda from one action to the next")
    bootstrap_truncated: bool = Field(
        False,
        description="continue what a limit cut with the critic's value; false: only episodes that nothing but rollout.max_turns ended",
    )
    value_coef: float = Field(0.5, ge=0, description="weight of the value loss")
    value_clip: float | None = Field(None, gt=0, description="trust region of the value, in units of reward; null: none")
    normalize_advantages: bool = Field(True, description="whiten advantages over all tokens (or actions) of the training step")


class TokenCriticSettings(CriticSettings):
    """Settings of algorithms with a critic for each token: hierarchical GAE inside and between actions."""

    gamma_token: float = Field(1.0, ge=0, le=1, description="discount between tokens of one action")
    lambda_token: float = Field(1.0, ge=0, le=1, description="GAE lambda between tokens of one action")


class GroupSettings(AlgorithmSettings):
    """Settings of algorithms that compare the samples of a group."""

    clip_high: float = Field(0.28, gt=0, description="and at 1 + clip_high; wider than clip_low, so that rare tokens can grow (DAPO)")
    credit: Literal["trajectory", "action"] = Field(
        "trajectory", description="trajectory: all tokens share the whole return; action: each turn gets the return from it on"
    )
