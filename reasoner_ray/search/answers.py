"""What answer a solution gives, and which answers are the same, for voting. Nothing here knows the right answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from reasoner_ray.registry import load_dotted
from reasoner_ray.scoring.answers import final_answer, group_answers

if TYPE_CHECKING:
    from reasoner_ray.data.tasks import Task
    from reasoner_ray.search.settings import SameAnswers

ReadAnswer = Callable[[str], str]
"""A solution's text -> its answer, '' where it has none."""
GroupAnswers = Callable[[Sequence[str]], list[int]]
"""Answers -> numbers, counted in the order they come; equal numbers for answers that mean the same."""
_MATHEMATICAL = ("math", "numeric")  # scorers for which 1/2 and 0.5 are the same answer


def answer_reader(name: str, task: Task) -> ReadAnswer:
    """``auto``: the task's ``read_answer`` where it has one, else ``final_answer``; else a user's function. Raises ``ConfigError``."""
    if name != "auto":
        read: ReadAnswer = load_dotted(name, "search.read_answer")
        return read
    return getattr(task, "read_answer", final_answer)


def answer_grouper(how: SameAnswers, task: Task) -> GroupAnswers:
    """``auto``: by mathematical equality where the task's own scorer judges so, else by their texts."""
    mathematical = how == "math" or (how == "auto" and task.default_scorer in _MATHEMATICAL)
    return partial(group_answers, mathematical=mathematical)
