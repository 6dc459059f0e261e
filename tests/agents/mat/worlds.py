"""A world for the tests in which everything that can differ between agents does, and which fails when it is told to."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces
from pettingzoo import ParallelEnv


class Island(ParallelEnv):
    """Agent a chooses under a mask, b chooses and moves, c moves. Each step earns every living agent 1.

    What an agent sees is the time, and the episode's seed where there is room for it; a seed's observations tell episodes apart.
    """

    metadata = {"name": "island"}  # noqa: RUF012
    possible_agents = ["a", "b", "c"]  # noqa: RUF012

    def __init__(self, length: int = 5, dies_at: int | None = None, solved: bool = False, spoils: str = "") -> None:
        """``dies_at`` is when c dies; ``spoils`` what is wrong after the first step."""
        self._length, self._dies_at, self._solved, self._spoils = length, dies_at, solved, spoils
        self.agents: list[str] = []
        self.told: dict[str, Any] = {}
        self._sizes = {"a": 2, "b": 1, "c": 3}
        seen = {agent: spaces.Box(-10.0, 1e10, (n,), np.float32) for agent, n in self._sizes.items()}
        masked = spaces.Dict({"observation": seen["a"], "action_mask": spaces.Box(0, 1, (3,), np.int8)})
        self._seen: dict[str, Any] = {**seen, "a": masked}
        both = spaces.Tuple((spaces.Discrete(2, start=10), spaces.Box(0.0, 10.0, (1,), np.float32)))
        self._done: dict[str, Any] = {"a": spaces.Discrete(3), "b": both, "c": spaces.Box(-2.0, 2.0, (2,), np.float32)}

    def observation_space(self, agent: str) -> Any:
        return self._seen[agent]

    def action_space(self, agent: str) -> Any:
        return self._done[agent]

    def reset(self, seed: int | None = None, options: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
        if self._spoils == "reset":
            raise IndexError("the tide is out")
        self.agents, self._time = list(self.possible_agents), 0
        self._number = float(np.random.default_rng(seed).integers(2, 1000))
        return self._observe(self.agents), {agent: {} for agent in self.agents}

    def step(self, actions: dict[str, Any]) -> Any:
        if self._spoils == "step":
            raise IndexError("the tide is out")
        self._time += 1
        self.told = actions
        agents, over = list(self.agents), self._time >= self._length
        dead = {agent: (over and self._solved) or (agent == "c" and self._time == self._dies_at) for agent in agents}
        cut = {agent: over and not dead[agent] for agent in agents}
        self.agents = [agent for agent in agents if not dead[agent] and not cut[agent]]
        earned = {agent: float("nan") if self._spoils == "reward" and agent == "b" else 1.0 for agent in agents}
        return self._observe(agents), earned, dead, cut, {agent: {} for agent in agents}

    def _observe(self, agents: list[str]) -> dict[str, Any]:
        late = self._time > 0
        seen = {agent: np.full(self._sizes[agent], self._time, np.float32) for agent in agents}
        if "a" in seen:
            seen["a"][1] = np.nan if late and self._spoils == "observation" else self._number
            masks = {"mask": [0, 0, 0], "long mask": [1, 0, 1, 1]} if late else {}
            mask = np.array(masks.get(self._spoils, [1, 0, 1]), np.int8)
            seen["a"] = {"observation": seen["a"], "action_mask": mask}
        if late and self._spoils == "shape" and "c" in seen:
            seen["c"] = np.zeros(4, np.float32)
        return seen


def make_island(*, render_mode: str | None = None, length: int = 5, spoils: str = "", dies_at: int | None = None) -> Island:
    """For ``multi_agent.name``."""
    return Island(length=length, spoils=spoils, dies_at=dies_at)


class Crowd(ParallelEnv):
    """Teams of any size: each agent sees its number and, n - 1 times, the size of the team. Its steps earn it 1 / n."""

    metadata = {"name": "crowd"}  # noqa: RUF012

    def __init__(self, n: int, length: int) -> None:
        self.possible_agents = [f"agent_{i}" for i in range(n)]
        self.agents: list[str] = []
        self._n, self._length = n, length

    def observation_space(self, agent: str) -> Any:
        return spaces.Box(0.0, 10.0, (self._n,), np.float32)

    def action_space(self, agent: str) -> Any:
        return spaces.Discrete(3)

    def reset(self, seed: int | None = None, options: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
        self.agents, self._time = list(self.possible_agents), 0
        return self._observe(), {agent: {} for agent in self.agents}

    def step(self, actions: dict[str, Any]) -> Any:
        self._time += 1
        agents, over = self.agents, self._time >= self._length
        seen = self._observe()
        self.agents = [] if over else agents
        every = dict.fromkeys
        return seen, every(agents, 1 / self._n), every(agents, False), every(agents, over), {agent: {} for agent in agents}

    def render(self) -> np.ndarray:
        return np.full((6, 8, 3), 40 * self._time, np.uint8)

    def _observe(self) -> dict[str, Any]:
        return {agent: np.array([i] + [self._n] * (self._n - 1), np.float32) for i, agent in enumerate(self.agents)}


def make_crowd(*, render_mode: str | None = None, n: int = 2, length: int = 5) -> Crowd:
    """For ``multi_agent.name``."""
    return Crowd(n, length)
