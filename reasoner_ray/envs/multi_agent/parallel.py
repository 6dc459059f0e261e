"""Any PettingZoo ``ParallelEnv``, E of them stepped one after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from gymnasium import spaces

from reasoner_ray.envs.multi_agent.settings import MultiAgentConfig
from reasoner_ray.envs.multi_agent.spec import ActionLayout, TeamView
from reasoner_ray.envs.multi_agent.teams import Episode, Teams, TeamStep, drawing, ends, environment_code, episode_seed
from reasoner_ray.errors import EnvironmentFault, EnvironmentProblem


class ParallelTeams(Teams):
    """See ``Teams``. Agents that die leave ``env.agents``; an episode is over when the last has left, or after ``max_steps``.

    An action mask is read from the key ``action_mask`` of an agent's observation (a ``Dict`` beside ``observation``) or of its
    info. Actions of a bounded ``Box`` are numbers from -1 to 1 here, stretched to its bounds and cut off there.
    """

    def __init__(self, make: Callable[[], Any], n_envs: int, config: MultiAgentConfig) -> None:
        """Raises ``EnvironmentFault`` where the spaces are such that no team can act in them, ``ConfigError`` for other ``features``."""
        self._envs = [make() for _ in range(n_envs)]
        first = self._envs[0]
        with environment_code(f"{config.name}: its agents and spaces"):
            agents = tuple(first.possible_agents)
            self._spaces = [_own_space(first.observation_space(agent)) for agent in agents]
            sizes = [spaces.flatdim(space) for space in self._spaces]
            self._doers = [_Doer(first.action_space(agent), f"{config.name}: the action space of {agent}") for agent in agents]
        self._index = {agent: i for i, agent in enumerate(agents)}
        choices, dims = tuple(d.choices for d in self._doers), tuple(d.dims for d in self._doers)
        layout = ActionLayout(choices=choices, dims=dims, least_choices=config.pad.choices, least_dims=config.pad.dims)
        super().__init__(config, n_envs, agents, sizes, layout)
        self._blank, self._legal = self._observations[0].copy(), layout.legal
        self._seeds: list[int] = [0] * n_envs
        self._numbers = np.zeros(n_envs, int)

    def begin(self, seeds: Sequence[int]) -> TeamView:
        """See ``Teams.begin``."""
        self._seeds = list(seeds)
        self._numbers[:], self._totals[:], self._steps[:] = 0, 0.0, 0
        for env in range(self.n_envs):
            self._reset(env)
        return self._view()

    def step(self, actions: np.ndarray) -> TeamStep:
        """See ``Teams.step``."""
        shape = self._active.shape
        rewards, terminated, truncated = np.zeros(shape), ~self._active, np.zeros(shape, bool)
        before, ended = self._active.copy(), np.zeros(self.n_envs, bool)
        for i, env in enumerate(self._envs):
            wanted = {agent: self._action(self._place(i, agent), actions[i]) for agent in env.agents}
            with environment_code(f"{self._name}: step (environment {i})"):
                observations, earned, dead, cut, infos = env.step(wanted)
            self._read_rewards(i, earned, wanted, rewards[i])
            with environment_code(f"{self._name}: what step said of ends (environment {i})"):
                for agent in wanted:
                    terminated[i, self._index[agent]], truncated[i, self._index[agent]] = dead.get(agent, True), cut.get(agent, False)
            cut_off = [agent for agent in wanted if (truncated & ~terminated)[i, self._index[agent]]]
            self._write(i, observations, infos, env.agents, cut_off)
            if not env.agents:  # those that time cut off are alive in the last view: its value is theirs
                self._active[i] = before[i] & ~terminated[i]
            ended[i] = not env.agents or self._steps[i] + 1 == self._config.max_steps
            if ended[i]:  # an agent that is alive at the end was cut off by time
                truncated[i] |= before[i] & ~terminated[i]
        team = self._earn(rewards, before)
        terminated, truncated = ends(terminated, truncated, ended, self._config.reward)
        last = self._view(ended) if ended.any() else None
        episodes = [self._finish(int(i), bool(truncated[i].any())) for i in np.flatnonzero(ended)]
        return TeamStep(
            view=self._view(), rewards=team, terminated=terminated, truncated=truncated, ended=ended, last=last, episodes=episodes
        )

    def render(self, env: int) -> np.ndarray:
        """See ``Teams.render``."""
        with drawing(self._name):
            picture = self._envs[env].render()
        if not isinstance(picture, np.ndarray):
            raise EnvironmentProblem(f"{self._name} draws no pictures (render_mode rgb_array)")
        return picture

    def close(self) -> None:
        """See ``Teams.close``."""
        for env in self._envs:
            env.close()

    def _action(self, agent: int, joint: np.ndarray) -> Any:
        """What the environment is told of an agent's row of ``joint`` [n, parts]."""
        first = int(self.spec.actions.n_choices > 0)
        return self._doers[agent].action(joint[agent, 0] if first else 0.0, joint[agent, first:])

    def _reset(self, env: int) -> None:
        seed = episode_seed(self._seeds[env], int(self._numbers[env]))
        with environment_code(f"{self._name}: reset with seed {seed} (environment {env})"):
            observations, infos = self._envs[env].reset(seed=seed)
        self._write(env, observations, infos, self._envs[env].agents)

    def _finish(self, env: int, truncated: bool) -> Episode:
        """The episode that has ended; the next one begins."""
        episode = self._ended(env, truncated=truncated)
        self._numbers[env] += 1
        self._reset(env)
        return episode

    def _place(self, env: int, agent: str) -> int:
        """An agent's place in the team. Raises ``EnvironmentFault`` for one that is none of it."""
        if agent not in self._index:
            raise EnvironmentFault(f"{self._name}: {agent!r} (environment {env}) is not among possible_agents: {', '.join(self._index)}")
        return self._index[agent]

    def _read_rewards(self, env: int, earned: Mapping[str, Any], acted: Mapping[str, Any], into: np.ndarray) -> None:
        """Lay rewards into a row of the team's. Raises ``EnvironmentFault``."""
        for agent, reward in earned.items():
            place = self._place(env, agent)
            with environment_code(f"{self._name}: the reward of {agent} (environment {env})"):
                into[place] = reward
        if missing := [agent for agent in acted if agent not in earned]:
            raise EnvironmentFault(f"{self._name}: step gave no reward of {missing[0]} (environment {env}), which has just acted")

    def _write(
        self, env: int, observations: Mapping[str, Any], infos: Mapping[str, Any], living: Sequence[str], cut_off: Sequence[str] = ()
    ) -> None:
        """Lay what the agents of an environment see into the arrays. The last view of one that has just died is kept until then.

        Raises ``EnvironmentFault``, also where one of the ``living``, or of those that time has ``cut_off`` (whose last view has a
        value), sees nothing.
        """
        self._active[env] = False
        self._observations[env], self._masks[env] = self._blank, self._legal
        for agent in (*living, *cut_off):
            self._place(env, agent)
            if agent not in observations:
                raise EnvironmentFault(f"{self._name}: {agent} (environment {env}) has not died, but there is no observation of it")
        for agent, seen in observations.items():
            i = self._place(env, agent)
            with environment_code(f"{self._name}: the observation of {agent} (environment {env})"):
                flat, mask = self._read(i, seen, infos.get(agent) or {})
            places, choices = self._observer.places[i], self._doers[i].choices
            if len(flat) != len(places):
                raise EnvironmentFault(f"{self._name}: {agent} saw {len(flat)} numbers, its observation space has {len(places)}")
            self._observations[env, i, places] = flat
            if mask is not None and choices:
                if len(mask) != choices:
                    raise EnvironmentFault(f"{self._name}: the action mask of {agent} has {len(mask)} entries for {choices} choices")
                self._masks[env, i] = False
                self._masks[env, i, :choices] = mask
        for agent in living:
            self._active[env, self._index[agent]] = True
        # One that has died may choose anything: nothing comes of it.
        self._masks[env][~self._active[env]] = self._legal[~self._active[env]]

    def _read(self, agent: int, seen: Any, info: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray | None]:
        """The numbers that an agent sees, and its action mask (bool), of whatever its environment said."""
        mask, space = action_mask(seen, info), self._spaces[agent]
        if isinstance(seen, Mapping):
            seen = seen.get("observation", seen)
        flat = seen if isinstance(space, spaces.Box) else spaces.flatten(space, seen)
        return np.asarray(flat, np.float32).ravel(), None if mask is None else np.asarray(mask, bool).ravel()


