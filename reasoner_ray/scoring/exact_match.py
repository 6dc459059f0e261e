"""Equality of texts, and of the numbers in them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal

from reasoner_ray.data.tasks import Item
from reasoner_ray.errors import ConfigError
from reasoner_ray.scoring.base import Answer, AnswerScorer, register_scorer

_NUMBER = re.compile(r"[-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,4}(?!\d))?")


@register_scorer("exact_match")
class ExactMatch(AnswerScorer):
    """1 where answer and reference are the same text, white space around them and a ``stop`` string at the end aside."""

    def __init__(self, *, stop: Sequence[str] = (), ignore_case: bool = False) -> None:
        self._stop, self._ignore_case = tuple(stop), ignore_case

    def score(self, answer: Answer, item: Item) -> float:
        """1.0 or 0.0."""
        return float(self.read_answer(answer.text) == self.read_answer(str(item.answer)))

    def read_answer(self, text: str) -> str:
        """What is compared, and what votes among solutions."""
        text = text.strip()
        for stop in self._stop:
            text = text.removesuffix(stop).strip()
        return text.casefold() if self._ignore_case else text


@register_scorer("numeric")
class Numeric(AnswerScorer):
    """1 where the ``last`` (or ``first``) number of the answer equals the reference within ``tolerance``, relative to it."""

    def __init__(self, *, which: str = "last", tolerance: float = 0.0) -> None:
        if which not in ("first", "last"):
            raise ConfigError(f"scoring.scorers.numeric.args.which: must be first or last (got {which!r})")
        self._place, self._tolerance = (-1 if which == "last" else 0), Decimal(str(tolerance))

    def score(self, answer: Answer, item: Item) -> float:
        """1.0 or 0.0; an answer without a number is wrong, a reference without one an error (``ValueError``)."""
        reference = numbers_in(str(item.answer))
        if not reference:
            raise ValueError(f"the reference answer {item.answer!r} of item {item.id} is not a number")
        found = numbers_in(answer.text)
        if not found:
            return 0.0
        difference = abs(found[self._place] - reference[-1])
        return float(difference <= self._tolerance * abs(reference[-1]))

    def read_answer(self, text: str) -> str:
        """The number that is judged, which votes among solutions; '' for none."""
        found = numbers_in(text)
        return str(found[self._place]) if found else ""


def numbers_in(text: str) -> list[Decimal]:
    """Every decimal number in ``text``, in order; commas may separate thousands."""
    found = (m.group().replace(",", "") for m in _NUMBER.finditer(text))
    return [Decimal(n) for n in found]
