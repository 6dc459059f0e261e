"""Playing: a copy of the network acts in many environments at once, asked for a return. No Ray in here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import gymnasium
import numpy as np
import torch

from reasoner_ray.agents.sequence.network import DecisionTransformer
from reasoner_ray.agents.sequence.recordings import Recording
from reasoner_ray.agents.sequence.spaces import Interface, make_world, state_of
from reasoner_ray.agents.sequence.windows import Units, Windows
from reasoner_ray.envs.multi_agent.teams import Episode, environment_code
from reasoner_ray.errors import EnvironmentFault

if TYPE_CHECKING:
    from reasoner_ray.config import JobConfig


@dataclass(slots=True)
class _Play:
    """An episode under way."""

    number: int
    env: gymnasium.Env[Any, Any]
    asked: float  # what is left of the return asked for
    states: list[np.ndarray] = field(default_factory=list)
    actions: list[np.ndarray] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    truncated: bool = False

    def recording(self) -> Recording:
        """The episode so far; its last state has no action yet where it is under way."""
        n = len(self.rewards)
        return Recording(
            states=np.stack(self.states[:n]),
            actions=np.stack(self.actions),
            rewards=np.array(self.rewards, np.float32),
            last=self.states[n],
            truncated=self.truncated,
        )


class Context:
    """The last K steps of B episodes as the network reads them; padding makes way as steps come."""

    def __init__(self, rows: int, context: int, interface: Interface, units: Units) -> None:
        self._units = units
        self.states = np.zeros((rows, context, interface.state), np.float32)
        self.actions = np.full((rows, context, interface.action), units.no_action, np.float32)
        self.returns = np.zeros((rows, context), np.float32)
        self.times = np.zeros((rows, context), np.int64)
        self.mask = np.zeros((rows, context), bool)

    def push(self, rows: Sequence[int], states: np.ndarray, returns: np.ndarray, time: int) -> Windows:
        """Windows of ``rows`` that end with a step whose action is still open; ``returns`` are in units of reward."""
        for part in (self.states, self.actions, self.returns, self.times, self.mask):
            part[rows, :-1] = part[rows, 1:]
        self.states[rows, -1] = (states - self._units.mean) / self._units.std
        self.actions[rows, -1] = self._units.no_action
        self.returns[rows, -1] = returns / self._units.return_scale
        self.times[rows, -1], self.mask[rows, -1] = time, True
        parts = {name: torch.from_numpy(getattr(self, name)[rows]) for name in ("states", "actions", "returns", "times", "mask")}
        return Windows(**parts)

    def acted(self, rows: Sequence[int], actions: np.ndarray) -> None:
        """The newest step's actions."""
        self.actions[rows, -1] = actions


class Player:
    """Plays episodes of ``sequence.world`` with the newest weights it was given."""

    def __init__(self, config: JobConfig, index: int = 0, network: DecisionTransformer | None = None) -> None:
        """``network`` is one to play with as it is, where there is one. Raises ``ConfigError``."""
        self.config, self.index = config, index
        self._envs = [make_world(config.sequence.world)]
        first = self._envs[0]
        self.team = Interface.of(first.observation_space, first.action_space, config.sequence.world.id)
        self.horizon = horizon_of(first)
        self.network = (network or DecisionTransformer(self.team, config.sequence, self.horizon)).eval()

    def load(self, state: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take the learner's weights."""
        own = self.network.state_dict()
        for name, tensor in state:
            own[name].copy_(tensor)

    def evaluate(self, seeds: Sequence[int], target: float) -> list[Episode]:
        """One episode from each seed, asked for ``target``, by ``sequence.sample``. Raises ``EnvironmentFault``."""
        plays = self._play(seeds, target, greedy=not self.config.sequence.sample)
        return [Episode(env=p.number, total=float(sum(p.rewards)), steps=len(p.rewards), truncated=p.truncated) for p in plays]

    def play(self, seeds: Sequence[int], target: float, *, greedy: bool = False) -> list[Recording]:
        """One episode from each seed, with actions drawn unless ``greedy``. Raises ``EnvironmentFault``."""
        return [p.recording() for p in self._play(seeds, target, greedy=greedy)]

    def draw(self, seed: int, target: float) -> list[np.ndarray]:
        """The frames of one episode. Raises ``EnvironmentFault`` where the environment draws nothing."""
        env = make_world(self.config.sequence.world, pictures=True)
        frames: list[np.ndarray] = []

        def look() -> None:
            frame: Any = env.render()
            if not isinstance(frame, np.ndarray):
                raise EnvironmentFault(f"{self.config.sequence.world.id} draws no pictures")
            frames.append(frame)

        self._batch([seed], target, greedy=not self.config.sequence.sample, envs=[env], look=look)
        return frames

    def _play(self, seeds: Sequence[int], target: float, *, greedy: bool) -> list[_Play]:
        n = self.config.sequence.world.envs
        while len(self._envs) < min(n, len(seeds)):
            self._envs.append(make_world(self.config.sequence.world))
        found: list[_Play] = []
        for first in range(0, len(seeds), n):
            found += self._batch(seeds[first : first + n], target, greedy=greedy, envs=self._envs)
        return found

    def _batch(
        self,
        seeds: Sequence[int],
        target: float,
        *,
        greedy: bool,
        envs: Sequence[gymnasium.Env[Any, Any]],
        look: Callable[[], None] | None = None,
    ) -> list[_Play]:
        """An episode from each seed, all at once, until the last has ended."""
        settings = self.config.sequence
        plays = [_Play(number=i, env=env, asked=target) for i, env in zip(range(len(seeds)), envs, strict=False)]
        generator = torch.Generator().manual_seed(int(np.random.SeedSequence([int(s) for s in seeds]).generate_state(1)[0]))
        context = Context(len(plays), settings.eval_context or settings.context, self.team, self.network.units)
        for play, seed in zip(plays, seeds, strict=True):
            with environment_code(f"{settings.world.id}: reset"):
                observation, _ = play.env.reset(seed=int(seed))
            play.states.append(state_of(observation, play.env.observation_space))
        running, time = list(plays), 0
        while running:
            if look is not None:
                look()
            rows = [p.number for p in running]
            windows = context.push(rows, np.stack([p.states[-1] for p in running]), np.array([p.asked for p in running], np.float32), time)
            actions = self.network.act(windows, greedy=greedy, generator=generator).numpy()
            context.acted(rows, actions)
            running = [p for p, action in zip(running, actions, strict=True) if not self._step(p, action)]
            time += 1
        return plays

    def _step(self, play: _Play, action: np.ndarray) -> bool:
        """One step of one episode; whether that was its last."""
        name = self.config.sequence.world.id
        with environment_code(f"{name}: step"):
            told = self.team.decode(action, play.env.action_space)
            observation, reward, terminated, truncated, _ = play.env.step(told)
        if not np.isfinite(float(reward)):
            raise EnvironmentFault(f"{name}: a reward of {reward}")
        play.actions.append(action)
        play.rewards.append(float(reward))
        play.states.append(state_of(observation, play.env.observation_space))
        if not self.config.sequence.delayed:
            play.asked -= float(reward)
        play.truncated = bool(truncated and not terminated)
        return bool(terminated or truncated)


def horizon_of(env: gymnasium.Env[Any, Any]) -> int:
    """Steps that an episode has at most; ``make_world`` makes none without such a limit."""
    return cast(int, cast(Any, env.spec).max_episode_steps)
