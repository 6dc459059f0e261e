"""``results.jsonl``, one line an item, and what a run of searches comes to. Plain data, no Ray."""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import fmean, pstdev
from types import TracebackType
from typing import TYPE_CHECKING, Any, get_args

from reasoner_ray.errors import DataError, ScoringError
from reasoner_ray.journal import open_locked, write_line
from reasoner_ray.search.aggregate import choose_answer, solution_value
from reasoner_ray.search.cost import Cost
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


def failed_record(index: int, item: Item, problem: str) -> dict[str, Any]:
    """The line of an item that could not be searched on (its prompt is too long, say): counted, and neither right nor wrong."""
    about: dict[str, Any] = {"answer": "", "confidence": 0.0, "ended": "failed", "found": 0, "nodes": 0, "answers": []}
    about |= {"cost": Cost().as_dict()}
    return {"index": index, "id": item.id, "correct": None, "problem": problem, **about, "cut_samples": [], "solutions": []}


def _path(trajectory: Trajectory) -> dict[str, Any]:
    steps = [span for span in trajectory.spans if span.kind == "model"]
    prompt = trajectory.spans[0]  # later ones that are not the policy's are what the search wrote at the beginning of a step
    return {"tokens": trajectory.tokens.tolist(), "start": prompt.end, "ends": [span.end for span in steps]}


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


class ResultsFile:
    """Appends records as they come, each handed to the disk before the next, so that a killed run can go on. One process at a time."""

    def __init__(self, path: Path) -> None:
        """Read what is there; a last line that was cut off is removed.

        Raises ``DataError`` naming any other broken line, and ``CheckpointError`` where another process is writing the file.
        """
        self.path = path
        self._file = open_locked(path)
        try:
            self.records = read_results(path)
            self._file.truncate(path.read_bytes().rfind(b"\n") + 1)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> ResultsFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    @property
    def done(self) -> set[str]:
        """Ids of the items that have their line."""
        return {record["id"] for record in self.records}

    def append(self, record: dict[str, Any]) -> None:
        """Write one line."""
        self.records.append(record)
        write_line(self._file, record)


def read_results(path: Path) -> list[dict[str, Any]]:
    """The records of a results file. A last line without its end is left out; any other broken line raises ``DataError``.

    So does an item that has two lines: it would count twice.
    """
    if not path.is_file():
        raise DataError(f"no results at {path}; `reasoner search JOB` writes them to RUN/search/{RESULTS_FILE}")
    *lines, tail = path.read_bytes().split(b"\n")
    if tail:
        log.warning("%s:%d: the last line was cut off while it was written; its item is searched again", path, len(lines) + 1)
    records: list[dict[str, Any]] = []
    line_of: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            found = isinstance(record, dict) and {"id", "correct", "cost", "solutions", "answers"} <= set(record)
        except ValueError as error:
            raise DataError(f"{path}:{number}: not a line of JSON ({error}); remove the line to search that item again") from error
        if not found:
            raise DataError(f"{path}:{number}: not a result of `reasoner search`; remove the line to go on without it")
        if (first := line_of.setdefault(str(record["id"]), number)) != number:
            raise DataError(f"{path}:{number}: item {record['id']!r} has line {first} already; remove one of the two")
        records.append(record)
    return records


