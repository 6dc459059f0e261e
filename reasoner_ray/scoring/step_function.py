"""A user's function that scores steps, in a process of its own that may be killed at any moment."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from multiprocessing.connection import Connection
from typing import Any

from reasoner_ray import child_process
from reasoner_ray.child_process import ChildProcess
from reasoner_ray.registry import load_dotted
from reasoner_ray.scoring.calls import CallPool, guarded


class StepFunctionProcess(ChildProcess):
    """The parent's side: ``request((prompt, steps))`` gives the list of scores, ``request(None)`` only shows that it is there."""

    def __init__(self, path: str, arguments: str) -> None:
        """Start the process and wait until it is ready. Raises ``ReasonerError`` where there is no function ``path``."""
        super().__init__("reasoner_ray.scoring.step_function:serve", [path, arguments], "step scorer")
        self.wait_or_kill("step scorer")


@lru_cache(maxsize=16)
def function_pool(path: str, arguments: str, processes: int, timeout_s: float) -> CallPool:
    """The processes that all scorers of this one share for the function ``path``; ``arguments`` are its keywords, as JSON."""
    return CallPool(lambda: StepFunctionProcess(path, arguments), processes=processes, timeout_s=timeout_s)


def serve(pipe: Connection, path: str, arguments: str) -> None:
    """The child's side."""

    def build() -> Callable[[Any], Any]:
        function, keywords = load_dotted(path, "search.scorer.args.path"), json.loads(arguments)
        return guarded(lambda request: request and [float(value) for value in function(*request, **keywords)])

    child_process.serve(pipe, build)