def action_mask(seen: Any, info: Mapping[str, Any]) -> Any:
    """What says which choices an agent has, beside its observation or in its info; None where nothing is masked."""
    mask = info.get("action_mask")
    return seen.get("action_mask", mask) if isinstance(seen, Mapping) else mask


def _own_space(space: Any) -> Any:
    """An observation space without the action mask that lies beside it."""
    if isinstance(space, spaces.Dict) and "observation" in space.spaces:
        return space["observation"]
    return space


class _Doer:
    """Turns an agent's row of numbers into an action of its space: a choice, a box, or a tuple of both."""

    def __init__(self, space: Any, what: str) -> None:
        pair: Sequence[Any] = space.spaces if isinstance(space, spaces.Tuple) else (space,)
        kinds = [type(part) for part in pair]
        if kinds not in ([spaces.Discrete], [spaces.Box], [spaces.Discrete, spaces.Box]):
            raise EnvironmentFault(f"{what} is {space}; teams act by Discrete, by Box, or by Tuple(Discrete, Box)")
        self._pair = kinds == [spaces.Discrete, spaces.Box]
        choice = pair[0] if kinds[0] is spaces.Discrete else None
        self._box = pair[-1] if kinds[-1] is spaces.Box else None
        self._offset = 0 if choice is None else int(choice.start)
        self.choices = 0 if choice is None else int(choice.n)
        self.dims = 0 if self._box is None else int(np.prod(self._box.shape))
        if self._box is not None:
            self._bounded = self._box.is_bounded()
            self._low, self._span = self._box.low.ravel(), self._box.high.ravel() - self._box.low.ravel()

    def action(self, choice: float, numbers: np.ndarray) -> Any:
        """The action of the choice's number and of the team's dimensions [n_dims], of which the first are this agent's."""
        number = int(choice) + self._offset
        if self._box is None:
            return number
        numbers = numbers[: self.dims]
        if self._bounded:
            numbers = self._low + (np.clip(numbers, -1.0, 1.0) + 1.0) / 2.0 * self._span
        box = numbers.reshape(self._box.shape).astype(self._box.dtype)
        return (number, box) if self._pair else box
