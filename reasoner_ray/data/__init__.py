"""Tasks and data sets. Importing this package registers the built-in tasks."""

from reasoner_ray.data import arithmetic, countdown, deduction, environment, game24, gsm8k, math, questions, reasoning_gym
from reasoner_ray.data.tasks import DataOrder, Item, Task, check_lengths, get_task, register_task

__all__ = [
    "DataOrder",
    "Item",
    "Task",
    "arithmetic",
    "check_lengths",
    "countdown",
    "deduction",
    "environment",
    "game24",
    "get_task",
    "gsm8k",
    "math",
    "questions",
    "reasoning_gym",
    "register_task",
]
