"""What a labelling run says of itself: balance of the labels, where first errors lie, what a label cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

QUARTERS = ("first quarter", "second quarter", "third quarter", "last quarter")


def summarise(questions: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """A journal's questions as totals.

    ``labels`` are hard labels that are known. ``first_errors`` counts solutions by the place of their first error: as the step's
    number (from 0), and as the quarter of the solution it lies in. ``agreement`` is the share of labels that say what the task's exact
    check says, among the ``checked`` ones: those of steps that end with a line, which is what it judges; None where there is none.
    ``check_failures`` counts solutions whose check failed, by the error. ``tokens_per_label`` is None without a label.
    """
    statuses: Counter[str] = Counter()
    cost: Counter[str] = Counter()
    totals: Counter[str] = Counter(dict.fromkeys(("estimates", "cut", "graded", "grader_failures"), 0))
    solutions = right = with_error = estimated = checked = agreed = 0
    labels: Counter[bool | None] = Counter()
    places: Counter[int] = Counter()
    quarters: Counter[str] = Counter()
    check_failures: Counter[str] = Counter()
    for question in questions:
        statuses[question["status"]] += 1
        cost.update(question.get("cost", {}))
        check_failures.update(question.get("check_failures", {}))
        totals.update({name: question.get(name, 0) for name in totals})
        for solution in question.get("solutions", ()):
            solutions += 1
            right += solution["right"] is True
            labels.update(solution["hard"])
            estimated += sum(value is not None for value in solution["soft"])
            for label, exact in zip(solution["hard"], solution.get("exact", ()), strict=False):
                checked += label is not None and exact is not None
                agreed += label is not None and label is exact
            if solution["first_error"] is not None:
                with_error += 1
                places[solution["first_error"]] += 1
                quarters[QUARTERS[4 * solution["first_error"] // len(solution["hard"])]] += 1
    known = labels[True] + labels[False]
    return {
        "questions": sum(statuses.values()),
        "by_status": dict(sorted(statuses.items())),
        "solutions": solutions,
        "solutions_right": right,
        "steps": sum(labels.values()),
        "labels": known,
        "labels_right": labels[True],
        "balance": labels[True] / known if known else None,
        "soft_labels": estimated,
        "first_errors": {
            "solutions": with_error,
            "by_step": {str(step): places[step] for step in sorted(places)},
            "by_quarter": {name: quarters[name] for name in QUARTERS},
        },
        "agreement": agreed / checked if checked else None,
        "checked": checked,
        "check_failures": dict(check_failures),
        "tokens_per_label": cost["generated"] / known if known else None,
        **totals,
        "cost": dict(cost),
    }


def lines_of(report: dict[str, Any]) -> list[str]:
    """The report as people read it."""
    statuses = ", ".join(f"{count} {status}" for status, count in report["by_status"].items())
    lines = [f"questions   {report['questions']}" + (f" ({statuses})" if statuses else "")]
    lines.append(f"solutions   {report['solutions']}, {report['solutions_right']} with the right answer")
    if report["labels"]:
        lines.append(f"labels      {report['labels']} of {report['steps']} steps, {report['balance']:.1%} right")
        errors = report["first_errors"]
        where = ", ".join(f"{name} {count}" for name, count in errors["by_quarter"].items())
        lines.append(f"first error in {errors['solutions']} solutions: {where}")
        if report["agreement"] is not None:
            lines.append(f"agreement   {report['agreement']:.1%} of {report['checked']} labels are those of the task's exact check")
        lines.append(f"cost        {report['tokens_per_label']:,.1f} generated tokens a label")
    cost = report["cost"]
    completions = f"{cost.get('requests', 0):,.0f} completions for {report['estimates']:,} estimates"
    lines.append(f"generated   {cost.get('generated', 0):,.0f} tokens in {completions}")
    lines.append(f"prompts     {cost.get('prompt', 0):,.0f} tokens, {cost.get('prompt_computed', 0):,.0f} of them computed")
    faults = {"completions cut by the limit": cost.get("cut", 0), "answers not graded": report["grader_failures"]}
    faults |= {f"checks of steps failed ({name})": count for name, count in report["check_failures"].items()}
    told = ", ".join(f"{count:,.0f} {name}" for name, count in faults.items() if count)
    return [*lines, f"faults      {told or 'none'}"]
