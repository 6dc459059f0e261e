"""``reasoner collect``: a policy's episodes as a Minari data set."""

from __future__ import annotations

import copy
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import gymnasium
import numpy as np
import torch
from gymnasium import spaces

from reasoner_ray.agents.mat.learner import load_network as load_team_network
from reasoner_ray.agents.sequence.launch import make_player
from reasoner_ray.agents.sequence.player import Context
from reasoner_ray.agents.sequence.recordings import check_new, write_minari
from reasoner_ray.agents.sequence.spaces import make_world, state_of
from reasoner_ray.agents.weights import ABOUT
from reasoner_ray.envs.multi_agent.teams import environment_code
from reasoner_ray.errors import ConfigError, ModelError
from reasoner_ray.registry import load_dotted

if TYPE_CHECKING:
    from minari.data_collector import EpisodeBuffer

    from reasoner_ray.config import JobConfig

Policy = Callable[[Any, float, Any], Any]
"""``policy(observation, reward, action)``: the environment's next action, after ``action`` was taken and earned ``reward``.

Where an episode begins ``action`` is None.
"""
SEED = 2_000_000_000
"""Seeds of collected episodes are drawn from this and the job's, so that they are none of an evaluation's."""


def collect(config: JobConfig) -> dict[str, float]:
    """Play ``sequence.collect`` and write the data set; figures of what was played. Raises ``ReasonerError``."""
    settings, world = config.sequence.collect, config.sequence.world
    if config.kind != "sequence":
        raise ConfigError(f"kind: {config.kind} has no sequence.world to play in; `reasoner collect` takes jobs of kind sequence or rl")
    if settings.out is None:
        raise ConfigError("sequence.collect.out: name the folder of the data set, for example runs/data/key-to-door-random-v0")
    check_new(Path(settings.out))
    env = make_world(world)
    rng = np.random.default_rng([SEED, config.seed])
    policy = noisy(make_policy(config, env, rng), env.action_space, settings.noise, rng)
    episodes = [play(env, policy, int(seed), world.id) for seed in rng.integers(2**31, size=settings.episodes)]
    said = f"{settings.episodes} episodes of {settings.policy}, noise {settings.noise:g}"
    about = {"algorithm_name": settings.policy, "description": said}
    write_minari(Path(settings.out), episodes, env, about)
    returns = [float(np.sum(e.rewards)) for e in episodes]
    return {
        "episodes": float(len(episodes)),
        "steps": float(sum(len(e.rewards) for e in episodes)),
        "return": statistics.fmean(returns),
        "return_min": min(returns),
        "return_max": max(returns),
    }


def play(env: gymnasium.Env[Any, Any], policy: Policy, seed: int, name: str) -> EpisodeBuffer:
    """One episode as Minari keeps it. Raises ``EnvironmentFault``."""
    from minari.data_collector import EpisodeBuffer

    with environment_code(f"{name}: reset"):
        observation, _ = env.reset(seed=seed)
    # Copies, as an environment may write the next observation into the same array.
    episode = EpisodeBuffer(seed=seed, observations=[copy.deepcopy(observation)], actions=[])
    observations, actions = cast(list[Any], episode.observations), cast(list[Any], episode.actions)
    reward, over, action = 0.0, False, None
    while not over:
        action = policy(observation, reward, action)
        with environment_code(f"{name}: step"):
            observation, earned, terminated, truncated, _ = env.step(action)
        reward, over = float(earned), bool(terminated or truncated)
        observations.append(copy.deepcopy(observation))
        actions.append(action)
        episode.rewards.append(reward)
        episode.terminations.append(bool(terminated))
        episode.truncations.append(bool(truncated))
    return episode


