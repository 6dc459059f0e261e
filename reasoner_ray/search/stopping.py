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
from itertools import takewhile
from typing import TYPE_CHECKING

from reasoner_ray.errors import DataError
from reasoner_ray.search.aggregate import choose_answer
from reasoner_ray.search.settings import AnswersBy, StoppingConfig

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

    groups: tuple[int | None, ...]  # [N]; which answers are the same; None: a limit cut the sample, so it is no solution
    correct: tuple[bool, ...]  # [N]
    tokens: tuple[int, ...]  # [N]
    answered: tuple[bool, ...] | None = None  # [N], whether an answer could be read; None: of all
    values: tuple[float, ...] | None = None  # [N], of the solutions; None: all alike
    unsolved: bool = False  # whether it counted as right where no sample was a solution

    def heard(self, n: int) -> list[int]:
        """What the belief after ``n`` samples is over: the answers that could be read, as groups."""
        return [g for i, g in enumerate(self.groups[:n]) if g is not None and (self.answered is None or self.answered[i])]

    def is_right(self, n: int, answers: AnswersBy) -> bool:
        """Whether the answer that a search chooses among the first ``n`` samples is right."""
        kept = [(i, g) for i, g in enumerate(self.groups[:n]) if g is not None]
        if not kept:
            return self.unsolved
        values = [1.0 if self.values is None else self.values[i] for i, _ in kept]
        valid = None if self.answered is None else [self.answered[i] for i, _ in kept]
        return self.correct[kept[choose_answer([g for _, g in kept], values, answers, valid).index][0]]


@dataclass(frozen=True, slots=True)
class Calibration:
    """What a threshold would have done on recorded samples."""

    threshold: float
    accuracy: float  # of the answer chosen among the samples taken
    fixed_accuracy: float  # of the one chosen among all
    tokens_saved: float  # share of the tokens, in [0, 1]


class Replay:
    """Recorded samples, stopped by any threshold, as a search would stop that takes them ``wave`` at a time.

    ``answers`` is how the search chooses an answer. Raises ``DataError`` where there are no samples.
    """

    def __init__(self, recorded: Sequence[Sampled], settings: StoppingConfig, wave: int = 1, answers: AnswersBy = "majority") -> None:
        if not recorded:
            raise DataError("no recorded samples to calibrate the stopping threshold with; record a run of self_consistency first")
        self._recorded, self._answers = recorded, answers
        self._looks = [self._spreads(sampled, settings, wave) for sampled in recorded]
        self._right: dict[tuple[int, int], bool] = {}  # by question and number of samples: thresholds ask for the same again

    @staticmethod
    def _spreads(sampled: Sampled, settings: StoppingConfig, wave: int) -> list[tuple[int, float]]:
        """Each number of samples at which the belief is looked at and may be settled, and its entropy then."""
        looks = ((n, sampled.heard(n)) for n in range(wave, len(sampled.groups), wave))
        return [(n, entropy(belief(Counter(heard).values(), settings.unseen))) for n, heard in looks if len(heard) >= settings.least]

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
            (self._is_right(i, n), self._is_right(i, len(s.groups)), sum(s.tokens[:n]), sum(s.tokens))
            for i, (s, n) in enumerate(zip(self._recorded, self.taken(threshold), strict=True))
        ]

    def _is_right(self, question: int, n: int) -> bool:
        if (question, n) not in self._right:
            self._right[question, n] = self._recorded[question].is_right(n, self._answers)
        return self._right[question, n]

    def run(self, threshold: float) -> Calibration:
        """What the threshold would have come to."""
        stopped, fixed, used, total = (sum(values) for values in zip(*self.questions(threshold), strict=True))
        return Calibration(threshold, stopped / len(self._recorded), fixed / len(self._recorded), 1 - used / total)


def calibrate(
    recorded: Sequence[Sampled],
    settings: StoppingConfig,
    *,
    tolerance: float = 0.01,
    wave: int = 1,
    answers: AnswersBy = "majority",
) -> Calibration:
    """The threshold that saves most tokens on recorded samples where it, and every stricter one, costs at most ``tolerance`` of accuracy.

    Against all samples. There always is one: a threshold of 0 stops nowhere. Thresholds are tried from the strictest on, and the first
    that costs more ends the trial: the best of many on few questions would be one whose lucky guesses make up for its errors. The order
    is that of fixed-sequence testing (Learn then Test, Angelopoulos et al. 2021, arXiv 2110.01052), but what is compared is the accuracy
    as it was seen, without a test, so nothing is guaranteed of other questions. Calibrate on training questions, report on held-out ones.
    """
    replay = Replay(recorded, settings, wave, answers)
    tried = (replay.run(level) for level in replay.levels)
    fit = takewhile(lambda c: c.accuracy >= c.fixed_accuracy - tolerance, tried)
    return max(fit, key=lambda c: (c.tokens_saved, -c.threshold))
