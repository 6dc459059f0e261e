"""Key-to-Door: a key in the first room opens the door in the third, and nothing in between tells whether it was taken.

After the description in Mesnard et al. (2021, arXiv 2011.09464) and the Decision Transformer's paper (arXiv 2106.01345, section 5.4):
three rooms one after the other, the middle one empty, and a reward of 1 at the door for those who took the key.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

MOVES = np.array([(1, 0), (-1, 0), (0, 1), (0, -1)])
"""What actions 0 to 3 add to (x, y); walls hold the agent where it is."""
KEY, EMPTY, DOOR = range(3)
ROOMS = 3
GREY, AGENT, COLOURS = (70, 70, 70), (230, 230, 230), ((240, 200, 40), (70, 70, 70), (90, 180, 90))
PIXELS = 24


class KeyToDoor(gymnasium.Env[np.ndarray, np.int64]):
    """Three rooms of ``size`` x ``size`` cells, ``steps`` steps in each; the agent, the key and the door begin in random cells.

    A step into the key's cell takes the key; a step into the door's cell ends the episode, with reward 1 for an agent that has
    the key, else 0. The episode also ends after ``steps`` steps in the last room. With the defaults every start can succeed, and
    random moves do so in 3.15 % of the episodes.

    Observations, float32 [8]: the room one-hot, the agent's (x, y) in [0, 1], whether the room's key or door is there to be seen,
    and where it is from the agent, in [-1, 1]. A key that was taken is gone, which is all that the later rooms do not show.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 4}  # noqa: RUF012 - Gymnasium's own form

    def __init__(self, size: int = 5, steps: int = 8, render_mode: str | None = None) -> None:
        if size < 2 or steps < 1:
            raise ValueError(f"size={size} and steps={steps}: a room has at least 2 x 2 cells and 1 step")
        self.size, self.steps, self.render_mode = size, steps, render_mode
        low = np.array([0, 0, 0, 0, 0, 0, -1, -1], np.float32)
        self.observation_space = spaces.Box(low, np.ones(8, np.float32), dtype=np.float32)
        self.action_space = spaces.Discrete(4)
        self._time, self.has_key = 0, False
        self._place: np.ndarray = np.zeros(2, np.int64)
        self._object: np.ndarray = np.zeros(2, np.int64)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """A new episode in the first room."""
        super().reset(seed=seed)
        self._time, self.has_key = 0, False
        self._enter()
        return self._observe(), {}

    def step(self, action: np.int64) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """One move. ``info["success"]`` says at the end whether the door was opened."""
        self._place = np.clip(self._place + MOVES[int(action)], 0, self.size - 1)
        there = bool((self._place == self._object).all())
        opened = False
        if there and self.room == KEY:
            self.has_key = True
        if there and self.room == DOOR:
            opened = self.has_key
        terminated = there and self.room == DOOR
        self._time += 1
        if not terminated and self._time == ROOMS * self.steps:
            terminated = True
        elif not terminated and self._time % self.steps == 0:
            self._enter()
        info = {"success": opened} if terminated else {}
        return self._observe(), float(opened), terminated, False, info

    @property
    def room(self) -> int:
        """KEY, EMPTY or DOOR."""
        return min(self._time // self.steps, DOOR)

    @property
    def offset(self) -> np.ndarray | None:
        """(x, y) from the agent to the key or door that can be seen; None where there is none."""
        seen = self.room == DOOR or (self.room == KEY and not self.has_key)
        return self._object - self._place if seen else None

    def render(self) -> Any:
        """The room the agent is in, uint8 [pixels, pixels, 3]; None without ``render_mode``."""
        if self.render_mode != "rgb_array":
            return None
        cells = np.full((self.size, self.size, 3), GREY, np.uint8)
        if self.offset is not None:
            cells[tuple(self._object)] = COLOURS[self.room]
        cells[tuple(self._place)] = AGENT
        return cells.repeat(PIXELS, 0).repeat(PIXELS, 1)

    def _enter(self) -> None:
        """Another room: agent and object in two different cells of it."""
        start, goal = self.np_random.choice(self.size**2, 2, replace=False)
        self._place = np.array(divmod(int(start), self.size))
        self._object = np.array(divmod(int(goal), self.size))

    def _observe(self) -> np.ndarray:
        offset, reach = self.offset, self.size - 1
        seen = [0.0, 0.0, 0.0] if offset is None else [1.0, *(offset / reach)]
        return np.array([*np.eye(ROOMS)[self.room], *(self._place / reach), *seen], np.float32)


def expert(observation: np.ndarray, rng: np.random.Generator) -> np.int64:
    """The best action: towards the key or door, along a random one of the axes that are left; anything in the empty room."""
    towards = [move for move, (x, y) in enumerate(MOVES) if x * observation[6] + y * observation[7] > 0]
    return np.int64(rng.choice(towards) if towards else rng.integers(len(MOVES)))
