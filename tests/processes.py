"""Looking after processes that a test has started."""

from __future__ import annotations

import time
from collections.abc import Iterable

import psutil


def left_behind(processes: Iterable[psutil.Process], seconds: float = 20.0) -> list[psutil.Process]:
    """Those that still run after ``seconds``, which are then killed. A zombie has ended, though nobody may have asked for its exit code."""
    deadline, alive = time.monotonic() + seconds, list(processes)
    while (alive := [p for p in alive if _runs(p)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in alive:
        process.kill()
    return alive


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
