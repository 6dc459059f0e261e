"""E environments stepped together for a policy that acts for all their agents at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from reasoner_ray.envs.multi_agent.settings import MultiAgentConfig
from reasoner_ray.envs.multi_agent.spec import ActionLayout, Sight, TeamSpec, TeamView
from reasoner_ray.errors import ConfigError, EnvironmentFault, EnvironmentProblem, ReasonerError


@dataclass(frozen=True, slots=True, kw_only=True)
class Episode:
    """A finished episode. ``total`` is the sum of the team's rewards (mean over agents where each earns its own)."""

    env: int
    total: float
    steps: int
    truncated: bool  # by time, not by success or failure


@dataclass(frozen=True, slots=True, kw_only=True)
class TeamStep:
    """What a joint action of every environment led to. Where an episode ended, ``view`` is of the next one already."""

    view: TeamView
    rewards: np.ndarray  # float32 [E, n]
    terminated: np.ndarray  # bool [E, n]; the agent's future is worth nothing
    truncated: np.ndarray  # bool [E, n]; its episode ended by time
    ended: np.ndarray  # bool [E]
    last: TeamView | None  # the last views of the k environments that ended, rows in their order; None where none did
    episodes: list[Episode]


class Teams(ABC):
    """Environments of one kind. Each episode has a seed of its own, drawn from its environment's base seed and its number."""

    def __init__(self, config: MultiAgentConfig, n_envs: int, agents: tuple[str, ...], sizes: Sequence[int], actions: ActionLayout) -> None:
        """``sizes`` are the agents' own numbers of observations. Raises ``ConfigError``."""
        self.n_envs = n_envs
        self._config, self._name = config, config.name
        self._observer = Observer(sizes, config)
        self.spec = TeamSpec(
            agents=agents,
            observation=self._observer.size,
            actions=actions,
            number=self._observer.number,
            sight=Sight.of(sizes, config),
        )
        self._observations = self._observer.empty(n_envs)
        self._masks = np.repeat(actions.legal[None], n_envs, 0)
        self._active = np.ones((n_envs, len(agents)), bool)
        self._totals, self._steps = np.zeros(n_envs), np.zeros(n_envs, int)  # of the episodes under way

    @abstractmethod
    def begin(self, seeds: Sequence[int]) -> TeamView:
        """A new first episode in every environment, from one base seed each."""

    @abstractmethod
    def step(self, actions: np.ndarray) -> TeamStep:
        """Do the joint actions float32 [E, n, parts]. Raises ``EnvironmentFault``."""

    @abstractmethod
    def render(self, env: int) -> np.ndarray:
        """A picture of an environment, uint8 [height, width, 3]. Raises ``EnvironmentProblem`` where it draws none."""

    @abstractmethod
    def close(self) -> None:
        """Let go of what the environments hold."""

    def _view(self, rows: np.ndarray | None = None) -> TeamView:
        """What the agents see now, checked; ``rows`` (bool [E]) selects environments. Raises ``EnvironmentFault``."""
        chosen = slice(None) if rows is None else rows
        observations = self._observer.finish(self._observations[chosen]).copy()
        view = TeamView(observations=observations, legal=self._masks[chosen].copy(), active=self._active[chosen].copy())
        view.check(self._name, self.spec.agents)
        return view

    def _earn(self, rewards: np.ndarray, active: np.ndarray) -> np.ndarray:
        """What each agent earns, float32 [E, n], of the agents' own rewards; it is counted. Raises ``EnvironmentFault``."""
        check_rewards(self._name, rewards, self.spec.agents)
        earned = team_rewards(rewards, active, self._config.reward)
        self._totals += earned.mean(-1)
        self._steps += 1
        return earned

    def _ended(self, env: int, *, truncated: bool) -> Episode:
        """The episode that has just ended; counting begins anew."""
        episode = Episode(env=env, total=float(self._totals[env]), steps=int(self._steps[env]), truncated=truncated)
        self._totals[env], self._steps[env] = 0.0, 0
        return episode


@contextmanager
def environment_code(what: str) -> Iterator[None]:
    """Whatever an environment's own code raises, as ``EnvironmentFault``; ``what`` names it and what it was asked to do."""
    try:
        yield
    except ReasonerError:
        raise
    except Exception as error:  # someone else's code may raise anything
        raise EnvironmentFault(f"{what} raised {type(error).__name__}: {' '.join(str(error).split())[:400]}") from error


@contextmanager
def drawing(name: str) -> Iterator[None]:
    """Whatever keeps an environment from being drawn (no package, no display), as ``EnvironmentProblem``."""
    try:
        yield
    except Exception as error:  # drawing packages have exceptions of their own, with no base in common
        raise EnvironmentProblem(f"{name} cannot be drawn here: {type(error).__name__}: {error}") from error


