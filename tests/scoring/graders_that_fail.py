"""Scorers that misbehave on demand: what the answer says is what happens. Named by dotted path from the tests."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from pathlib import Path

from reasoner_ray.data.tasks import Item
from reasoner_ray.scoring.base import Answer, AnswerScorer, Score


def tell(item: Item, *pids: int) -> None:
    """Write process ids to the item's file, all at once."""
    file = Path(item.info["file"])
    aside = file.with_suffix(".new")
    aside.write_text(" ".join(map(str, pids)))
    aside.rename(file)


class NeverBuilt(AnswerScorer):
    """A user's class that refuses its arguments when it is built."""

    def __init__(self, *, depth: int) -> None:
        if depth < 1:
            raise ValueError("depth must be positive")

    def score(self, answer: Answer, item: Item) -> float:
        return 1.0


def obey(answer: str, item: Item, *, good: float = 1.0) -> float | Score:
    """1.0 (or ``good``) unless the answer is the name of a disaster."""
    match answer:
        case "raise":
            raise KeyError("no such thing")
        case "exit":
            os._exit(3)
        case "sys.exit":
            sys.exit(4)
        case "segfault":
            ctypes.string_at(0)
        case "memory":
            return float(len(bytes(6 << 30)))
        case "hang in python":
            while True:
                pass
        case "hang in C":
            return float(10 ** (10**9) % 7)
        case "tell and hang":
            tell(item, os.getpid())
            time.sleep(1000)
        case "hang with a child":
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
            tell(item, os.getpid(), child.pid)
            time.sleep(1000)
        case "nan":
            return float("nan")
        case "text":
            return "five"  # type: ignore[return-value]
        case "refuse":
            return Score.failed("error", "NotMyField", "I do not judge this")
    return good
