"""The step's metrics, from the small summaries that the driver sees. Flat names, the same in every run."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from reasoner_ray.prm.hacking import process_metrics
from reasoner_ray.trainer.parts import GroupResult
from reasoner_ray.trajectory import Status

if TYPE_CHECKING:
    from reasoner_ray.data.tasks import Item


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
        **_term_metrics("reward", results),
        **process_metrics([r.summary for r in results]),
        "rollout/tokens_mean": statistics.fmean(lengths),
        "rollout/tokens_max": float(max(lengths)),
        "rollout/truncated": statuses["truncated"] / len(rewards),
        "staleness/mean": statistics.fmean(staleness),
        "staleness/max": float(max(staleness)),
        **{f"episode/{name}": statistics.fmean(values) for name, values in _episode_metrics(results).items()},
        **learned,
        **{f"time/{name}_s": seconds for name, seconds in phases.items()},
    }


def group_row(index: int, item: Item, result: GroupResult) -> dict[str, Any]:
    """A trained group as ``groups.jsonl`` keeps it; ``index`` is its place in the data order."""
    rewards = result.summary["rewards"]
    return {"group": index, "item": item.id, "reward": statistics.fmean(rewards), "tokens": sum(result.summary["lengths"])}


def evaluation_metrics(results: Sequence[GroupResult]) -> dict[str, float]:
    """Accuracy (mean reward of the answers) over held-out items; an answer that could not be judged is counted apart, not as 0.

    Where the reward is a sum of terms, ``eval/TERM`` tells the share of right answers from what form or length earned.
    Items of several labels (wordings of an environment, say) are also shown label by label.
    A mean over nothing is NaN, so that it cannot be mistaken for a result.
    """
    labels = sorted({r.summary.get("label", "") for r in results} - {""})
    each = {label: [r for r in results if r.summary.get("label") == label] for label in labels if len(labels) > 1}
    return {
        "eval/accuracy": _mean_reward(results),
        **_term_metrics("eval", [r for r in results if any(_judged(r))]),
        **process_metrics([r.summary for r in results], "eval/process"),
        "eval/answers": float(sum(sum(_judged(r)) for r in results)),
        "eval/failed": float(sum(not judged for r in results for judged in _judged(r))),
        "eval/tokens_mean": statistics.fmean(n for r in results for n in r.summary["lengths"]),
        **{f"eval/{name}": statistics.fmean(values) for name, values in _episode_metrics(results).items()},
        **{f"eval/{label}/accuracy": _mean_reward(part) for label, part in each.items()},
        **{f"eval/{label}/{n}": statistics.fmean(v) for label, part in each.items() for n, v in _episode_metrics(part).items()},
    }


def _mean_reward(results: Sequence[GroupResult]) -> float:
    """Of the outcomes alone, where there are rewards for the process, too."""
    outcomes = [(r.summary.get("outcomes", r.summary["rewards"]), _judged(r)) for r in results]
    scored = [reward for rewards, judged in outcomes for reward, counts in zip(rewards, judged, strict=True) if counts]
    return statistics.fmean(scored) if scored else float("nan")


def _judged(result: GroupResult) -> list[bool]:
    """Whether each answer's reward means what it says."""
    found = zip(result.summary["statuses"], result.summary["lengths"], strict=True)
    return [Status(status).is_trainable and length > 0 for status, length in found]


def _term_metrics(prefix: str, results: Sequence[GroupResult]) -> dict[str, float]:
    """Mean of each term of the reward, before its weight: what the sum hides."""
    found: dict[str, list[float]] = {}
    for result in results:
        for name, value in result.summary.get("parts", {}).items():
            found.setdefault(name, []).append(value)
    return {f"{prefix}/{name}": statistics.fmean(values) for name, values in found.items()}


def _episode_metrics(results: Sequence[GroupResult]) -> dict[str, list[float]]:
    """What the episodes say of themselves, all trajectories together."""
    found: dict[str, list[float]] = {}
    for result in results:
        for name, values in result.summary.get("metrics", {}).items():
            found.setdefault(name, []).extend(values)
    return found
