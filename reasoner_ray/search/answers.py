"""What answer a solution gives, and which answers are the same, for voting. Nothing here knows the right answer.

What votes is what is graded: answers are read and compared as the job's scorer does it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from reasoner_ray.registry import load_dotted
from reasoner_ray.scoring.answers import final_answer, final_value, group_answers
from reasoner_ray.scoring.exact_match import ExactMatch, Numeric
from reasoner_ray.scoring.number_game import final_expression
from reasoner_ray.scoring.reasoning_gym import extract_answer

if TYPE_CHECKING:
    from reasoner_ray.config import ScorerSpec
    from reasoner_ray.data.tasks import Task
    from reasoner_ray.search.settings import SameAnswers

ReadAnswer = Callable[[str], str]
"""A solution's text -> its answer, '' where it has none."""
GroupAnswers = Callable[[Sequence[str]], list[int]]
"""Answers -> numbers, counted in the order they come; equal numbers for answers that mean the same."""
_MATHEMATICAL = ("math", "numeric")  # scorers for which 1/2 and 0.5 are the same answer
_NO_ANSWER = ("format", "overlong", "environment")  # scorers that do not look at an answer
_READERS: dict[str, Callable[[dict[str, Any]], ReadAnswer]] = {
    "math": lambda _: final_value,
    "exact_match": lambda args: ExactMatch(**args).read_answer,
    "numeric": lambda args: Numeric(**args).read_answer,
    "number_game": lambda _: final_expression,
    "reasoning_gym": lambda args: lambda text: extract_answer(text, args.get("extract", "tag")) or "",
}
"""By the scorer and its arguments, where what it judges is not ``final_answer``."""


def judge_of(task: Task, scorers: Sequence[ScorerSpec]) -> tuple[str, dict[str, Any]]:
    """Name and arguments of the first of a job's scorers that judges answers; the task's own where none is named."""
    for spec in scorers:
        if spec.name not in ("task", *_NO_ANSWER):
            return spec.name, spec.args
        if spec.name == "task":
            return task.default_scorer, spec.args
    return task.default_scorer, {}


def answer_reader(name: str, task: Task, scorers: Sequence[ScorerSpec] = ()) -> ReadAnswer:
    """How answers are read. Raises ``ConfigError``.

    ``auto``: what the job's scorer judges, by the task's ``read_answer`` where it has one, else by the scorer, else ``final_answer``;
    any other name: a user's function.
    """
    if name != "auto":
        read: ReadAnswer = load_dotted(name, "search.read_answer")
        return read
    judge, args = judge_of(task, scorers)
    if hasattr(task, "read_answer") and not args:  # arguments may have the scorer read otherwise than the task does
        own: ReadAnswer = task.read_answer
        return own
    return _READERS[judge](args) if judge in _READERS else getattr(task, "read_answer", final_answer)


def answer_grouper(how: SameAnswers, task: Task, scorers: Sequence[ScorerSpec] = ()) -> GroupAnswers:
    """``auto``: by mathematical equality where the job's scorer judges so, else by their texts."""
    mathematical = how == "math" or (how == "auto" and judge_of(task, scorers)[0] in _MATHEMATICAL)
    return partial(group_answers, mathematical=mathematical)
