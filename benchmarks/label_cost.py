"""Process labels: generated tokens of OmegaPRM against Math-Shepherd, on solutions whose first errors are planted.

A policy without a model writes solutions of a known number of steps; each step errs with the probability that leaves a share
of ``--solved`` of all solutions right; after an error none is. Both methods label with the same code as `reasoner label`.
Math-Shepherd takes K completions after every step; OmegaPRM takes k after those a binary search asks for. For each k the cost
of naming a first error is compared at equal accuracy: with the tokens that Math-Shepherd needs for it, read off its own curve
over K. Math-Shepherd labels right solutions as well; tokens a label count those labels, too.

    python -m benchmarks.label_cost
"""

from __future__ import annotations

import argparse
import asyncio
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from benchmarks._record import record
from reasoner_ray.labels import math_shepherd, omega_prm
from reasoner_ray.labels.estimates import Estimator
from reasoner_ray.labels.settings import OmegaConfig
from tests.labels.planted import PlantedPolicy, grade, root, true_first_error

COMPLETIONS = (2, 4, 8, 16)


@dataclass(frozen=True, slots=True)
class Point:
    """What a method cost and how well it found first errors."""

    tokens: float  # generated, a wrong solution whose first error it names
    accuracy: float  # share of wrong solutions whose first error it names rightly
    tokens_per_label: float


def measure(method: str, completions: int, steps: int, *, seed: int, questions: int, solved: float) -> Point:
    """Label ``questions`` questions; everything that was sampled counts, whatever became of it."""
    policy = PlantedPolicy(steps=steps, error=1 - solved ** (1 / steps), seed=seed, step_tokens=20)
    found = [asyncio.run(_label(method, policy, completions)) for _ in range(questions)]
    solutions = [solution for labels in found for solution in labels.solutions]
    wrong = [s for s in solutions if true_first_error(s.partial) is not None]
    right = sum(s.first_error == true_first_error(s.partial) for s in wrong)
    labels = sum(label is not None for s in solutions for label in s.hard)
    return Point(policy.cost.generated / len(wrong), right / len(wrong), policy.cost.generated / labels)


def _label(method: str, policy: PlantedPolicy, completions: int) -> Any:
    estimator = Estimator(policy, grade, completions)
    if method == "math_shepherd":
        return math_shepherd.label_question(estimator, root(), 8)
    return omega_prm.label_question(estimator, root(), OmegaConfig(searches=8, keep_right=0))


def tokens_at(accuracy: float, curve: list[Point]) -> float | None:
    """Tokens at which a curve reaches an accuracy, between two points along the logarithm of the tokens; None past its end."""
    for low, high in pairwise(curve):
        if low.accuracy <= accuracy <= high.accuracy:
            share = (accuracy - low.accuracy) / max(high.accuracy - low.accuracy, 1e-9)
            return math.exp(math.log(low.tokens) + share * (math.log(high.tokens) - math.log(low.tokens)))
    return None


def compared(figures: dict[str, Any], name: str, theirs: float | None, ours: float) -> None:
    """Note the ratio of a seed under ``name``; one that there is not (their curve never has that accuracy) is counted, not dropped."""
    missing = f"{name}: seeds whose accuracy Math-Shepherd's curve does not have"
    figures.setdefault(name, [])
    figures[missing] = figures.get(missing, 0) + (theirs is None)
    if theirs is not None:
        figures[name].append(theirs / ours)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--questions", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--solved", type=float, default=0.3, help="share of solutions that are right")
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 16, 32])
    arguments = parser.parse_args()
    figures: dict[str, Any] = {}
    for steps in arguments.steps:
        for seed in range(arguments.seeds):
            curves = {
                method: [
                    measure(method, k, steps, seed=1000 * seed + k, questions=arguments.questions, solved=arguments.solved)
                    for k in COMPLETIONS
                ]
                for method in ("math_shepherd", "omega_prm")
            }
            for method, curve in curves.items():
                for k, point in zip(COMPLETIONS, curve, strict=True):
                    name = f"{steps} steps, {method}, {k} completions"
                    figures.setdefault(f"{name}: accuracy of the first error", []).append(point.accuracy)
                    figures.setdefault(f"{name}: tokens a first error", []).append(point.tokens)
                    figures.setdefault(f"{name}: tokens a label", []).append(point.tokens_per_label)
            for k, point, other in zip(COMPLETIONS, curves["omega_prm"], curves["math_shepherd"], strict=True):
                equal = tokens_at(point.accuracy, curves["math_shepherd"])
                compared(figures, f"{steps} steps: times cheaper a first error, at the accuracy of {k} completions", equal, point.tokens)
                name = f"{steps} steps: times cheaper a label, both with {k} completions"
                figures.setdefault(name, []).append(other.tokens_per_label / point.tokens_per_label)
    record("label_cost", {**vars(arguments), "completions": COMPLETIONS}, figures)


if __name__ == "__main__":
    main()
