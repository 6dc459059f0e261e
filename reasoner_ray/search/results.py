"""``results.jsonl``, one line an item, and what a run of searches comes to. Plain data, no Ray."""

from __future__ import annotations

import json
import logging
import math
import os
from collections import Counter
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any, get_args

from reasoner_ray.errors import DataError, ScoringError
from reasoner_ray.search.aggregate import choose_answer, solution_value
from reasoner_ray.search.settings import AnswersBy, StepsAs
from reasoner_ray.search.stopping import Sampled

if TYPE_CHECKING:
    from reasoner_ray.data.tasks import Item
    from reasoner_ray.trajectory import Trajectory

log = logging.getLogger(__name__)

RESULTS_FILE = "results.jsonl"
COSTS = ("generated", "discarded", "prompt", "prompt_computed", "scorer", "requests", "cut", "seconds")


def make_record(
    index: int, item: Item, trajectories: Sequence[Trajectory], rewards: Sequence[float], *, tokens: bool = False
) -> dict[str, Any]:
    """The line of one item: what ``search_solutions`` returned for it, judged by the job's scorers only now.

    ``correct`` is the chosen solution's reward, None where it could not be judged; each solution has its own, and with ``tokens`` a
    ``path``: its tokens, the prompt's among them, and the ends of its steps, as records of supervised training have them.
    """
    solutions = [
        {**t.info["solution"], "text": t.info["text"], "tokens": t.trainable_tokens, "correct": _number(reward)}
        | ({"path": _path(t)} if tokens else {})
        for t, reward in zip(trajectories, rewards, strict=True)
        if t.info["solution"] is not None
    ]
    about = {key: value for key, value in trajectories[0].info["search"].items() if key != "tree"}
    first = trajectories[0]
    problem = None if first.status.is_trainable else str(first.info.get("error", first.status))
    return {"index": index, "id": item.id, "correct": _number(rewards[0]), "problem": problem, **about, "solutions": solutions}


def _path(trajectory: Trajectory) -> dict[str, Any]:
    steps = [span for span in trajectory.spans if span.kind == "model"]
    prompt = trajectory.spans[0]  # later ones that are not the policy's are what the search wrote at the beginning of a step
    return {"tokens": trajectory.tokens.tolist(), "start": prompt.end, "ends": [span.end for span in steps]}


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


