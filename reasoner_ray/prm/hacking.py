"""Does the policy get better, or better at pleasing its judge? Figures of the process scores against the truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

RIGHT = 0.5
"""An outcome above this is a right answer."""


def process_metrics(summaries: Sequence[Mapping[str, Any]], prefix: str = "process") -> dict[str, float]:
    """Figures of the groups whose summaries hold ``process`` (see ``ProcessReward.apply``); none where no group does.

    ``score`` of right and of wrong answers and the ``gap`` between them, the ``correlation`` of score and truth (falling: the
    scores say less and less), of score and
    length in tokens and in steps, ``solution_tokens``, ``steps`` and ``tokens_per_step``. A figure that is undefined (no wrong
    answer, say) is left out.
    """
    found = [summary["process"] for summary in summaries if summary.get("process", {}).get("score")]
    if not found:
        return {}
    score, reward, truth, steps, tokens = (
        np.array([value for each in found for value in each[name]], dtype=np.float64)
        for name in ("score", "reward", "truth", "steps", "tokens")
    )
    right = truth > RIGHT
    figures = {
        "score": float(score.mean()),
        "reward": float(reward.mean()),
        "score_right": _mean(score[right]),
        "score_wrong": _mean(score[~right]),
        "gap": _mean(score[right]) - _mean(score[~right]),
        "correlation": correlation(score, truth),
        "length_correlation": correlation(score, tokens),
        "steps_correlation": correlation(score, steps),
        "solution_tokens": float(tokens.mean()),
        "steps": float(steps.mean()),
        "tokens_per_step": float(tokens.sum() / steps.sum()),
    }
    return {f"{prefix}/{name}": value for name, value in figures.items() if np.isfinite(value)}


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's, NaN where one of the two does not vary."""
    x, y = a - a.mean(), b - b.mean()
    spread = float(np.sqrt((x**2).sum() * (y**2).sum()))
    return float((x * y).sum()) / spread if spread > 1e-12 else float("nan")


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")
