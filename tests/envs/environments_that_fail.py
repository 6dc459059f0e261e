"""Environments that misbehave on demand: what the action says is what happens. Named by dotted path from the tests."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

Info = dict[str, Any]

ANSWERS: dict[str, tuple[Any, ...]] = {
    "nan": ("o", float("nan"), False, False, {}),
    "infinite": ("o", np.float32("inf"), False, False, {}),
    "huge": ("o", 10**400, False, False, {}),
    "reward as text": ("o", "1", False, False, {}),
    "observation as number": (5, 1.0, False, False, {}),
    "observation as array": (np.zeros(3), 1.0, False, False, {}),
    "half a character": ("\ud800", 1.0, False, False, {}),
    "terminated as text": ("o", 1.0, "no", False, {}),
    "truncated as None": ("o", 1.0, False, None, {}),
    "four": ("o", 1.0, False, {}),
    "info as list": ("o", 1.0, False, False, []),
    "actions as text": ("o", 1.0, False, False, {"admissible": "go"}),
    "actions as numbers": ("o", 1.0, False, False, {"admissible": [1, 2]}),
    "blank action": ("o", 1.0, False, False, {"admissible": ["go", " "]}),
    "duration below 0": ("o", 1.0, False, False, {"admissible": ["go", "stay"], "steps_taken": -1}),
    "half a step": ("o", 1.0, False, False, {"admissible": ["go", "stay"], "steps_taken": 0.5}),
    "action twice": ("o", 1.0, False, False, {"admissible": ["go", "stay", "go"]}),
    "success as number": ("o", 1.0, False, False, {"success": 3}),
    "error type as number": ("o", 1.0, False, False, {"error_type": 7}),
    "metrics as list": ("o", 1.0, False, False, {"metrics": [1]}),
}


class Obey(gymnasium.Env[str, str]):
    """Ends after ``length`` actions that are no disaster, with the seed and its process's id in the observation."""

    def __init__(self, length: int = 3, on_make: str = "", on_reset: str = "", file: str = "") -> None:
        self.length, self.on_reset, self.file = length, on_reset, file
        self.turn, self.seed = 0, -1
        self._disaster(on_make)

    def reset(self, *, seed: int | None = None, options: Info | None = None) -> tuple[str, Info]:
        super().reset(seed=seed)
        self.turn, self.seed = 0, seed if seed is not None else -1
        self._disaster(self.on_reset)
        return self._observation(), self._info()

    def step(self, action: str) -> Any:
        self._disaster(action)
        if action in ANSWERS:
            return ANSWERS[action]
        self.turn += 1
        return self._observation(), np.float32(0.5), np.bool_(self.turn == self.length), False, self._info()

    def close(self) -> None:
        if self.file:
            Path(self.file).write_text("closed")

    def _observation(self) -> str:
        return f"{self.seed} {self.turn} {os.getpid()}"

    def _info(self) -> Info:
        return {"admissible": ["go", "stay"], "success": self.turn == self.length, "metrics": {"turn": self.turn, "nan": float("nan")}}

    def _disaster(self, what: str) -> None:
        if what.startswith("once "):  # in one process of all that read this file
            try:
                os.close(os.open(self.file, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return
            what = what.removeprefix("once ")
        if what in DISASTERS:
            DISASTERS[what]()
        if what == "hang with children":
            sleeper = [sys.executable, "-c", "import time; time.sleep(1000)"]
            child = subprocess.Popen(sleeper)
            forked = os.fork()
            if not forked:
                time.sleep(1000)
            aside = Path(f"{self.file}.new")
            aside.write_text(f"{os.getpid()} {child.pid} {forked}")
            aside.rename(self.file)
            time.sleep(1000)
        if what == "exit with a child":
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
            Path(self.file).write_text(str(child.pid))
            os._exit(0)


def _raise() -> None:
    raise KeyError("no such\nthing")


def _raise_unprintable() -> None:
    class Unprintable(Exception):
        def __str__(self) -> str:
            raise ValueError

    raise Unprintable


def _print_gigabytes() -> None:
    line = b"x" * (1 << 24)
    for _ in range(128):
        os.write(1, line)
        os.write(2, line)


def _spin() -> None:
    while True:
        pass


DISASTERS: dict[str, Callable[[], object]] = {
    "raise": _raise,
    "raise unprintable": _raise_unprintable,
    "sys.exit": lambda: sys.exit(4),
    "os._exit": lambda: os._exit(3),
    "SIGKILL": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "segfault": lambda: ctypes.string_at(0),
    "close everything": lambda: os.closerange(3, 1000),
    "hang in python": _spin,
    "hang in C": lambda: 10 ** (10**9) % 7,
    "print gigabytes": _print_gigabytes,
}


def nothing() -> None:
    """No environment at all."""


class Slow(Obey):
    """Says how long a step may take."""

    longest_step_s = 45.0
