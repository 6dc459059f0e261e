"""Gymnasium environments that take and give one entry an agent (level-based foraging, robotic warehouse) as a ``ParallelEnv``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
from pettingzoo import ParallelEnv


class TupleTeam(ParallelEnv):
    """Agents ``agent_0`` to ``agent_n-1`` of a Gymnasium environment with tuples of spaces and a list of rewards.

    These environments report the end of their time as an end by success; ``solved`` tells them apart.
    """

    metadata = {"name": "tuple_team", "render_modes": ["rgb_array"], "is_parallelizable": True}  # noqa: RUF012 - PettingZoo's own form

    def __init__(self, env: gymnasium.Env[Any, Any], solved: Callable[[Any], bool], render_mode: str | None = None) -> None:
        """``solved`` says of the environment at the end of an episode whether it ended by success."""
        self._env, self._solved = env, solved
        self.render_mode = render_mode
        self.possible_agents = [f"agent_{i}" for i in range(len(env.action_space))]  # type: ignore[arg-type]
        self.agents: list[str] = []

    def observation_space(self, agent: str) -> Any:
        """Of one agent."""
        return self._env.observation_space[self.possible_agents.index(agent)]  # type: ignore[index]

    def action_space(self, agent: str) -> Any:
        """Of one agent."""
        return self._env.action_space[self.possible_agents.index(agent)]  # type: ignore[index]

    def reset(self, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        """A new episode."""
        observations, _ = self._env.reset(seed=seed, options=options)
        self.agents = list(self.possible_agents)
        return self._by_agent(observations), {agent: {} for agent in self.agents}

    def step(self, actions: dict[str, Any]) -> tuple[dict[str, Any], dict[str, float], dict[str, bool], dict[str, bool], dict[str, Any]]:
        """One step of all agents; they live and end together."""
        observations, rewards, done, truncated, _ = self._env.step([actions[agent] for agent in self.agents])
        over = bool(done or truncated)
        solved = over and self._solved(self._env.unwrapped)
        agents, self.agents = self.agents, [] if over else self.agents
        earned = {agent: float(reward) for agent, reward in zip(agents, np.asarray(rewards, float), strict=True)}
        return (
            self._by_agent(observations),
            earned,
            dict.fromkeys(agents, solved),
            dict.fromkeys(agents, over and not solved),
            {agent: {} for agent in agents},
        )

    def render(self) -> Any:
        """A picture."""
        return self._env.unwrapped.render(mode="rgb_array")  # type: ignore[call-arg]

    def close(self) -> None:
        """End the environment."""
        self._env.close()

    def _by_agent(self, observations: Any) -> dict[str, Any]:
        return dict(zip(self.possible_agents, observations, strict=True))


def foraging_solved(env: Any) -> bool:
    """Level-based foraging: no food is left."""
    return not env.field.any()


def never_solved(env: Any) -> bool:
    """The robotic warehouse goes on until its time is up."""
    return False