def make_policy(config: JobConfig, env: gymnasium.Env[Any, Any], rng: np.random.Generator) -> Policy:
    """What ``sequence.collect.policy`` names. Raises ``ConfigError``, ``ModelError``."""
    name = config.sequence.collect.policy
    env.action_space.seed(int(rng.integers(2**31)))
    if name == "random":
        return lambda observation, reward, action: env.action_space.sample()
    if ":" in name:
        function = load_dotted(name, "sequence.collect.policy")
        return lambda observation, reward, action: function(observation, rng)
    about = Path(name) / ABOUT
    if not about.is_file():
        raise ConfigError(f"sequence.collect.policy: {name!r} is neither random, nor a folder model/ of a run, nor module:function")
    if "team" in json.loads(about.read_text()):
        return TeamPolicy(Path(name), env, rng)
    return SequencePolicy(config, Path(name), env, rng)


def noisy(policy: Policy, space: spaces.Space[Any], noise: float, rng: np.random.Generator) -> Policy:
    """``policy`` with a random action at a share ``noise`` of the steps."""

    def act(observation: Any, reward: float, action: Any) -> Any:
        chosen = policy(observation, reward, action)  # in any case, for it may remember what it saw
        return space.sample() if rng.random() < noise else chosen

    return act


class SequencePolicy:
    """A trained sequence model that is asked for ``sequence.collect.target`` and draws its actions."""

    def __init__(self, config: JobConfig, folder: Path, env: gymnasium.Env[Any, Any], rng: np.random.Generator) -> None:
        """Raises ``ModelError``."""
        target = config.sequence.collect.target
        self._target = config.sequence.targets[0] if target is None else target
        player = make_player(config, folder)
        self._network, self._delayed = player.network, config.sequence.delayed
        self._steps = player.config.sequence.eval_context or player.config.sequence.context
        self._env, self._generator = env, _generator(rng)

    def __call__(self, observation: Any, reward: float, action: Any) -> Any:
        """See ``Policy``."""
        interface = self._network.interface
        if action is None:
            self._time, self._asked = 0, self._target
            self._context = Context(1, self._steps, interface, self._network.units)
        else:
            self._context.acted([0], interface.encode(np.asarray(action)[None], "the action just taken"))
            self._time += 1
            self._asked -= 0.0 if self._delayed else reward
        state = state_of(observation, self._env.observation_space)
        windows = self._context.push([0], state[None], np.array([self._asked], np.float32), self._time)
        drawn = self._network.act(windows, greedy=False, generator=self._generator)
        return interface.decode(drawn[0].numpy(), self._env.action_space)


class TeamPolicy:
    """A trained Multi-Agent Transformer whose team is one agent (``kind: mat`` with ``multi_agent.name: single``), drawing its actions."""

    def __init__(self, folder: Path, env: gymnasium.Env[Any, Any], rng: np.random.Generator) -> None:
        """Raises ``ModelError`` for a network of another environment."""
        self._network, team = load_team_network(folder)
        self._space, self._generator = env.action_space, _generator(rng)
        self._state = spaces.flatdim(env.observation_space)
        if len(team.agents) != 1 or team.observation not in (self._state, self._state + 1):
            raise ModelError(f"{folder} acts for {len(team.agents)} that see {team.observation} numbers; here one sees {self._state}")
        self._id = np.ones(team.observation - self._state, np.float32)  # the one agent's number, one-hot, where the team was told it
        self._legal = torch.from_numpy(team.actions.legal)[None]
        self._seen = env.observation_space

    def __call__(self, observation: Any, reward: float, action: Any) -> Any:
        """See ``Policy``."""
        state = torch.from_numpy(np.concatenate([state_of(observation, self._seen), self._id]))
        with torch.inference_mode():
            acted = self._network.act(state[None, None], self._legal, generator=self._generator).actions[0, 0].numpy()
        if isinstance(self._space, spaces.Discrete):
            return np.int64(acted[0] + self._space.start)
        space = cast(spaces.Box, self._space)
        within = (np.clip(acted.reshape(space.shape), -1.0, 1.0) + 1.0) / 2.0  # a team's numbers lie in [-1, 1], as in training
        return (space.low + within * (space.high - space.low)).astype(space.dtype)


def _generator(rng: np.random.Generator) -> torch.Generator:
    return torch.Generator().manual_seed(int(rng.integers(2**31)))
