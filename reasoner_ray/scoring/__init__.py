"""Scorers and the processes that run them. Importing this package registers the built-in scorers."""

from reasoner_ray.scoring import deduction, exact_match, format, math, number_game, reasoning_gym
from reasoner_ray.scoring.base import Answer, AnswerScorer, CompositeScorer, Score, Term, register_scorer

__all__ = [
    "Answer",
    "AnswerScorer",
    "CompositeScorer",
    "Score",
    "Term",
    "deduction",
    "exact_match",
    "format",
    "math",
    "number_game",
    "reasoning_gym",
    "register_scorer",
]
