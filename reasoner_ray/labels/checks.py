"""A task's check of steps, in a process of its own that may be killed at any moment."""

from __future__ import annotations

import json
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from reasoner_ray import child_process
from reasoner_ray.child_process import ChildProcess
from reasoner_ray.config import TaskConfig
from reasoner_ray.data.tasks import get_task
from reasoner_ray.scoring.calls import guarded


class CheckProcess(ChildProcess):
    """The parent's side: ``request((item, lines))`` gives whether each line is right."""

    def __init__(self, task: TaskConfig, seed: int) -> None:
        """Start the process and wait until it is ready. Raises ``ReasonerError`` where the task cannot be built."""
        super().__init__("reasoner_ray.labels.checks:serve", [task.model_dump_json(), json.dumps(seed)], "check of steps")
        self.wait_or_kill("check of steps")


def serve(pipe: Connection, task: str, seed: str) -> None:
    """The child's side."""

    def build() -> Callable[[Any], Any]:
        task_with_check: Any = get_task(TaskConfig.model_validate_json(task), json.loads(seed))
        return guarded(lambda request: [bool(right) for right in task_with_check.check_steps(*request)])

    child_process.serve(pipe, build)
