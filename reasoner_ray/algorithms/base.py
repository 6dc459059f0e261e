"""What an algorithm is, the objectives that they share, and the registry."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Generic, Literal, TypeVar

import torch
from pydantic import ValidationError
from pydantic_core import ErrorDetails, PydanticUndefined

from reasoner_ray.algorithms.settings import AlgorithmSettings, CriticSettings, GroupSettings, TokenCriticSettings
from reasoner_ray.credit import Credit, action_returns_to_go, group_advantages, hierarchical_gae, kl_estimate, moments
from reasoner_ray.errors import ConfigError
from reasoner_ray.losses import (
    LossInputs,
    LossOutput,
    average,
    behaviour_weights,
    clipped_surrogate,
    kl_penalty,
    to_actions,
    value_loss,
)
from reasoner_ray.registry import Registry, suggest
from reasoner_ray.trajectory import Bootstrap, TokenStreams

S = TypeVar("S", bound=AlgorithmSettings)
C = TypeVar("C", bound=CriticSettings)
G = TypeVar("G", bound=GroupSettings)
A = TypeVar("A", bound="type[Algorithm[Any]]")


class Algorithm(ABC, Generic[S]):
    """An estimator and a loss. The docstring of a subclass is what ``reasoner algorithm NAME`` prints.

    A subclass gives a ``name`` and ``estimate``; the loss is the clipped one with KL and entropy terms unless it
    overrides ``loss``.
    """

    name: ClassVar[str]
    settings_type: ClassVar[type[AlgorithmSettings]] = AlgorithmSettings
    needs_critic: ClassVar[bool] = False
    needs_soft_critic: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = False
    needs_group: ClassVar[bool] = False
    action_level: ClassVar[bool] = False
    wants_entropy: ClassVar[bool] = True

    @abstractmethod
    def estimate(self, streams: TokenStreams, settings: S) -> Credit:
        """Advantages and returns of each token; ``streams.rewards`` already hold a KL penalty in the reward.

        The streams are those of one rank. Where the algorithm neither normalises nor needs groups and the step is a
        single update, the learner may call this while only some trajectories have values: with a critic, credit one
        trajectory without looking at another.
        """

    def credit(self, streams: TokenStreams, settings: S) -> Credit:
        """``estimate`` after the KL penalty, where that is part of the reward.

        Raises ``ValueError`` where the streams lack log-probs or values that the settings ask for.
        """
        return self.estimate(_with_kl_reward(streams, settings), settings)

    def loss(self, inputs: LossInputs, settings: S) -> LossOutput:
        """Loss and metrics of one micro-batch."""
        return policy_objective(to_actions(inputs) if self.action_level else inputs, settings)

    def moments(self, credit: Credit, streams: TokenStreams, weights: torch.Tensor) -> torch.Tensor:
        """Count, sum and sum of squares of the advantages that count, float64 [3]: add over ranks, then ``mean_std``.

        ``weights`` is float [K]. An action-level advantage, the same on all tokens of an action, counts once.
        """
        mask = weights > 0
        return moments(credit.advantages, mask & streams.action_end if self.action_level else mask)

    def settings(self, raw: Mapping[str, Any]) -> S:
        """Validated settings; raises ``ConfigError`` with the key's path and a suggestion."""
        try:
            return self.settings_type.model_validate(dict(raw))  # type: ignore[return-value]
        except ValidationError as error:
            raise ConfigError("\n".join(self._explain(e) for e in error.errors())) from None

    def discounts(self, settings: S) -> tuple[float, float]:
        """Discount from one token of an action to the next, and of a step of the environment, as ``credit`` applies them.

        Those named ``gamma_token`` and ``gamma_action`` among the settings, 1 without: override it where the estimate has others.
        """
        return float(getattr(settings, "gamma_token", 1.0)), float(getattr(settings, "gamma_action", 1.0))

    def wants_reference(self, settings: S) -> bool:
        """True where the learner must keep the initial model and give ``streams.ref_logprobs``."""
        return self.needs_reference or settings.kl_coef > 0

    def wants_old_logprobs(self, settings: S) -> bool:
        """True where ``credit`` reads ``streams.old_logprobs``, so that a single update cannot do without them."""
        return settings.kl_coef > 0 and settings.kl_in == "reward"

    def wants_bootstrap(self, settings: S) -> Bootstrap:
        """The trajectories whose ``streams.bootstrap`` the credit reads."""
        if not isinstance(settings, CriticSettings):
            return "none"
        return "truncated" if settings.bootstrap_truncated else "unended"

    def target_decay(self, settings: S) -> float:
        """How much of the soft critic's target stays at an optimiser step; the rest becomes its Q network."""
        raise NotImplementedError(f"{self.name} needs a soft critic, so it must say how fast the target moves")

    def _explain(self, error: ErrorDetails) -> str:
        location = ".".join(str(part) for part in error["loc"])
        path = f"algorithm.settings.{location}" if location else "algorithm.settings"
        if error["type"] == "extra_forbidden":
            return f"{path}: unknown setting of {self.name}; {suggest(location, list(self.settings_type.model_fields))}"
        return f"{path}: {error['msg'].removeprefix('Value error, ')} (got {error['input']!r})"


