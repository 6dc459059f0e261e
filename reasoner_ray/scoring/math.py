"""Mathematical equality through ``math-verify`` (sympy).

math-verify guards itself with ``signal.alarm``, which works in main threads only and cannot stop C code. Its guards are
off here: the grader pool kills the process of an answer that takes too long.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any

from reasoner_ray.data.math import last_boxed
from reasoner_ray.data.tasks import Item
from reasoner_ray.errors import EnvironmentProblem
from reasoner_ray.scoring.base import Answer, AnswerScorer, Score, register_scorer


@register_scorer("math")
class MathScorer(AnswerScorer):
    """1 where the answer's final expression equals the reference (a number or LaTeX).

    The expression is the last box, else the last formula or number of the text; ``boxed_only`` takes boxes alone.
    """

    def __init__(self, *, boxed_only: bool = False) -> None:
        try:
            import math_verify
        except ImportError as error:
            raise EnvironmentProblem("the math scorer needs `pip install math-verify`") from error
        logging.getLogger("math_verify").setLevel(logging.ERROR)  # else it warns that its own time-outs are off
        self._verify = math_verify.verify
        self._parse = math_verify.parse
        self._forms = [math_verify.LatexExtractionConfig(), math_verify.ExprExtractionConfig()]
        self._boxed_only = boxed_only
        self._reference = lru_cache(maxsize=4096)(self._parse_reference)

    def score(self, answer: Answer, item: Item) -> float | Score:
        """1.0 or 0.0; a reference that cannot be parsed is an error, an answer without an expression is wrong."""
        reference = self._reference(str(item.answer))
        if not reference:
            return Score.failed("error", "UnparsableReference", f"item {item.id}: {item.answer!r}")
        boxed = last_boxed(answer.text)
        if boxed is None and self._boxed_only:
            return 0.0
        # Of several boxes math-verify makes a set; by convention the last one is the answer.
        text = answer.text if boxed is None else f"\\boxed{{{boxed}}}"
        found = self._parse(text, self._forms, parsing_timeout=None, raise_on_error=True)
        return float(bool(found) and self._verify(reference, found, timeout_seconds=None, raise_on_error=True))

    def _parse_reference(self, text: str) -> list[Any]:
        marked = text if "boxed{" in text else f"\\boxed{{{text}}}"
        parsed: list[Any] = self._parse(marked, self._forms, parsing_timeout=None, raise_on_error=True)
        return parsed
