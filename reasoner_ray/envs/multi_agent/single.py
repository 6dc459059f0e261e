"""A single-agent Gymnasium environment as a team of one, so that a Multi-Agent Transformer learns it (PPO)."""

from __future__ import annotations

from typing import Any

import gymnasium
from pettingzoo import ParallelEnv


class SingleAgent(ParallelEnv):
    """The one agent is called ``agent``; an end by time and an end by success stay what they are."""

    metadata = {"name": "single"}  # noqa: RUF012 - PettingZoo's own form
    possible_agents = ["agent"]  # noqa: RUF012

    def __init__(self, env: gymnasium.Env[Any, Any], render_mode: str | None = None) -> None:
        self._env, self.render_mode = env, render_mode
        self.agents: list[str] = []

    def observation_space(self, agent: str) -> Any:
        """The environment's."""
        return self._env.observation_space

    def action_space(self, agent: str) -> Any:
        """The environment's."""
        return self._env.action_space

    def reset(self, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        """A new episode."""
        self.agents = list(self.possible_agents)
        observation, info = self._env.reset(seed=seed, options=options)
        return {"agent": observation}, {"agent": info}

    def step(self, actions: dict[str, Any]) -> tuple[dict[str, Any], dict[str, float], dict[str, bool], dict[str, bool], dict[str, Any]]:
        """One step."""
        observation, reward, terminated, truncated, info = self._env.step(actions["agent"])
        if terminated or truncated:
            self.agents = []
        cut = bool(truncated and not terminated)
        return {"agent": observation}, {"agent": float(reward)}, {"agent": bool(terminated)}, {"agent": cut}, {"agent": info}

    def render(self) -> Any:
        """The environment's picture."""
        return self._env.render()

    def close(self) -> None:
        """Close the environment."""
        self._env.close()