def episode_seed(base: int, number: int) -> int:
    """The seed of an environment's episode."""
    return int(np.random.SeedSequence([base, number]).generate_state(1)[0])


def team_rewards(rewards: np.ndarray, active: np.ndarray, how: str) -> np.ndarray:
    """What each agent earns, float32 [E, n], of each agent's own rewards [E, n]; ``mean`` is over the agents that were alive."""
    if how == "own":
        return rewards.astype(np.float32)
    total = rewards.sum(-1, keepdims=True)
    if how == "mean":
        total = total / np.maximum(active.sum(-1, keepdims=True), 1)
    return np.broadcast_to(total, rewards.shape).astype(np.float32)


def ends(terminated: np.ndarray, truncated: np.ndarray, ended: np.ndarray, how: str) -> tuple[np.ndarray, np.ndarray]:
    """``terminated`` and ``truncated`` bool [E, n] as credit reads them, of each agent's own flags and of whether its episode ended.

    An agent that earns its own reward has no future once it has died, and ends by time where time cuts it off, whether or not the
    others go on; in a team the others earn for it until the episode ends, and an episode in which any agent was cut off by time
    ended by time.
    """
    over = ended[:, None]
    if how == "own":
        return terminated, (over | truncated) & ~terminated
    by_time = (truncated & ~terminated).any(-1, keepdims=True)
    shape = terminated.shape
    return np.broadcast_to(over & ~by_time, shape).copy(), np.broadcast_to(over & by_time, shape).copy()


class Observer:
    """Lays the agents' observations into arrays of one shape: padded with zeros, the agent's number behind them."""

    def __init__(self, sizes: Sequence[int], config: MultiAgentConfig) -> None:
        """``sizes`` are the agents' own numbers of observations. Raises ``ConfigError`` where ``features`` are of other observations."""
        n = len(sizes)
        self._ids = np.eye(n, max(n, config.pad.agents), dtype=np.float32) if config.agent_id else np.zeros((n, 0), np.float32)
        self.places = [_places(size, config.features) for size in sizes]  # where an agent's numbers lie
        self._widest = max(config.pad.observation, sum(to for _, to in config.features or ()), *sizes)
        self._standardise = config.standardise
        self.number = self._ids.shape[1]  # places of an agent's number
        self.size = self._widest + self.number
        self._own = np.zeros((n, self.size), np.float32)  # 1 where a place is the agent's own, or its number's, and no padding
        for row, places in zip(self._own, self.places, strict=True):
            row[places] = 1.0
        self._own[:, self._widest : self._widest + (n if config.agent_id else 0)] = 1.0

    def empty(self, n_envs: int) -> np.ndarray:
        """Observations float32 [E, n, size] that hold the agents' numbers alone."""
        padding = np.zeros((len(self._ids), self._widest), np.float32)
        return np.repeat(np.concatenate([padding, self._ids], 1)[None], n_envs, 0)

    def finish(self, observations: np.ndarray) -> np.ndarray:
        """The observations [E, n, size] as the network gets them; padding, which tells nothing, stays 0 and counts in no moments."""
        if not self._standardise:
            return observations
        count = np.maximum(self._own.sum(-1, keepdims=True), 1.0)
        centred = (observations - observations.sum(-1, keepdims=True) / count) * self._own
        spread = np.sqrt((centred**2).sum(-1, keepdims=True) / count)
        return centred / np.maximum(spread, 1e-6)


def _places(size: int, features: Sequence[tuple[int, int]] | None) -> np.ndarray:
    """Where the ``size`` numbers of an observation lie once each of its features is padded, int [size]."""
    if features is None:
        return np.arange(size)
    if bad := next(((own, to) for own, to in features if not 0 <= own <= to), None):
        raise ConfigError(f"multi_agent.features: {bad[0]} numbers cannot be padded to {bad[1]}")
    if (said := sum(own for own, _ in features)) != size:
        raise ConfigError(f"multi_agent.features: they have {said} numbers in all, an agent here observes {size}")
    starts = np.cumsum([0, *(to for _, to in features)])
    return np.concatenate([start + np.arange(own) for start, (own, _) in zip(starts, features, strict=False)])


def check_rewards(name: str, rewards: np.ndarray, agents: tuple[str, ...]) -> None:
    """Raise ``EnvironmentFault`` for a reward that is not finite."""
    if not np.isfinite(rewards).all():
        env, agent = np.argwhere(~np.isfinite(rewards))[0]
        raise EnvironmentFault(f"{name}: the reward of {agents[agent]} (environment {env}) is {rewards[env, agent]}")
