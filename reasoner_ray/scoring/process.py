"""A grader process: judges answers one at a time, in a process of its own that may be killed at any moment.

sympy can loop for ever, C code can crash, a user's function can call ``os._exit``: none of it may reach the scorer
actor.
"""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from reasoner_ray import child_process
from reasoner_ray.child_process import ChildDied, ChildProcess
from reasoner_ray.scoring.base import Answer, CompositeScorer, Score, Term

if TYPE_CHECKING:
    from reasoner_ray.data.tasks import Item

MEMORY_BYTES = 4 << 30
"""Data memory of a grader process: an expression that asks for more raises ``MemoryError`` and harms nobody else."""

GraderDied = ChildDied


class GraderProcess(ChildProcess):
    """The parent's side. Not thread-safe: one thread owns it, and must live as long as it does."""

    def __init__(self, terms: Sequence[Term]) -> None:
        """Start the process and wait until it is ready. Raises ``ReasonerError`` where its scorers cannot be built."""
        super().__init__("reasoner_ray.scoring.process:serve", [json.dumps([asdict(term) for term in terms])], "grader")
        self.wait_or_kill("grader")

    def grade(self, answer: Answer, item: Item, timeout_s: float) -> Score:
        """The answer's score. Raises ``TimeoutError`` or ``GraderDied``; the process is of no use after either."""
        score: Score = self.request((answer, item), timeout_s)
        return score


def serve(pipe: Connection, terms: str) -> None:
    """The child's side: build the scorers, then judge answers until the pipe closes."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))

    def build() -> Callable[[tuple[Answer, Item]], Score]:
        composite = CompositeScorer([Term(**term) for term in json.loads(terms)])
        return lambda request: composite.score(*request)

    child_process.serve(pipe, build)
