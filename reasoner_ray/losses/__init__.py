"""Losses as pure functions over the trainable tokens of a micro-batch (torch only)."""

from reasoner_ray.losses.actions import to_actions
from reasoner_ray.losses.inputs import Denominators, LossInputs, LossOutput, average, gather_inputs, trainable_weights
from reasoner_ray.losses.policy import behaviour_weights, clipped_surrogate
from reasoner_ray.losses.regularisers import kl_penalty
from reasoner_ray.losses.soft import soft_policy_loss, soft_q_loss
from reasoner_ray.losses.summary import summarise
from reasoner_ray.losses.value import value_loss

__all__ = [
    "Denominators",
    "LossInputs",
    "LossOutput",
    "average",
    "behaviour_weights",
    "clipped_surrogate",
    "gather_inputs",
    "kl_penalty",
    "soft_policy_loss",
    "soft_q_loss",
    "summarise",
    "to_actions",
    "trainable_weights",
    "value_loss",
]
