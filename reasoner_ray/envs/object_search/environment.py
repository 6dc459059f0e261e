"""``reasoner_ray/ObjectSearch-v0``: an unknown number of objects in four rooms, on MiniGrid. Nothing says when all are found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from reasoner_ray.envs.object_search.settings import ObjectSearchConfig
from reasoner_ray.errors import EnvironmentProblem
from reasoner_ray.section import given_section
from reasoner_ray.seeds import derived_seeds

INSTALL = "pip install minigrid==3.2.0"
try:
    from minigrid.core.grid import Grid
    from minigrid.core.mission import MissionSpace
    from minigrid.core.world_object import Ball, Wall
    from minigrid.minigrid_env import MiniGridEnv
except ImportError as error:
    raise EnvironmentProblem(f"ObjectSearch needs MiniGrid, which cannot be imported ({error}): {INSTALL}") from error

MOVES = ("turn left", "turn right", "forward")
DIRECTIONS = 4
FIRST = 3
"""Entries of an observation before those of the cells: column, row, direction."""


class Hidden(Ball):
    """An object that does not stand in the way: bumping into one would tell where it is."""

    def can_overlap(self) -> bool:
        """It lies flat."""
        return True


@dataclass(frozen=True, slots=True)
class Floor:
    """What is known of the rooms. A pose is a free cell and a direction: 4 cell + direction."""

    cells: np.ndarray  # int64 [F, 2]; column and row of the free cells
    index: np.ndarray  # int64 [size, size]; the free cell there, -1 for a wall
    moves: np.ndarray  # int64 [4 F, 3]; the pose after each of MOVES
    sees: np.ndarray  # bool [4 F, F]; cells in sight
    far: np.ndarray  # int64 [4 F, F]; fewest moves until a cell is in sight


@lru_cache(maxsize=8)
def floor_of(size: int, view: int) -> Floor:
    """The rooms of grids of ``size`` cells along a side, seen ``view`` cells ahead."""
    walker = ObjectSearch(ObjectSearchConfig(size=size, view=view))
    walker.grid = rooms(size)
    free = np.array([[walker.grid.get(i, j) is None for j in range(size)] for i in range(size)])
    cells = np.argwhere(free)
    index = np.full((size, size), -1)
    index[free] = np.arange(len(cells))
    poses = len(cells) * DIRECTIONS
    moves, sees = np.zeros((poses, len(MOVES)), dtype=np.int64), np.zeros((poses, len(cells)), dtype=bool)
    for pose in range(poses):
        here, walker.agent_dir = pose // DIRECTIONS, pose % DIRECTIONS
        walker.agent_pos = tuple(cells[here].tolist())
        ahead = index[tuple(walker.front_pos)]
        turned = [here * DIRECTIONS + (walker.agent_dir + by) % DIRECTIONS for by in (-1, 1)]
        moves[pose] = [*turned, pose if ahead < 0 else ahead * DIRECTIONS + walker.agent_dir]
        _, visible = walker.gen_obs_grid()
        for cell, place in enumerate(cells):
            at = walker.relative_coords(*place)
            sees[pose, cell] = at is not None and visible[int(at[0]), int(at[1])]
    far = np.where(sees, 0, poses)
    while True:
        nearer = np.minimum(far, far[moves].min(axis=1) + 1)
        if np.array_equal(nearer, far):
            return Floor(cells, index, moves, sees, far)
        far = nearer


def rooms(size: int) -> Any:
    """A MiniGrid ``Grid`` of four rooms, without objects."""
    grid, middle = Grid(size, size), size // 2
    grid.wall_rect(0, 0, size, size)
    for k in range(1, size - 1):
        if k not in (middle // 2, (middle + size) // 2):  # a gap in each inner wall
            grid.set(middle, k, Wall())
            grid.set(k, middle, Wall())
    return grid


class ObjectSearch(MiniGridEnv):
    """Find all objects, of which there may be none. An object in sight is noticed with probability ``detection``, and then found.

    Observation: float32 [3 + 2 F] for F free cells (``Floor.cells``): column, row, direction (0 to 3: east, south, west, north), which
    cells are in sight, and in which an object has just been found. Action: one of ``MOVES``. The reward is -1 a step; the episode
    never terminates and is truncated after ``max_steps``. ``info`` has the truth, for evaluation: ``left``, objects not found yet.
    """

    def __init__(self, config: ObjectSearchConfig | dict[str, Any] | None = None, render_mode: str | None = None) -> None:
        """Raises ``ConfigError``."""
        self.config = given_section(ObjectSearchConfig, config, "ObjectSearch")
        super().__init__(
            mission_space=MissionSpace(mission_func=lambda: "find all objects"),
            grid_size=self.config.size,
            max_steps=self.config.max_steps,
            agent_view_size=self.config.view,
            render_mode=render_mode,
        )
        n = int(sum(rooms(self.config.size).get(i, j) is None for i in range(self.config.size) for j in range(self.config.size)))
        self._width = FIRST + 2 * n
        high = np.concatenate([[self.config.size, self.config.size, DIRECTIONS - 1], np.ones(2 * n)]).astype(np.float32)
        self.observation_space = spaces.Box(np.zeros_like(high), high, dtype=np.float32)
        self.action_space: spaces.Space[Any] = spaces.Discrete(len(MOVES))
        self.hidden: set[int] = set()
        """Cells of the objects that are not found yet."""
        self._found: list[int] = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin an episode: other objects, another start."""
        super().reset(seed=seed, options=options)
        self._look()
        return self.gen_obs(), {"left": len(self.hidden)}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Move, then look."""
        self._found = []
        _, _, _, truncated, _ = super().step(int(action))
        self._look()
        return self.gen_obs(), -1.0, False, truncated, {"left": len(self.hidden)}

    def gen_obs(self) -> np.ndarray:
        """What the agent knows of this moment."""
        shown = np.zeros(self._width, dtype=np.float32)
        shown[:FIRST] = *self.agent_pos, self.agent_dir
        seen, found = np.split(shown[FIRST:], 2)
        seen[self._floor.sees[self._pose]] = 1.0
        found[self._found] = 1.0
        return shown

    def _gen_grid(self, width: int, height: int) -> None:
        cells, config = self._floor.cells, self.config
        self.grid = rooms(config.size)
        number = int(self.np_random.integers(config.most + 1))
        self.hidden = set(self.np_random.choice(len(cells), size=number, replace=False).tolist())
        self._found = []
        for cell in self.hidden:
            self.put_obj(Hidden("yellow"), *cells[cell].tolist())
        self.agent_pos = tuple(cells[int(self.np_random.integers(len(cells)))].tolist())
        self.agent_dir = int(self.np_random.integers(DIRECTIONS))

    def _look(self) -> None:
        in_sight = [cell for cell in sorted(self.hidden) if self._floor.sees[self._pose, cell]]
        self._found = [cell for cell in in_sight if self.np_random.uniform() < self.config.detection]
        for cell in self._found:
            self.hidden.remove(cell)
            self.grid.set(*self._floor.cells[cell].tolist(), None)

    @property
    def _floor(self) -> Floor:
        return floor_of(self.config.size, self.config.view)

    @property
    def _pose(self) -> int:
        return int(self._floor.index[tuple(self.agent_pos)]) * DIRECTIONS + self.agent_dir


class ObjectSearchVector(SyncVectorEnv):
    """The same for many episodes at once; episode i of seeds s equals ``ObjectSearch`` with seed s[i]."""

    def __init__(self, num_envs: int = 1, config: ObjectSearchConfig | dict[str, Any] | None = None) -> None:
        """Raises ``ConfigError``."""
        super().__init__([lambda: ObjectSearch(config)] * num_envs, autoreset_mode=AutoresetMode.NEXT_STEP)

    def reset(  # type: ignore[override]
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin all episodes, or those of ``options["reset_mask"]``; an integer seed s gives them ``derived_seeds(s, E)``."""
        seeds = derived_seeds(seed, self.num_envs) if isinstance(seed, int) else seed
        return super().reset(seed=None if seeds is None else list(seeds), options=options)
