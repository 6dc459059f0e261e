"""Functions that score steps, for the processes they run in: nothing heavy is imported here."""

from __future__ import annotations

import math
import os
import time

TARGET = "212"


def right_so_far(prompt: str, steps: list[str]) -> list[float]:
    """Share of the target that each step has got right, and no more once one was wrong."""
    scores, right = [], 0
    for i, step in enumerate(steps):
        right += right == i and step.strip() == TARGET[i]
        scores.append(right / len(TARGET))
    return scores


def all_alike(prompt: str, steps: list[str]) -> list[float]:
    return [0.5] * len(steps)


def last_digit(prompt: str, steps: list[str]) -> list[float]:
    """Steps are worth the digit they write."""
    return [float(step.strip()) / 10 for step in steps]


def one_score_too_few(prompt: str, steps: list[str]) -> list[float]:
    return [1.0] * (len(steps) - 1)


def not_a_number(prompt: str, steps: list[str]) -> list[float]:
    return [math.nan] * len(steps)


def raises(prompt: str, steps: list[str]) -> list[float]:
    raise OSError("no such file")


def first_digit(text: str) -> str:
    """The answer of a solution, none where it begins with 4."""
    return "" if text.startswith("4") else text[:1]


def lengths(prompt: str, steps: list[str], *, factor: float = 1.0) -> list[float]:
    return [factor * len(prompt)] + [factor * len(step) for step in steps[1:]]


def hangs_on(prompt: str, steps: list[str], *, word: str) -> list[float]:
    """Never answers for a solution with this word in it; dies for one with ``die``."""
    while any(word in step for step in steps):
        time.sleep(1)
    if any("die" in step for step in steps):
        os._exit(7)
    return [1.0] * len(steps)
