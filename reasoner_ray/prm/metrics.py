"""How good is a scorer of steps? Pure functions on arrays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def auc(scores: np.ndarray, right: np.ndarray) -> float:
    """Probability that a right step scores above a wrong one, ties counting half; NaN where there are no two classes.

    By ranks: ``(R - n1 (n1 + 1) / 2) / (n1 n0)`` with R the sum of the ranks of the n1 right ones (Mann and Whitney 1947).
    """
    right = np.asarray(right, dtype=bool)
    positives, negatives = int(right.sum()), int((~right).sum())
    if not positives or not negatives:
        return float("nan")
    _, place, counts = np.unique(np.asarray(scores, dtype=np.float64), return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]  # equal scores share the mean of their ranks
    return float((ranks[right].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def cross_entropy(scores: np.ndarray, labels: np.ndarray) -> float:
    """Mean of ``-y log s - (1 - y) log(1 - s)``, nats; ``scores`` in [0, 1] are held away from 0 and 1 by 1e-7."""
    s = np.clip(np.asarray(scores, dtype=np.float64), 1e-7, 1 - 1e-7)
    return float(-(labels * np.log(s) + (1 - labels) * np.log1p(-s)).mean())


def step_metrics(scores: np.ndarray, labels: np.ndarray, threshold: float) -> dict[str, float]:
    """Loss, AUC, accuracy and counts of steps [n] with ``labels`` in [0, 1]; a label above a half is a right step."""
    right = labels > 0.5
    said = scores >= threshold
    return {
        "loss": cross_entropy(scores, labels),
        "auc": auc(scores, right),
        "accuracy": float((said == right).mean()),
        "majority": float(max(right.mean(), 1 - right.mean())),  # what calling every step the same would reach
        "steps": float(len(right)),
        "steps_wrong": float((~right).sum()),
    }


def first_error(scores: Sequence[float], threshold: float) -> int:
    """Index of the first step that scores below ``threshold``, -1 where none does."""
    return next((i for i, score in enumerate(scores) if score < threshold), -1)


def first_error_metrics(found: Sequence[int], truth: Sequence[int]) -> dict[str, float]:
    """ProcessBench's figures (Zheng et al. 2024, arXiv 2412.06559): the accuracies on erroneous and on right samples, and
    their harmonic mean F1. Both lists hold the index of the first wrong step, -1 for none.

    Raises ``ValueError`` where they differ in length. A figure over no sample is NaN, and so is F1 then.
    """
    hits = np.array([a == b for a, b in zip(found, truth, strict=True)], dtype=np.float64)
    wrong = np.array(truth) >= 0
    on_wrong = float(hits[wrong].mean()) if wrong.any() else float("nan")
    on_right = float(hits[~wrong].mean()) if (~wrong).any() else float("nan")
    both = on_wrong + on_right
    return {
        "f1": 0.0 if both == 0 else 2 * on_wrong * on_right / both,
        "accuracy_on_erroneous": on_wrong,
        "accuracy_on_correct": on_right,
        "erroneous": float(wrong.sum()),
        "correct": float((~wrong).sum()),
    }


def value_metrics(values: np.ndarray, returns: np.ndarray) -> dict[str, float]:
    """Mean squared error, its share of the returns' variance that is explained, and the AUC of returns above their middle."""
    error = values - returns
    spread = float(returns.var())
    middle = (returns.max() + returns.min()) / 2
    return {
        "loss": float((error**2).mean()),
        "explained_variance": 1 - float(error.var()) / spread if spread > 0 else float("nan"),
        "auc": auc(values, returns > middle),
        "states": float(len(returns)),
    }
