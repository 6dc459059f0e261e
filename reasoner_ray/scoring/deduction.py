"""The verifier of questions whose answer is true or false."""

from __future__ import annotations

import re

from reasoner_ray.data.deduction import proves
from reasoner_ray.data.tasks import Item
from reasoner_ray.scoring.base import Answer, AnswerScorer, register_scorer

_SAID = re.compile(r"answer is:?\s*\W{0,3}\b(true|false)\b", re.IGNORECASE)
_WORD = re.compile(r"\b(true|false)\b", re.IGNORECASE)


@register_scorer("deduction")
class DeductionScorer(AnswerScorer):
    """1 where the last ``answer is true`` (or ``false``) is the reference, else where the only such word of the last line is.

    With ``proof`` the lines before must prove it, too: half of all guesses are right.
    """

    def __init__(self, *, proof: bool = False) -> None:
        self._proof = proof

    def score(self, answer: Answer, item: Item) -> float:
        """1.0 or 0.0; a reference that is neither is an error (``ValueError``), and to ``proof`` another task's item (``KeyError``)."""
        if item.answer not in ("true", "false"):
            raise ValueError(f"the reference answer {item.answer!r} of item {item.id} is neither true nor false")
        if final_truth(answer.text) != item.answer:
            return 0.0
        if not self._proof:
            return 1.0
        asked = item.info["solution"].splitlines()[-2]
        return float(proves(answer.text.strip().splitlines(), item.info["context"], asked, item.answer == "true"))


def final_truth(text: str) -> str | None:
    """``true`` or ``false``; None where the text does not say."""
    said = _SAID.findall(text)
    if said:
        return str(said[-1]).lower()
    lines = text.strip().splitlines()
    words = {word.lower() for word in _WORD.findall(lines[-1])} if lines else set()
    return words.pop() if len(words) == 1 else None
