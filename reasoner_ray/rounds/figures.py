"""What each phase came to, read from what its run left on the disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reasoner_ray.prm.hacking import process_metrics
from reasoner_ray.search.results import RESULTS_FILE, read_results
from reasoner_ray.trainer.metrics_log import METRICS_FILE, read_jsonl

if TYPE_CHECKING:
    from reasoner_ray.rounds.plan import Phase

COSTS = {"generated": "tokens", "prompt_computed": "prompt_tokens", "scorer": "scorer_tokens", "seconds": "seconds"}
"""Of a search's costs an item, those that are recorded, and their names."""
_LEARNT = ("eval/", "process/")


def figures_of(phase: Phase) -> dict[str, float]:
    """The figures of a phase that has ended; the greedy policy's are ``eval/...``, any other's bear the phase's name."""
    name = "eval" if phase.name == "greedy" else phase.name
    folder = phase.config.run_dir
    if phase.work == "train":
        found = training_figures(read_jsonl(folder / METRICS_FILE))
    elif phase.work == "label":
        report = json.loads((folder / "labels" / "report.json").read_text())
        found = {key: float(value) for key, value in report.items() if isinstance(value, int | float)}
    else:
        right_from = phase.config.search.right_from
        found = search_figures(folder / "search", judged=phase.name.startswith("judged"), right_from=right_from)
    return {f"{name}/{key}": value for key, value in found.items()}


def search_figures(folder: Path, *, judged: bool, right_from: float = 1.0) -> dict[str, float]:
    """Accuracy and what it cost; ``judged``: also how the scores of all solutions go with the truth (``process_metrics``).

    Questions whose search failed are counted (``failed``) and in no share.
    """
    summary, records = json.loads((folder / "summary.json").read_text()), read_results(folder / RESULTS_FILE)
    found = {name: summary["cost"][cost] for cost, name in COSTS.items()}
    found |= {key: float(summary[key]) for key in ("accuracy", "standard_error", "unjudged", "unsolved", "failed") if key in summary}
    searched = [record for record in records if record.get("ended") != "failed"]
    judgements = [[s["correct"] for s in record["solutions"] if s["correct"] is not None] for record in searched]
    if judgements:
        found["any_right"] = sum(any(value >= right_from for value in each) for each in judgements) / len(judgements)
    return found | (hacking_figures(records) if judged else {})


def hacking_figures(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """``process_metrics`` of the solutions of searches whose values are a process reward model's."""
    solutions = [s for record in records for s in record["solutions"] if s["correct"] is not None]
    values = [s["value"] for s in solutions]
    about = {"score": values, "reward": values, "truth": [s["correct"] for s in solutions]}
    about |= {name: [s[name] for s in solutions] for name in ("steps", "tokens")}
    found = process_metrics([{"process": about}], prefix="")
    return {key.removeprefix("/"): value for key, value in found.items() if key != "/reward"}


def training_figures(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The last value of each figure of an evaluation, and as ``NAME_before`` the first one."""
    series: dict[str, list[float]] = {}
    for record in records:
        for key, value in record.items():
            if key.startswith(_LEARNT) and value is not None:
                series.setdefault(key.removeprefix("eval/").replace("/", "_"), []).append(value)
    return {key: values[-1] for key, values in series.items()} | {
        f"{key}_before": values[0] for key, values in series.items() if len(values) > 1
    }
