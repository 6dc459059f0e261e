"""What a single agent sees and does, as vectors of numbers; and the environments themselves."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from reasoner_ray.agents.sequence.settings import WorldConfig
from reasoner_ray.errors import ConfigError, DataError, EnvironmentFault

SLACK = 1e-4
"""How far, in half ranges, a recorded action may lie outside its bounds: float32 rounds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interface:
    """States of ``state`` numbers, and actions that are one of ``choices``, or ``len(low)`` numbers between ``low`` and ``high``."""

    state: int
    choices: int  # 0: actions are numbers
    first: int = 0  # number of the first choice
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()

    @property
    def action(self) -> int:
        """Numbers that encode an action: a choice is one-hot."""
        return self.choices or len(self.low)

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for files."""
        return asdict(self)

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> Interface:
        """Back from ``to_dict``, or from what JSON made of it. Raises ``KeyError``, ``TypeError`` where it is something else."""
        return cls(
            state=int(tree["state"]),
            choices=int(tree["choices"]),
            first=int(tree["first"]),
            low=tuple(map(float, tree["low"])),
            high=tuple(map(float, tree["high"])),
        )

    @classmethod
    def of(cls, observation: gymnasium.Space[Any], action: gymnasium.Space[Any], name: str) -> Interface:
        """Of an environment's spaces. Raises ``ConfigError`` for spaces that no sequence model here can take."""
        if not isinstance(observation, spaces.Box | spaces.Discrete):
            raise ConfigError(f"{name}: observations of {observation}; kind sequence takes Box and Discrete ones")
        state = int(spaces.flatdim(observation))
        if isinstance(action, spaces.Discrete):
            return cls(state=state, choices=int(action.n), first=int(action.start))
        if isinstance(action, spaces.Box) and action.is_bounded("both"):
            low, high = (tuple(map(float, bound.ravel())) for bound in (action.low, action.high))
            return cls(state=state, choices=0, low=low, high=high)
        raise ConfigError(f"{name}: actions of {action}; kind sequence takes Discrete ones, and Box ones with finite bounds")

    def encode(self, actions: np.ndarray, where: str) -> np.ndarray:
        """The environment's actions [T, ...] as float32 [T, action]: one-hot, or scaled to [-1, 1]. Raises ``DataError``."""
        if self.choices:
            chosen = np.asarray(actions).reshape(-1).astype(np.int64) - self.first
            if ((chosen < 0) | (chosen >= self.choices)).any():
                raise DataError(f"{where}: an action outside the {self.choices} choices from {self.first} on")
            return np.eye(self.choices, dtype=np.float32)[chosen]
        low, high = np.array(self.low), np.array(self.high)
        scaled = 2 * (np.asarray(actions, np.float64).reshape(-1, self.action) - low) / (high - low) - 1
        if not (np.abs(scaled) <= 1 + SLACK).all():
            raise DataError(f"{where}: an action that is not between its bounds {self.low} and {self.high}")
        return scaled.clip(-1, 1).astype(np.float32)

    def decode(self, action: np.ndarray, space: gymnasium.Space[Any]) -> Any:
        """What the environment is told of one encoded action [action]."""
        if self.choices:
            return np.int64(action.argmax() + self.first)
        low, high = np.array(self.low), np.array(self.high)
        return (low + (action.astype(np.float64) + 1) / 2 * (high - low)).astype(space.dtype).reshape(space.shape)


def state_of(observation: Any, space: gymnasium.Space[Any]) -> np.ndarray:
    """An observation as float32 [state]; a number is one-hot. Raises ``EnvironmentFault`` where it is not finite."""
    state = np.asarray(spaces.flatten(space, observation), np.float32)
    if not np.isfinite(state).all():
        raise EnvironmentFault("the environment's observation holds NaN or an infinity")
    return state


def make_world(config: WorldConfig, *, pictures: bool = False) -> gymnasium.Env[Any, Any]:
    """The environment that a job names, ending after ``max_steps``. Raises ``ConfigError``."""
    import reasoner_ray.envs  # noqa: F401 - registers the built-in ones

    options = dict(config.args) | ({"render_mode": "rgb_array"} if pictures else {})
    try:
        env = gymnasium.make(config.id, disable_env_checker=True, max_episode_steps=config.max_steps, **options)
    except gymnasium.error.DependencyNotInstalled as error:
        raise ConfigError(f"sequence.world.id: {config.id} needs a package that is not installed: {error}") from error
    except (gymnasium.error.Error, TypeError, ValueError) as error:
        raise ConfigError(f"sequence.world: {config.id} cannot be made with {config.args}: {type(error).__name__}: {error}") from error
    Interface.of(env.observation_space, env.action_space, config.id)
    if env.spec is None or env.spec.max_episode_steps is None:
        raise ConfigError(f"sequence.world.max_steps: episodes of {config.id} have no limit of their own, so it must be given")
    return env
