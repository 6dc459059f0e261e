"""GSM8K: grade-school word problems with a number as the answer (Cobbe et al. 2021, arXiv:2110.14168)."""

from __future__ import annotations

import re

from reasoner_ray.data.questions import QuestionTask
from reasoner_ray.data.records import Record
from reasoner_ray.data.tasks import register_task
from reasoner_ray.errors import DataError

_CALCULATOR = re.compile(r"<<[^>]*>>")


@register_task("gsm8k")
class Gsm8kTask(QuestionTask):
    """From the hub (openai/gsm8k), or from ``path`` and ``held_out_path`` in its format (``question``, ``answer``)."""

    default_scorer = "math"
    hub = "openai/gsm8k"
    subset = "main"

    def question(self, record: Record) -> str:
        """The word problem."""
        return record.text("question").strip()

    def answer(self, record: Record) -> str:
        """The number after ``####``, without thousands separators."""
        _, mark, number = record.text("answer").rpartition("####")
        if not mark or not number.strip():
            raise DataError(f"{record.where}: 'answer' has no final number after '####'")
        return number.strip().replace(",", "")

    def worked(self, record: Record) -> str:
        """The solution without calculator marks, its number boxed."""
        steps = record.text("answer").rpartition("####")[0]
        return f"{_CALCULATOR.sub('', steps).strip()}\nThe answer is \\boxed{{{self.answer(record)}}}."