class CriticAlgorithm(Algorithm[C]):
    """Clipped policy loss and value loss; subclasses give the ``estimate``."""

    settings_type: ClassVar[type[AlgorithmSettings]] = CriticSettings
    needs_critic = True

    def loss(self, inputs: LossInputs, settings: C) -> LossOutput:
        return critic_objective(to_actions(inputs) if self.action_level else inputs, settings)


class TokenCriticAlgorithm(CriticAlgorithm[TokenCriticSettings]):
    """Hierarchical GAE over tokens; subclasses differ in their settings."""

    settings_type: ClassVar[type[AlgorithmSettings]] = TokenCriticSettings

    def estimate(self, streams: TokenStreams, settings: TokenCriticSettings) -> Credit:
        return hierarchical_gae(
            streams,
            gamma_token=settings.gamma_token,
            gamma_action=settings.gamma_action,
            lambda_token=settings.lambda_token,
            lambda_action=settings.lambda_action,
            bootstrap_truncated=settings.bootstrap_truncated,
        )


class GroupAlgorithm(Algorithm[G]):
    """Advantage from the other samples of the same prompt; no critic; subclasses choose the baseline."""

    settings_type: ClassVar[type[AlgorithmSettings]] = GroupSettings
    needs_group = True

    def group_credit(self, streams: TokenStreams, settings: G, *, baseline: Literal["mean", "leave_one_out"], scale_by_std: bool) -> Credit:
        """Each token's (return - baseline), of its whole trajectory or from its turn on (``settings.credit``)."""
        if settings.credit == "action":
            returns, turn = action_returns_to_go(streams)
            place: tuple[torch.Tensor, ...] = (streams.trajectory_index, turn)
        else:
            returns, place = streams.returns_per_trajectory(), (streams.trajectory_index,)
        advantages = group_advantages(returns, streams.group_index, baseline=baseline, scale_by_std=scale_by_std)
        return Credit(advantages=advantages[place], returns=returns[place])


def policy_objective(inputs: LossInputs, settings: AlgorithmSettings) -> LossOutput:
    """Clipped surrogate under the behaviour weight, minus entropy bonus, plus KL penalty where it is in the loss."""

    def share(x: torch.Tensor) -> torch.Tensor:
        return average(x, inputs, settings.loss_average, settings.loss_length)

    def shown(x: torch.Tensor) -> torch.Tensor:
        return average(x.detach().float(), inputs)

    surrogate, clipped = clipped_surrogate(
        inputs.logprobs, inputs.old_logprobs, inputs.advantages, clip_low=settings.clip_low, clip_high=settings.clip_high
    )
    metrics = {"clip_fraction": shown(clipped), "approx_kl": shown(kl_estimate(inputs.old_logprobs, inputs.logprobs, "k3"))}
    correction = torch.ones_like(surrogate)
    if settings.behaviour_cap is not None:
        correction = behaviour_weights(inputs.old_logprobs, inputs.behaviour_logprobs, inputs.weights, cap=settings.behaviour_cap)
        metrics |= {"behaviour_weight": shown(correction), "behaviour_capped": shown(correction >= settings.behaviour_cap)}
    policy = share(correction * surrogate)
    metrics["policy_loss"] = policy.detach()
    loss = policy
    if inputs.entropy is not None:
        metrics["entropy"] = shown(inputs.entropy)
    if settings.entropy_coef > 0:
        loss = loss - settings.entropy_coef * share(_required(inputs.entropy, "entropy_coef", "the entropy"))
    if inputs.ref_logprobs is not None:
        metrics["reference_kl"] = shown(kl_estimate(inputs.logprobs, inputs.ref_logprobs, "k3"))
    if settings.kl_coef > 0 and settings.kl_in == "loss":
        reference = _required(inputs.ref_logprobs, "kl_coef", "the reference's log-probs")
        penalty = kl_penalty(inputs.logprobs, inputs.old_logprobs, reference, settings.kl_kind)
        loss = loss + settings.kl_coef * share(correction * penalty)
    return LossOutput(loss=loss, metrics=metrics | {"loss": loss.detach()})


