"""When to stop sampling: the belief over answers, its entropy, and a threshold that is calibrated. Pure functions.

The language form of autonomous goal detection and cessation: the solutions sampled so far are observations of an unknown goal
(the answer), a Dirichlet posterior is the belief over it, and sampling ceases once the belief's spread is below a threshold. For
a belief over words the spread is the entropy.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reasoner_ray.errors import DataError
from reasoner_ray.search.settings import StoppingConfig

if TYPE_CHECKING:
    from collections.abc import Iterable

LEVELS = 256
"""Thresholds that a calibration tries at most."""


def belief(counts: Iterable[float], unseen: float = 1.0) -> list[float]:
    """Posterior mean over the answers seen and, as the last entry, all others together.

    ``counts`` are samples an answer (or their weights); ``unseen`` is the prior's weight, in samples: p_k = c_k / (n + unseen).
    """
    seen = [count for count in counts if count > 0]
    total = sum(seen) + unseen
    return [*(count / total for count in seen), unseen / total]


def entropy(probabilities: Sequence[float]) -> float:
    """-sum p ln p, nats."""
    return -sum(p * math.log(p) for p in probabilities if p > 0)


def is_settled(groups: Sequence[int], settings: StoppingConfig) -> bool:
    """Whether the belief after these answers (numbers that say which are the same) is settled.

    Never turned off by agreement: one more sample for the leading answer, or one taken from another for it, cannot raise the entropy.
    """
    if len(groups) < settings.least:
        return False
    return entropy(belief(Counter(groups).values(), settings.unseen)) <= settings.threshold


def samples_needed(groups: Sequence[int], settings: StoppingConfig, wave: int = 1) -> int:
    """How many of these samples, taken ``wave`` at a time, come before the belief is settled; all of them where it never is."""
    looks = (n for n in range(wave, len(groups), wave) if is_settled(groups[:n], settings))
    return next(looks, len(groups))


@dataclass(frozen=True, slots=True)
class Sampled:
    """All samples of one question of a run with fixed N, in the order they came."""

    groups: tuple[int, ...]  # [N]; which answers are the same
    correct: tuple[bool, ...]  # [N]
    tokens: tuple[int, ...]  # [N]


@dataclass(frozen=True, slots=True)
class Calibration:
    """What a threshold would have done on recorded samples."""

    threshold: float
    accuracy: float  # of the majority among the samples taken
    fixed_accuracy: float  # of the majority among all
    tokens_saved: float  # share of the tokens, in [0, 1]


class Replay:
    """Recorded samples, stopped by any threshold. Raises ``DataError`` where there are none."""

    def __init__(self, recorded: Sequence[Sampled], settings: StoppingConfig, wave: int = 1) -> None:
        if not recorded:
            raise DataError("no recorded samples to calibrate the stopping threshold with; record a run of self_consistency first")
        self._recorded = recorded
        self._looks = [self._spreads(sampled, settings, wave) for sampled in recorded]

    @staticmethod
    def _spreads(sampled: Sampled, settings: StoppingConfig, wave: int) -> list[tuple[int, float]]:
        """Each number of samples at which the belief is looked at, and its entropy then."""
        first = -(-settings.least // wave) * wave
        numbers = range(first, len(sampled.groups), wave)
        return [(n, entropy(belief(Counter(sampled.groups[:n]).values(), settings.unseen))) for n in numbers]

    @property
    def levels(self) -> list[float]:
        """The entropies that occur, at which decisions change, and 0, at which nothing stops; ascending, thinned out to ``LEVELS``."""
        found = sorted({0.0, *(spread for looks in self._looks for _, spread in looks)})
        return found[:: -(-len(found) // LEVELS)]

    def taken(self, threshold: float) -> list[int]:
        """Samples taken of each question."""
        return [
            next((n for n, spread in looks if spread <= threshold), len(sampled.groups))
            for sampled, looks in zip(self._recorded, self._looks, strict=True)
        ]

    def questions(self, threshold: float) -> list[tuple[bool, bool, int, int]]:
        """Of each question: right when stopped, right with all samples, tokens until then, tokens of all."""
        return [
            (_majority_is_right(s, n), _majority_is_right(s, len(s.groups)), sum(s.tokens[:n]), sum(s.tokens))
            for s, n in zip(self._recorded, self.taken(threshold), strict=True)
        ]

    def run(self, threshold: float) -> Calibration:
        """What the threshold would have come to."""
        stopped, fixed, used, total = (sum(values) for values in zip(*self.questions(threshold), strict=True))
        return Calibration(threshold, stopped / len(self._recorded), fixed / len(self._recorded), 1 - used / total)


def calibrate(recorded: Sequence[Sampled], settings: StoppingConfig, *, tolerance: float = 0.01, wave: int = 1) -> Calibration:
    """The threshold that saves most tokens on recorded samples and costs at most ``tolerance`` of accuracy against all samples.

    There always is one: a threshold of 0 stops nowhere. Calibrate on training questions, report on held-out ones.
    """
    replay = Replay(recorded, settings, wave)
    tried = [replay.run(level) for level in replay.levels]
    fit = [c for c in tried if c.accuracy >= c.fixed_accuracy - tolerance]
    return max(fit, key=lambda c: (c.tokens_saved, -c.threshold))


def _majority_is_right(sampled: Sampled, n: int) -> bool:
    (group, _), *_ = Counter(sampled.groups[:n]).most_common(1)  # of equal ones the first
    return sampled.correct[sampled.groups.index(group)]