def summarise_results(records: Sequence[dict[str, Any]], right_from: float = 1.0) -> dict[str, Any]:
    """Accuracy (mean reward of the chosen answers) with its standard error, mean costs an item, confidence, and how searches ended.

    ``right`` is the share of chosen answers with a reward of ``right_from`` or more. Items whose answer could not be judged are counted
    apart, and among them as ``failed`` those whose search failed; what was never searched on is in no mean. ``accuracy_by`` says what
    other ways to an answer would have given on the same solutions; what cannot be computed is left out.
    """
    if not records:
        raise DataError("there is no result to sum up")
    judged = [r for r in records if r["correct"] is not None]
    values = [float(r["correct"]) for r in judged]
    right = [r["confidence"] for r in judged if r["correct"] >= right_from]
    wrong = [r["confidence"] for r in judged if r["correct"] < right_from]
    searched = [r for r in records if r["ended"] != "failed" or r["cost"]["prompt"]] or list(records)
    summary: dict[str, Any] = {
        "items": len(records),
        "unjudged": len(records) - len(judged),
        "failed": sum(r["ended"] == "failed" for r in records),
        "unsolved": sum(not r["solutions"] for r in searched),
        "confidence": fmean(r["confidence"] for r in searched),
        **({"accuracy": fmean(values), "standard_error": pstdev(values) / math.sqrt(len(values))} if values else {}),
        **({"right": len(right) / len(values)} if values else {}),
        **({"confidence_right": fmean(right)} if right else {}),
        **({"confidence_wrong": fmean(wrong)} if wrong else {}),
        "solutions": fmean(r["found"] for r in searched),
        "cost": {name: fmean(r["cost"][name] for r in searched) for name in COSTS},
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


def recorded_samples(records: Sequence[dict[str, Any]], right_from: float = 1.0) -> list[Sampled]:
    """What ``stopping.calibrate`` replays: the samples of each item in the order they came, those that a limit cut among them.

    Items whose answer, or one of whose solutions, could not be judged are left out. Raises ``DataError`` where a search had stopped
    before its last sample: a replay needs all N of each question.
    """
    early = Counter(r["ended"] for r in records if r["ended"] not in ("done", "failed"))
    if early:
        how = ", ".join(f"{name} {n}" for name, n in sorted(early.items()))
        raise DataError(
            f"{early.total()} of {len(records)} recorded searches stopped early ({how}), but calibration needs all samples of each "
            "question: record a run with search.stopping=null and no search.budget"
        )
    judged = [r for r in records if r["correct"] is not None and all(s["correct"] is not None for s in r["solutions"])]
    if len(judged) < len(records):
        log.warning(
            "%d of %d recorded items are left out: not all of their solutions could be judged", len(records) - len(judged), len(records)
        )
    return [_sampled(record, right_from) for record in judged]


def _sampled(record: dict[str, Any], right_from: float) -> Sampled:
    if record["cost"]["cut"] and "cut_samples" not in record:
        raise DataError(f"item {record['id']!r} was recorded without the samples that a limit cut; record the run anew")
    cut = dict(record.get("cut_samples", ()))  # place among all samples: tokens
    solutions = _in_order(record)
    rest = iter(solutions)
    samples = [None if place in cut else next(rest) for place in range(len(solutions) + len(cut))]
    return Sampled(
        groups=tuple(None if s is None else s["group"] for s in samples),
        correct=tuple(s is not None and s["correct"] >= right_from for s in samples),
        tokens=tuple(int(cut[place] if s is None else s["tokens"]) for place, s in enumerate(samples)),
        answered=tuple(s is not None and bool(s["answer"]) for s in samples),
        values=tuple(0.0 if s is None else s["value"] for s in samples),
        unsolved=record["correct"] >= right_from,
    )


def show(summary: dict[str, Any]) -> str:
    """The summary as a table for the terminal."""
    cost, rows = summary["cost"], []
    if "accuracy" in summary:
        rows.append(("accuracy", f"{summary['accuracy']:.1%} ± {summary['standard_error']:.1%} of {summary['items']} items"))
    if summary.get("right") != summary.get("accuracy"):
        rows.append(("right", f"{summary['right']:.1%} of the answers judged"))
    rows.append(("confidence", _confidence(summary)))
    rows.append(("solutions an item", f"{summary['solutions']:.1f}, {summary['unsolved']} items without one"))
    rows.append(("generated tokens", f"{cost['generated']:.0f}, {cost['discarded']:.0f} of them discarded, {cost['cut']:.1f} cut"))
    rows.append(("prompt tokens", f"{cost['prompt']:.0f}, {cost['prompt_computed']:.0f} of them computed"))
    rows.append(("scorer tokens", f"{cost['scorer']:.0f}"))
    rows.append(("seconds", f"{cost['seconds']:.2f}"))
    rows.append(("ended", ", ".join(f"{name} {n}" for name, n in sorted(summary["ended"].items()))))
    if summary["unjudged"]:
        rows.append(("not judged", f"{summary['unjudged']}, of which {summary['failed']} searches failed"))
    rows += [(f"by {name}", f"{value:.1%}") for name, value in summary["accuracy_by"].items()]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _confidence(summary: dict[str, Any]) -> str:
    apart = [
        f"{summary[key]:.2f} where {key.removeprefix('confidence_')}" for key in ("confidence_right", "confidence_wrong") if key in summary
    ]
    return ", ".join([f"{summary['confidence']:.2f}", *apart])
