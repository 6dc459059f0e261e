"""When does a belief say that the goal is reached? Rules over summaries of beliefs, and a calibrated probability of being right.

Rules that read the belief alone are as confident as the belief is, which may be too much; ``Calibrated`` was fitted to how often
estimates are right.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch

from reasoner_ray.agents.agdc.settings import CalibrationConfig, CessationConfig
from reasoner_ray.errors import ConfigError, DataError
from reasoner_ray.registry import Registry

SMALLEST = 1e-6
"""Spread below which a belief is a point."""


@dataclass(frozen=True, slots=True)
class BeliefSummary:
    """What a rule may read of E beliefs over K parameters. Mean and deviation are enough: the rest has defaults."""

    mean: torch.Tensor  # [E, K]
    deviation: torch.Tensor  # [E, K]; standard deviations
    spread: torch.Tensor = None  # type: ignore[assignment]  # [E]; root of the total variance of what is searched for (of all K)
    mass: torch.Tensor | None = None  # [E]; probability that what is searched for lies within the tolerance of its mean (not known)
    evidence: torch.Tensor = None  # type: ignore[assignment]  # [E, C]; what else tells right from wrong, a count of detections, say (none)

    def __post_init__(self) -> None:
        """Fill in what was left out."""
        if self.spread is None:
            object.__setattr__(self, "spread", torch.linalg.vector_norm(self.deviation, dim=-1))
        if self.evidence is None:
            object.__setattr__(self, "evidence", self.spread.new_zeros(len(self.spread), 0))

    def log_spread(self) -> torch.Tensor:
        """[E]."""
        return self.spread.clamp_min(SMALLEST).log()

    def evidence_vector(self) -> torch.Tensor:
        """What ``Calibrated`` reads, [E, 2 + C]: log(spread), log-odds of the mass (where that is known, else [E, 1 + C]), evidence."""
        odds = [] if self.mass is None else [torch.logit(self.mass.clamp(1e-3, 1 - 1e-3))[:, None]]
        return torch.cat([self.log_spread()[:, None], *odds, self.evidence], dim=-1)


class CessationRule(Protocol):
    """Whether agents take their goals for reached."""

    def wants(self, summary: BeliefSummary) -> torch.Tensor:
        """bool [E]."""
        ...


RULES: Registry[type] = Registry("cessation rule", "agdc.cessation.rule")


@RULES.register("never")
class Never:
    """A fixed horizon."""

    def __init__(self, config: CessationConfig | None = None) -> None:
        pass

    def wants(self, summary: BeliefSummary) -> torch.Tensor:
        """bool [E]."""
        return torch.zeros_like(summary.spread, dtype=torch.bool)


@RULES.register("spread")
class Spread:
    """The root of the position's total variance is below the threshold (published code)."""

    def __init__(self, config: CessationConfig) -> None:
        """Raises ``ConfigError`` for a threshold that can never be met."""
        self._threshold = _single(config, "a spread is never negative")

    def wants(self, summary: BeliefSummary) -> torch.Tensor:
        """bool [E]."""
        return summary.spread < self._threshold


@RULES.register("deviation")
class Deviation:
    """Every parameter's standard deviation is below its threshold: sqrt(diag Cov) < zeta, component by component (the paper)."""

    def __init__(self, config: CessationConfig) -> None:
        """Raises ``ConfigError`` for a threshold that can never be met."""
        given = config.threshold if isinstance(config.threshold, tuple) else (config.threshold,)
        if not given or not all(one > 0 for one in given):  # false for NaN too
            raise ConfigError(
                f"agdc.cessation.threshold: no deviation is below {given}; give numbers above 0, inf for what does not matter"
            )
        self._thresholds = torch.tensor(given)

    def wants(self, summary: BeliefSummary) -> torch.Tensor:
        """bool [E]. Raises ``ConfigError`` where the thresholds do not fit the parameters."""
        thresholds = self._thresholds.to(summary.deviation)
        if len(thresholds) not in (1, summary.deviation.shape[-1]):
            raise ConfigError(
                f"agdc.cessation.threshold: {len(thresholds)} deviations for {summary.deviation.shape[-1]} parameters; give one for "
                "all, or each its own"
            )
        return (summary.deviation < thresholds).all(dim=-1)


@RULES.register("mass")
class Mass:
    """The belief's own probability that the source lies within the tolerance of its mean is at least the threshold."""

    def __init__(self, config: CessationConfig) -> None:
        """Raises ``ConfigError`` for a threshold that can never be met."""
        self._threshold = _probability(config)

    def wants(self, summary: BeliefSummary) -> torch.Tensor:
        """bool [E]. Raises ``ConfigError`` for beliefs that do not say their mass."""
        if summary.mass is None:
            raise ConfigError(
                "agdc.cessation.rule: rule mass reads BeliefSummary.mass, which this belief leaves out; fill it in, or take rule spread"
            )
        return summary.mass >= self._threshold


