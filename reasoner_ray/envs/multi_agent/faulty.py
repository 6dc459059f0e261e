"""A team with a fault: what an agent does, or a dimension of it (a joint), has no effect (Wen et al. 2022, section 5.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from gymnasium import spaces
from pettingzoo.utils import BaseParallelWrapper

from reasoner_ray.envs.multi_agent.parallel import action_mask
from reasoner_ray.errors import ConfigError


class FaultyTeam(BaseParallelWrapper):
    """Actions of faulty agents are replaced before they reach any ``ParallelEnv``; agents do not observe that.

    A faulty dimension of a ``Box`` is 0, or the bound next to it where 0 lies outside. ``all`` is every dimension of a ``Box``, and of
    a ``Discrete`` the first choice (the no-op, where an environment has one), or the first that an action mask allows.
    """

    def __init__(self, env: Any, faulty: Mapping[str, Literal["all"] | Sequence[int]]) -> None:
        """``faulty``: the dimensions by agent. Raises ``ConfigError`` for agents or dimensions that do not exist."""
        super().__init__(env)
        self._faulty = dict(faulty)
        self._masks: dict[str, Any] = {}  # of the faulty agents, as they were last seen
        for agent, dims in self._faulty.items():
            if agent not in env.possible_agents:
                raise ConfigError(f"multi_agent.faulty: no agent {agent!r}; there are {', '.join(env.possible_agents)}")
            _check_dims(agent, dims, env.action_space(agent))

    def reset(self, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        """See ``ParallelEnv.reset``."""
        observations, infos = super().reset(seed, options)
        self._remember(observations, infos)
        return observations, infos

    def step(self, actions: dict[str, Any]) -> Any:
        """See ``ParallelEnv.step``."""
        acting = {agent: dims for agent, dims in self._faulty.items() if agent in actions}
        spoilt = {a: _without(actions[a], dims, self.env.action_space(a), self._masks.get(a)) for a, dims in acting.items()}
        observations, *others, infos = super().step({**actions, **spoilt})
        self._remember(observations, infos)
        return observations, *others, infos

    def _remember(self, observations: Mapping[str, Any], infos: Mapping[str, Any]) -> None:
        self._masks = {agent: action_mask(observations.get(agent), infos.get(agent, {})) for agent in self._faulty}


def _check_dims(agent: str, dims: Literal["all"] | Sequence[int], space: Any) -> None:
    """Raise ``ConfigError`` where ``dims`` of ``agent``'s actions cannot be held."""
    parts = space.spaces if isinstance(space, spaces.Tuple) else (space,)
    if not all(isinstance(part, spaces.Discrete | spaces.Box) for part in parts):
        raise ConfigError(f"multi_agent.faulty: {agent} acts by {space}; only choices and boxes can be held")
    if dims == "all":
        return
    count = sum(spaces.flatdim(part) for part in parts if isinstance(part, spaces.Box))
    if wrong := [d for d in dims if not 0 <= d < count]:
        raise ConfigError(f"multi_agent.faulty.{agent}: no dimension {wrong[0]}; its actions have {count}, from 0 (all: the whole agent)")


def _without(action: Any, dims: Literal["all"] | Sequence[int], space: Any, mask: Any) -> Any:
    """``action`` with ``dims`` held; ``mask`` says which choices are allowed (None: all)."""
    if isinstance(space, spaces.Tuple):
        return tuple(_without(part, dims, own, mask) for part, own in zip(action, space.spaces, strict=True))
    if isinstance(space, spaces.Discrete):
        first = 0 if mask is None else int(np.asarray(mask, bool).argmax())
        return type(action)(int(space.start) + first) if dims == "all" else action
    rest = np.clip(np.zeros(space.shape, space.dtype), space.low, space.high)
    if dims == "all":
        return rest
    held = np.array(action, space.dtype)
    held.flat[list(dims)] = rest.flat[list(dims)]
    return held
