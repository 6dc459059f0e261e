"""Scorers of the tests' lines. Imports little: a grader process that was killed starts anew."""

from __future__ import annotations

import time

from reasoner_ray.data.tasks import Item


def all_good(answer: str, item: Item) -> float:
    """1 where no line is wrong."""
    return float("no" not in answer)


def hang_on_bad(answer: str, item: Item) -> float:
    """Judges good answers alone."""
    while "no" in answer:
        time.sleep(1)
    return 1.0


def sometimes(answer: str, item: Item) -> float:
    """What a tiny random model writes is right now and then."""
    return float(sum(map(ord, answer)) % 3 == 0)