@RULES.register("calibrated")
class Calibrated:
    """The probability of being right, fitted to simulated episodes whose truth is known, is at least the threshold."""

    def __init__(self, config: CessationConfig) -> None:
        """Raises ``ConfigError`` for a threshold that can never be met or without a fit, ``DataError`` for a broken file."""
        self._threshold = _probability(config)
        if config.calibration is None:
            raise ConfigError(
                "agdc.cessation.calibration: the rule `calibrated` reads a fit; `reasoner eval JOB agdc.calibrate=FILE` writes one"
            )
        self._fit = Calibration.of(config.calibration)

    def wants(self, summary: BeliefSummary) -> torch.Tensor:
        """bool [E]."""
        return self._fit.probability(summary.evidence_vector()) >= self._threshold


@dataclass(frozen=True, slots=True)
class Calibration:
    """Logistic regression of being right on what a belief says: sigmoid(bias + weights . (evidence - centre) / scale)."""

    centre: Sequence[float]
    scale: Sequence[float]
    weights: Sequence[float]
    bias: float

    def probability(self, evidence: torch.Tensor) -> torch.Tensor:
        """Probability [E] that estimates with ``evidence`` [E, C] are right. Raises ``DataError`` where it has other columns."""
        if evidence.shape[-1] != len(self.weights):
            raise DataError(f"a calibration of {len(self.weights)} columns reads {evidence.shape[-1]}; fit it anew for this belief")
        centre, scale, weights = (evidence.new_tensor(v) for v in (self.centre, self.scale, self.weights))
        return torch.sigmoid(self.bias + ((evidence - centre) / scale) @ weights)

    @staticmethod
    def fit(evidence: torch.Tensor, right: torch.Tensor, ridge: float = 1e-3) -> Calibration:
        """Fit to ``evidence`` [n, C] of beliefs and whether each was ``right`` (bool [n]).

        Raises ``DataError`` where all were right, or all wrong: nothing tells them apart then.
        """
        if bool(right.all()) or not bool(right.any()):
            what = "right" if len(right) and bool(right[0]) else "wrong"
            raise DataError(f"{len(right)} beliefs were all {what}: no probability can be fitted to them")
        data, target = evidence.double(), right.double()
        centre, scale = data.mean(0), data.std(0).clamp_min(1e-6)
        standard = (data - centre) / scale
        parameters = torch.zeros(data.shape[1] + 1, dtype=torch.double, requires_grad=True)
        optimizer = torch.optim.LBFGS([parameters], max_iter=200, line_search_fn="strong_wolfe")

        def loss() -> torch.Tensor:
            optimizer.zero_grad()
            logits = parameters[0] + standard @ parameters[1:]
            value = torch.nn.functional.binary_cross_entropy_with_logits(logits, target) + ridge * (parameters[1:] ** 2).sum()
            value.backward()
            return value

        optimizer.step(loss)
        found = parameters.detach().tolist()
        return Calibration(centre.tolist(), scale.tolist(), found[1:], found[0])

    def save(self, file: Path) -> None:
        """Write JSON."""
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(asdict(self), indent=1))

    @staticmethod
    def of(given: str | CalibrationConfig) -> Calibration:
        """From a file's name, or from the numbers. Raises ``DataError``."""
        return Calibration.load(Path(given)) if isinstance(given, str) else Calibration(**given.model_dump())

    @staticmethod
    def load(file: Path) -> Calibration:
        """Read what ``save`` wrote. Raises ``DataError``."""
        try:
            return Calibration(**json.loads(file.read_text()))
        except FileNotFoundError as error:
            raise DataError(
                f"no calibration at {file} (agdc.cessation.calibration); fit one: reasoner eval JOB agdc.policy=dcee agdc.calibrate={file}"
            ) from error
        except (ValueError, TypeError) as error:
            raise DataError(f"{file} holds no calibration: {error}") from error


def with_numbers(config: CessationConfig) -> CessationConfig:
    """``config`` with the numbers of its calibration in the file's place, for processes that cannot read it. Raises ``DataError``."""
    if config.calibration is None:
        return config
    fit = CalibrationConfig.model_validate(asdict(Calibration.of(config.calibration)))
    return config.model_copy(update={"calibration": fit})


def make_rule(config: CessationConfig) -> CessationRule:
    """The rule that ``config`` names. Raises ``ConfigError``."""
    rule: CessationRule = RULES.get(config.rule)(config)
    return rule


def _single(config: CessationConfig, why: str) -> float:
    threshold = config.threshold
    if isinstance(threshold, tuple) or not threshold > 0:  # NaN is not
        raise ConfigError(f"agdc.cessation.threshold: {threshold} can never be met by rule {config.rule} ({why}); give a number above 0")
    if math.isinf(threshold):
        raise ConfigError(f"agdc.cessation.threshold: rule {config.rule} always holds below {threshold}; give a number, or take rule never")
    return threshold


def _probability(config: CessationConfig) -> float:
    threshold = _single(config, "it is a probability")
    if threshold > 1:
        raise ConfigError(f"agdc.cessation.threshold: rule {config.rule} reads a probability, which is never {threshold:g}; give at most 1")
    return threshold
