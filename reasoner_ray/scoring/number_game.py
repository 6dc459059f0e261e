"""The exact verifier of the games with numbers."""

from __future__ import annotations

import re

from reasoner_ray.data.math import last_boxed
from reasoner_ray.data.number_games import is_solution
from reasoner_ray.data.tasks import Item
from reasoner_ray.scoring.base import Answer, AnswerScorer, register_scorer

_ANSWER_IS = re.compile(r"answer is:?[ \t]*([^\n]*)", re.IGNORECASE)


@register_scorer("number_game")
class NumberGameScorer(AnswerScorer):
    """1 where the answer's expression makes ``info["target"]`` of all of ``info["numbers"]``, each used once; exact.

    The expression is the last box, else what follows the last ``answer is``, else the last line. It may end with ``= TARGET``.
    """

    def score(self, answer: Answer, item: Item) -> float:
        """1.0 or 0.0; an item of another task is an error (``KeyError``)."""
        numbers, target = item.info["numbers"], item.info["target"]
        return float(is_solution(final_expression(answer.text), numbers, target))


def final_expression(text: str) -> str:
    """What an answer gives as its expression; empty where it says nothing."""
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed.replace("\\times", "*").replace("\\cdot", "*").replace("\\div", "/")
    said = _ANSWER_IS.findall(text)
    lines = text.strip().splitlines()
    last = said[-1] if said else lines[-1] if lines else ""
    return last.strip().strip("$").removesuffix(".").strip()
