"""The exact verifier of the games with numbers."""

from __future__ import annotations

from reasoner_ray.data.number_games import is_solution
from reasoner_ray.data.tasks import Item
from reasoner_ray.scoring.answers import final_answer
from reasoner_ray.scoring.base import Answer, AnswerScorer, register_scorer


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
    """What an answer gives as its expression, LaTeX's signs as plain ones; empty where it says nothing."""
    said = final_answer(text).strip("$").strip()
    return said.replace("\\times", "*").replace("\\cdot", "*").replace("\\div", "/")
