"""The step's metrics, from the small summaries that the driver sees. Flat names, the same in every run."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence

from reasoner_ray.trainer.parts import GroupResult


def step_metrics(
    results: Sequence[GroupResult], *, trained_at: int, learned: dict[str, float], phases: dict[str, float]
) -> dict[str, float]:
    """Reward, length, staleness and status of the groups trained at version ``trained_at``, with the learner's own metrics."""
    groups = [r.summary["rewards"] for r in results]
    rewards = [reward for group in groups for reward in group]
    lengths = [n for r in results for n in r.summary["lengths"]]
    staleness = [trained_at - v for r in results for v in r.summary["oldest_versions"]]
    statuses = Counter(status for r in results for status in r.summary["statuses"])
    return {
        "reward/mean": statistics.fmean(rewards),
        "reward/std": statistics.pstdev(rewards),
        "reward/group_std": statistics.fmean(statistics.pstdev(group) for group in groups),
        "reward/groups_all_equal": statistics.fmean(max(group) == min(group) for group in groups),
        "rollout/tokens_mean": statistics.fmean(lengths),
        "rollout/tokens_max": float(max(lengths)),
        "rollout/truncated": statuses["truncated"] / len(rewards),
        "staleness/mean": statistics.fmean(staleness),
        "staleness/max": float(max(staleness)),
        **learned,
        **{f"time/{name}_s": seconds for name, seconds in phases.items()},
    }


def evaluation_metrics(results: Sequence[GroupResult]) -> dict[str, float]:
    """Accuracy (mean reward of greedy answers) over held-out items; an item whose scorer failed is counted apart, not as 0.

    A mean over nothing is NaN, so that it cannot be mistaken for a result.
    """
    scored = [reward for r in results if not r.summary["failed"] for reward in r.summary["rewards"]]
    return {
        "eval/accuracy": statistics.fmean(scored) if scored else float("nan"),
        "eval/answers": float(len(scored)),
        "eval/failed": float(sum(bool(r.summary["failed"]) for r in results)),
        "eval/tokens_mean": statistics.fmean(n for r in results for n in r.summary["lengths"]),
    }
