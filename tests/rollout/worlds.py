"""Small text environments, good and bad, for the tests of agents."""

from __future__ import annotations

import os
import time
from typing import Any

import gymnasium
from gymnasium import spaces


class Corridor(gymnasium.Env[str, str]):
    """Walk right to the end of a corridor of three rooms: 1 at the end; bad manners on request.

    The next ``failures_left`` steps (over all instances) go wrong by ``how``; "die" and "hang", for a process of its own, always do.
    """

    failures_left = 0

    def __init__(self, how: str = "", limit: int = 6, lists: bool | list[str] = True) -> None:
        self.observation_space, self.action_space = spaces.Text(200), spaces.Text(50)
        self.how, self.limit, self.lists = how, limit, lists

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self.place, self.time = 0, 0
        return self._text(), self._info()

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self.time += 1
        if self.how == "die":
            os._exit(3)
        if self.how == "hang":
            time.sleep(3600)
        if self.how and Corridor.failures_left > 0:
            Corridor.failures_left -= 1
            if self.how == "raise":
                raise OSError("the door is shut")
            if self.how == "nan":
                return self._text(), float("nan"), False, False, self._info()
        known = action.strip() in ("go left", "go right")
        self.place = max(0, self.place + {"go right": 1, "go left": -1}.get(action.strip(), 0))
        done = self.place == 2
        info = {**self._info(), "invalid": not known, "success": done}
        return self._text(), float(done), done, self.time >= self.limit and not done, info

    def _text(self) -> str:
        return f"room {self.place}, you"

    def _info(self) -> dict[str, Any]:
        listed = self.lists if isinstance(self.lists, list) else ["go left", "go right"]
        return {"success": False, "invalid": False, **({"admissible": listed} if listed and self.lists else {})}