def critic_objective(inputs: LossInputs, settings: CriticSettings) -> LossOutput:
    """``policy_objective`` plus ``value_coef`` times the token mean of the value loss."""
    policy = policy_objective(inputs, settings)
    values = _required(inputs.values, "value_coef", "the critic's values")
    critic = average(value_loss(values, inputs.returns, inputs.old_values, clip=settings.value_clip), inputs)
    error = inputs.returns - values.detach()
    pieces = {"return_mean": inputs.returns, "return_square": inputs.returns**2, "error_mean": error, "error_square": error**2}
    loss = policy.loss + settings.value_coef * critic
    shown = {name: average(x, inputs) for name, x in pieces.items()}
    return LossOutput(loss=loss, metrics=policy.metrics | shown | {"value_loss": critic.detach(), "loss": loss.detach()})


def register_algorithm(algorithm: A) -> A:
    """Class decorator: enter an ``Algorithm`` under its ``name``.

    Only the process that ran it knows the name; a job on a cluster names its own algorithm as ``module:Class``.
    Raises ``ValueError`` where the name is taken.
    """
    _REGISTRY.register(algorithm.name)(algorithm)
    return algorithm


def get_algorithm(name: str) -> Algorithm[Any]:
    """The algorithm called ``name``, or the subclass that ``module:Class`` leads to.

    Raises ``ConfigError`` with a suggestion.
    """
    found = _REGISTRY.get(name)
    if not (inspect.isclass(found) and issubclass(found, Algorithm)):
        raise ConfigError(f"algorithm.name: {name!r} is {found!r}, not a subclass of reasoner_ray.algorithms.Algorithm")
    missing = sorted(found.__abstractmethods__) + ([] if hasattr(found, "name") else ["name"])
    if missing:
        raise ConfigError(f"algorithm.name: {name!r} does not define {', '.join(missing)}")
    return found()


def algorithm_names() -> list[str]:
    """All registered names, sorted."""
    return _REGISTRY.names()


def list_algorithms() -> str:
    """Text of ``reasoner algorithm``: a line on each."""
    about = {name: inspect.getdoc(type(get_algorithm(name))) or "(no description)" for name in algorithm_names()}
    width = max(map(len, about))
    return "\n".join(f"{name:<{width}}  {text.splitlines()[0]}" for name, text in about.items())


def describe_algorithm(name: str) -> str:
    """Text of ``reasoner algorithm NAME``: the docstring, what it needs, every setting and its default."""
    algorithm = get_algorithm(name)
    wanted = {
        "a critic": algorithm.needs_critic,
        "a soft critic (learner.critic=soft_q)": algorithm.needs_soft_critic,
        "a reference model": algorithm.needs_reference,
        "groups": algorithm.needs_group,
    }
    needs = [thing for thing, needed in wanted.items() if needed]
    lines = [algorithm.name, "", inspect.getdoc(type(algorithm)) or "(no description)", ""]
    lines += [f"Needs: {', '.join(needs) or 'nothing beyond the policy'}.", "", "Settings (algorithm.settings.NAME=VALUE):"]
    for key, field in algorithm.settings_type.model_fields.items():
        default = "required" if field.default is PydanticUndefined else "null" if field.default is None else field.default
        lines.append(f"  {key:<22}{default!s:<12}{field.description or ''}".rstrip())
    return "\n".join(lines)


def _with_kl_reward(streams: TokenStreams, settings: AlgorithmSettings) -> TokenStreams:
    """Rewards minus ``kl_coef`` times the estimate at each token, where the penalty is in the reward."""
    if settings.kl_coef == 0 or settings.kl_in == "loss":
        return streams
    if streams.old_logprobs is None or streams.ref_logprobs is None:
        raise ValueError("a KL penalty in the reward needs streams.old_logprobs and streams.ref_logprobs")
    penalty = settings.kl_coef * kl_estimate(streams.old_logprobs, streams.ref_logprobs, settings.kl_kind)
    return replace(streams, rewards=streams.rewards - penalty)


def _required(x: torch.Tensor | None, setting: str, what: str) -> torch.Tensor:
    if x is None:
        raise ValueError(f"{setting} needs {what}, which the learner did not compute")
    return x


_REGISTRY: Registry[type[Algorithm[Any]]] = Registry("algorithm", "algorithm.name")
