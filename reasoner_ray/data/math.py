"""MATH: competition problems with LaTeX answers (Hendrycks et al. 2021, arXiv:2103.03874)."""

from __future__ import annotations

from typing import Any

from reasoner_ray.data.questions import QuestionTask
from reasoner_ray.data.records import Record
from reasoner_ray.data.tasks import register_task
from reasoner_ray.errors import DataError


@register_task("math")
class MathTask(QuestionTask):
    """12,000 problems to train on and MATH-500 held out, from the hub or from ``path`` and ``held_out_path``.

    Records have ``problem`` and ``answer``, or a ``solution`` whose last box is the answer.
    """

    default_scorer = "math"
    hub = "hiyouga/math12k"

    def question(self, record: Record) -> str:
        """The problem's LaTeX text."""
        return record.text("problem").strip()

    def answer(self, record: Record) -> str:
        """LaTeX of the answer."""
        given = record.values.get("answer")
        if given not in (None, ""):
            return str(given).strip()
        boxed = last_boxed(record.text("solution"))
        if boxed is None:
            raise DataError(f"{record.where}: no 'answer', and no \\boxed{{}} in 'solution'")
        return boxed

    def is_usable(self, record: Record) -> bool:
        """False for the two problems of the hub's set whose answer is an empty string."""
        return record.values.get("answer") != "" or "solution" in record.values

    def worked(self, record: Record) -> str | None:
        """The solution, where the record has one with a boxed answer."""
        solution = record.values.get("solution")
        return solution if isinstance(solution, str) and last_boxed(solution) is not None else None

    def info(self, record: Record) -> dict[str, Any]:
        """Level and subject, where known."""
        return {k: record.values[k] for k in ("level", "subject", "type") if k in record.values}


def last_boxed(text: str) -> str | None:
    """What the last ``\\boxed{...}`` (or ``\\fbox{...}``) of ``text`` holds, braces balanced; None where there is none."""
    start = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    if start < 0:
        return None
    begin = text.index("{", start) + 1
    depth = 1
    for end in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[begin:end].strip()
    return None