class ResultsFile:
    """Appends records as they come, each handed to the disk before the next, so that a killed run can go on."""

    def __init__(self, path: Path) -> None:
        """Read what is there; a last line that was cut off is removed. Raises ``DataError`` naming any other broken line."""
        self.path = path
        self.records = read_results(path) if path.exists() else []
        if path.exists():
            content = path.read_bytes()
            os.truncate(path, content.rfind(b"\n") + 1)

    @property
    def done(self) -> set[str]:
        """Ids of the items that have their line."""
        return {record["id"] for record in self.records}

    def append(self, record: dict[str, Any]) -> None:
        """Write one line."""
        self.records.append(record)
        with self.path.open("ab") as file:
            file.write(json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
            file.flush()
            os.fsync(file.fileno())


def read_results(path: Path) -> list[dict[str, Any]]:
    """The records of a results file. A last line without its end is left out; any other broken line raises ``DataError``."""
    if not path.is_file():
        raise DataError(f"no results at {path}; `reasoner search JOB` writes them to RUN/search/{RESULTS_FILE}")
    *lines, tail = path.read_bytes().split(b"\n")
    if tail:
        log.warning("%s:%d: the last line was cut off while it was written; its item is searched again", path, len(lines) + 1)
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            found = isinstance(record, dict) and {"id", "correct", "cost", "solutions", "answers"} <= set(record)
        except ValueError as error:
            raise DataError(f"{path}:{number}: not a line of JSON ({error}); remove the line to search that item again") from error
        if not found:
            raise DataError(f"{path}:{number}: not a result of `reasoner search`; remove the line to go on without it")
        records.append(record)
    return records


def summarise_results(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Accuracy (mean reward of the chosen answers) with its standard error, mean costs an item, confidence, and how searches ended.

    Items whose answer could not be judged are counted apart. ``accuracy_by`` says what other ways to an answer would have given on
    the same solutions; what cannot be computed is left out.
    """
    if not records:
        raise DataError("there is no result to sum up")
    judged = [r for r in records if r["correct"] is not None]
    values = [float(r["correct"]) for r in judged]
    right, wrong = [r["confidence"] for r in judged if r["correct"] == 1], [r["confidence"] for r in judged if r["correct"] != 1]
    summary: dict[str, Any] = {
        "items": len(records),
        "unjudged": len(records) - len(judged),
        "unsolved": sum(not r["solutions"] for r in records),
        "confidence": fmean(r["confidence"] for r in records),
        **({"accuracy": fmean(values), "standard_error": pstdev(values) / math.sqrt(len(values))} if values else {}),
        **({"confidence_right": fmean(right)} if right else {}),
        **({"confidence_wrong": fmean(wrong)} if wrong else {}),
        "solutions": fmean(r["found"] for r in records),
        "cost": {name: fmean(r["cost"][name] for r in records) for name in COSTS},
        "ended": dict(Counter(r["ended"] for r in records)),
        "accuracy_by": accuracy_by(judged),
    }
    return summary


def accuracy_by(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Accuracy of ``STEPS/ANSWERS`` for every way to put scores and answers together, on the solutions that were found.

    An item without a judged solution counts as it was judged. Without scores there is the majority alone.
    """
    scored = any(s["scores"] for r in records for s in r["solutions"])
    ways: list[tuple[StepsAs, AnswersBy]] = [("last", "majority")]
    if scored:
        ways = list(product(get_args(StepsAs), get_args(AnswersBy)))
    found: dict[str, float] = {}
    for steps, answers in ways:
        name = "majority" if answers == "majority" else f"{steps}/{answers}"
        if records and name not in found:
            try:
                found[name] = fmean(_correct_by(record, steps, answers) for record in records)
            except ScoringError as error:  # a product of scores below 0
                log.info("no accuracy by %s: %s", name, error)
    return found


def _correct_by(record: dict[str, Any], steps: StepsAs, answers: AnswersBy) -> float:
    found = _in_order(record)
    if not found:
        return float(record["correct"])
    values = [solution_value(s["scores"], steps) if s["scores"] else s["value"] for s in found]
    choice = choose_answer([s["group"] for s in found], values, answers, [bool(s["answer"]) for s in found])
    return float(found[choice.index]["correct"])


def _in_order(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The judged solutions in the order they were found, one that was found again as often as it was."""
    places = [(place, s) for s in record["solutions"] if s["correct"] is not None for place in s["found_at"]]
    return [s for _, s in sorted(places, key=lambda pair: pair[0])]


def recorded_samples(records: Sequence[dict[str, Any]]) -> list[Sampled]:
    """What ``stopping.calibrate`` replays: the solutions of each item in the order they came. Items without one are left out."""
    found = []
    for solutions in filter(None, map(_in_order, records)):
        found.append(
            Sampled(
                tuple(s["group"] for s in solutions),
                tuple(s["correct"] == 1 for s in solutions),
                tuple(int(s["tokens"]) for s in solutions),
            )
        )
    return found


def show(summary: dict[str, Any]) -> str:
    """The summary as a table for the terminal."""
    cost, rows = summary["cost"], []
    if "accuracy" in summary:
        rows.append(("accuracy", f"{summary['accuracy']:.1%} ± {summary['standard_error']:.1%} of {summary['items']} items"))
    rows.append(("confidence", _confidence(summary)))
    rows.append(("solutions an item", f"{summary['solutions']:.1f}, {summary['unsolved']} items without one"))
    rows.append(("generated tokens", f"{cost['generated']:.0f}, {cost['discarded']:.0f} of them discarded, {cost['cut']:.1f} cut"))
    rows.append(("prompt tokens", f"{cost['prompt']:.0f}, {cost['prompt_computed']:.0f} of them computed"))
    rows.append(("scorer tokens", f"{cost['scorer']:.0f}"))
    rows.append(("seconds", f"{cost['seconds']:.2f}"))
    rows.append(("ended", ", ".join(f"{name} {n}" for name, n in sorted(summary["ended"].items()))))
    if summary["unjudged"]:
        rows.append(("not judged", str(summary["unjudged"])))
    rows += [(f"by {name}", f"{value:.1%}") for name, value in summary["accuracy_by"].items()]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _confidence(summary: dict[str, Any]) -> str:
    apart = [
        f"{summary[key]:.2f} where {key.removeprefix('confidence_')}" for key in ("confidence_right", "confidence_wrong") if key in summary
    ]
    return ", ".join([f"{summary['confidence']:.2f}", *apart])
