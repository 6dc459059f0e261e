"""vmas: E environments as one batch of tensors, stepped in one call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from reasoner_ray.envs.multi_agent.settings import MultiAgentConfig
from reasoner_ray.envs.multi_agent.spec import ActionLayout, TeamView
from reasoner_ray.envs.multi_agent.teams import Teams, TeamStep, drawing, ends, environment_code, episode_seed
from reasoner_ray.errors import EnvironmentFault


class BatchedTeams(Teams):
    """See ``Teams``. Agents live and end together. One random source serves all environments, so ``begin`` seeds it once.

    vmas keeps that source at its class, where all batches of a process would share it: each batch here has its own, which lies there
    during its own calls alone. Episodes of training do not depend on evaluations between them.
    """

    def __init__(self, env: Any, n_envs: int, config: MultiAgentConfig) -> None:
        """``env`` is what ``vmas.make_env(..., terminated_truncated=True)`` made of ``n_envs`` environments."""
        self._env = env
        agents = tuple(agent.name for agent in env.agents)
        if odd := [name for name, space in zip(agents, env.observation_space, strict=True) if space.shape is None]:
            raise EnvironmentFault(f"{config.name}: {odd[0]} observes several tensors; teams of vmas observe one")
        sizes = [int(np.prod(space.shape)) for space in env.observation_space]
        choices = tuple(0 if env.continuous_actions else int(space.n) for space in env.action_space)
        dims = tuple(int(space.shape[0]) if env.continuous_actions else 0 for space in env.action_space)
        layout = ActionLayout(choices=choices, dims=dims, least_choices=config.pad.choices, least_dims=config.pad.dims)
        super().__init__(config, n_envs, agents, sizes, layout)
        # Communication has bounds of its own, from 0 to 1, beside those of forces, from -u to u.
        bounds = [(torch.as_tensor(space.low), torch.as_tensor(space.high)) for space in env.action_space if env.continuous_actions]
        self._bounds = bounds
        self._random = list(env.vmas_random_state)

    def begin(self, seeds: Sequence[int]) -> TeamView:
        """See ``Teams.begin``."""
        with self._calling("reset"):
            observations = self._env.reset(seed=episode_seed(int(seeds[0]), len(seeds)))
        self._totals[:], self._steps[:] = 0.0, 0
        self._write(observations, np.ones(self.n_envs, bool))
        return self._view()

    def step(self, actions: np.ndarray) -> TeamStep:
        """See ``Teams.step``."""
        wanted = [self._action(i, actions[:, i]) for i in range(len(self.spec.agents))]
        with self._calling("step"):
            observations, earned, terminated, truncated, _ = self._env.step(wanted)
        rewards = torch.stack(list(earned), -1).double().numpy()
        team = self._earn(rewards, self._active)
        dead, cut = terminated.numpy(), truncated.numpy()
        ended = dead | cut
        every = np.ones(len(self.spec.agents), bool)
        dead_agents, cut_agents = ends(dead[:, None] & every, cut[:, None] & every, ended, self._config.reward)
        self._write(observations, np.ones(self.n_envs, bool))
        last, episodes = (self._view(ended) if ended.any() else None), []
        for env in map(int, np.flatnonzero(ended)):
            episodes.append(self._ended(env, truncated=not dead[env]))
        if episodes:
            self._begin_anew(ended)
        return TeamStep(
            view=self._view(), rewards=team, terminated=dead_agents, truncated=cut_agents, ended=ended, last=last, episodes=episodes
        )

    def restart(self, rows: np.ndarray) -> TeamView:
        """A new episode in the environments that ``rows`` (bool [E]) selects, in place of the one under way, and what all see then."""
        self._totals[rows], self._steps[rows] = 0.0, 0
        self._begin_anew(rows)
        return self._view()

    def render(self, env: int) -> np.ndarray:
        """See ``Teams.render``."""
        with drawing(f"{self._name} (by pyglet)"), self._own_source():
            return np.asarray(self._env.render(mode="rgb_array", env_index=env))

    def close(self) -> None:
        """See ``Teams.close``: tensors need no farewell."""

    def _begin_anew(self, rows: np.ndarray) -> None:
        with self._calling("reset"):
            for env in map(int, np.flatnonzero(rows)):
                self._env.reset_at(env, return_observations=False)
            (observations,) = self._env.get_from_scenario(get_observations=True, get_rewards=False, get_infos=False, get_dones=False)
        self._write(observations, rows)

    def _action(self, agent: int, rows: np.ndarray) -> torch.Tensor:
        """An agent's actions [E, dims] within its bounds, or the numbers of its choices [E, 1]."""
        if not self._bounds:
            return torch.from_numpy(rows[:, :1].copy())
        (low, high), first = self._bounds[agent], int(self.spec.actions.n_choices > 0)
        numbers = torch.from_numpy(rows[:, first : first + len(low)].copy()).clamp(-1, 1)
        return (low + (numbers + 1) / 2 * (high - low)).clamp(low, high)

    @contextmanager
    def _calling(self, what: str) -> Iterator[None]:
        """The environment's own code runs here, from this batch's own random source."""
        with environment_code(f"{self._name}: {what}"), self._own_source():
            yield

    @contextmanager
    def _own_source(self) -> Iterator[None]:
        shared = self._env.vmas_random_state  # the class's own list, which vmas changes in place
        others, shared[:] = list(shared), self._random
        try:
            yield
        finally:
            self._random, shared[:] = list(shared), others

    def _write(self, observations: Sequence[torch.Tensor], rows: np.ndarray) -> None:
        for i, seen in enumerate(observations):
            self._observations[:, i][np.ix_(rows, self._observer.places[i])] = seen.numpy()[rows]
