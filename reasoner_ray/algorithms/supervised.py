"""Supervised objectives, for the learner the same as an algorithm: what a token is to become lies in its reward.

A job picks one by its ``kind``; ``algorithm.name`` belongs to kind ``rl``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from reasoner_ray.algorithms.base import Algorithm, get_algorithm
from reasoner_ray.algorithms.settings import AlgorithmSettings
from reasoner_ray.credit import Credit
from reasoner_ray.losses import LossInputs, LossOutput, average
from reasoner_ray.trajectory import TokenStreams

if TYPE_CHECKING:
    from reasoner_ray.config import JobConfig


class Supervised(Algorithm[AlgorithmSettings]):
    """An objective without credit: the rewards are the targets."""

    wants_entropy = False

    def estimate(self, streams: TokenStreams, settings: AlgorithmSettings) -> Credit:
        """The targets, as they are."""
        return Credit(advantages=streams.rewards, returns=streams.rewards)


class Imitation(Supervised):
    """Supervised fine-tuning: cross-entropy of the answer's tokens, mean over the tokens of the step."""

    name = "sft"

    def loss(self, inputs: LossInputs, settings: AlgorithmSettings) -> LossOutput:
        """``-log pi`` of each token, nats."""
        loss = average(-inputs.logprobs, inputs)
        return LossOutput(loss=loss, metrics={"loss": loss.detach()})


class StepLabels(Supervised):
    """A process reward model: binary cross-entropy of a step's label, 0, 1 or between, mean over the steps of the update.

    The logit is read at the step's last token (Lightman et al. 2023, arXiv 2305.20050, section 2; soft labels: Wang et al.
    2024, arXiv 2312.08935, equation 4). One logit l is the two-logit head with l = l(+) - l(-).
    """

    name = "prm"
    needs_critic = True

    def loss(self, inputs: LossInputs, settings: AlgorithmSettings) -> LossOutput:
        """``-y log s - (1 - y) log(1 - s)`` with s the sigmoid of the value."""
        logits = _values(inputs)
        loss = average(F.binary_cross_entropy_with_logits(logits, inputs.returns, reduction="none"), inputs)
        right = ((logits.detach() > 0) == (inputs.returns > 0.5)).float()
        return LossOutput(loss=loss, metrics={"loss": loss.detach(), "step_accuracy": average(right, inputs)})


class Verdicts(Supervised):
    """A generative judge: cross-entropy of its verdict on a step, mean over the steps of the update.

    The label p weighs the two tokens it may say (Zhang et al. 2024, arXiv 2408.15240, which has p of 0 or 1).
    """

    name = "judge"

    def loss(self, inputs: LossInputs, settings: AlgorithmSettings) -> LossOutput:
        """``-p log pi(yes) - (1 - p) log pi(no)``, nats; twice the mean over tokens, as a step has two."""
        loss = average(-2 * inputs.returns * inputs.logprobs, inputs)
        return LossOutput(loss=loss, metrics={"loss": loss.detach()})


class StateValues(Supervised):
    """A value model: mean of ``(z - v)^2`` over the ends of the question, of each step and of the answer.

    z is the discounted reward at the end (Feng et al. 2023, arXiv 2309.17179, section 3.2): the value of a state, and at
    the answer's end an outcome reward model.
    """

    name = "value"
    needs_critic = True

    def loss(self, inputs: LossInputs, settings: AlgorithmSettings) -> LossOutput:
        """``(z - v)^2``, in squared units of reward."""
        error = inputs.returns - _values(inputs)
        loss = average(error**2, inputs)
        return LossOutput(loss=loss, metrics={"loss": loss.detach(), "value_error": average(error.detach().abs(), inputs)})


SUPERVISED: dict[str, type[Supervised]] = {objective.name: objective for objective in (Imitation, StepLabels, Verdicts, StateValues)}


def objective_of(config: JobConfig) -> tuple[Algorithm[Any], AlgorithmSettings]:
    """What the learner optimises under ``config``, and its settings. Raises ``ConfigError``."""
    if config.kind == "rl":
        algorithm = get_algorithm(config.algorithm.name)
        return algorithm, algorithm.settings(config.algorithm.settings)
    objective = SUPERVISED["judge" if config.supervised.head == "judge" else config.kind]()
    return objective, objective.settings({})


def _values(inputs: LossInputs) -> torch.Tensor:
    if inputs.values is None:
        raise ValueError("the learner computed no values: learner.critic must name a head")
    return inputs.values
