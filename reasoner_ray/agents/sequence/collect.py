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
from reasoner_ray.agents.sequence.replay import replay
from reasoner_ray.agents.sequence.spaces import make_world, state_of
from reasoner_ray.agents.weights import ABOUT
from reasoner_ray.envs.multi_agent.settings import MultiAgentConfig, PadConfig
from reasoner_ray.envs.multi_agent.spec import ActionLayout, TeamSpec
from reasoner_ray.envs.multi_agent.teams import Observer, environment_code
from reasoner_ray.errors import ConfigError, ModelError
from reasoner_ray.registry import load_dotted

if TYPE_CHECKING:
    from minari.data_collector import EpisodeBuffer

    from reasoner_ray.config import JobConfig

Policy = Callable[[Any, float, Any], Any]
"""``policy(observation, reward, action)``: the environment's next action, after ``action`` was taken and earned ``reward``.

Where an episode begins ``action`` is None.
"""
REPLAY = "replay"
"""The name of no policy: the episodes that an Online-DT run learns from."""
SEED = 2_000_000_000
"""Seeds of collected episodes are drawn from this and the job's, so that they are none of an evaluation's."""


def collect(config: JobConfig) -> dict[str, float]:
    """Play ``sequence.collect``, or take what a run played, and write the data set; figures of it. Raises ``ReasonerError``."""
    settings, world = config.sequence.collect, config.sequence.world
    if config.kind != "sequence":
        raise ConfigError(f"kind: {config.kind} has no sequence.world to play in; `reasoner collect` takes jobs of kind sequence or rl")
    if settings.out is None:
        raise ConfigError("sequence.collect.out: name the folder of the data set, for example runs/data/key-to-door-random-v0")
    check_new(Path(settings.out))
    env = make_world(world)
    rng = np.random.default_rng([SEED, config.seed])
    if settings.policy == REPLAY:
        episodes = replay(config, env)
        said = f"the newest {len(episodes)} episodes that {settings.run} learns from"
    else:
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
        raise ConfigError(
            f"sequence.collect.policy: {name!r} is neither random, nor replay, nor a folder model/ of a run, nor module:function"
        )
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
        self._space, self._generator, self._seen = env.action_space, _generator(rng), env.observation_space
        sees, does = int(spaces.flatdim(env.observation_space)), _layout(env.action_space)
        own, settings = _sight_of_one(team, sees)
        if len(team.agents) != 1 or own != sees or (team.actions.choices, team.actions.dims) != (does.choices, does.dims):
            raise ModelError(
                f"{folder} acts for {len(team.agents)} that see {own} numbers, by {_said(team.actions)}; here one sees {sees} and acts by "
                f"{_said(does)}"
            )
        self._observer = Observer([sees], settings)
        self._blank = self._observer.empty(1)
        self._legal = torch.from_numpy(team.actions.legal)[None]
        self._first = int(team.actions.n_choices > 0)  # of the numbers of a continuous action

    def __call__(self, observation: Any, reward: float, action: Any) -> Any:
        """See ``Policy``."""
        seen = self._blank.copy()
        seen[0, 0, self._observer.places[0]] = state_of(observation, self._seen)
        shown = torch.from_numpy(self._observer.finish(seen))  # as in training
        with torch.inference_mode():
            acted = self._network.act(shown, self._legal, generator=self._generator).actions[0, 0].numpy()
        if isinstance(self._space, spaces.Discrete):
            return np.int64(acted[0] + self._space.start)
        space = cast(spaces.Box, self._space)
        numbers = acted[self._first :][: int(np.prod(space.shape))].reshape(space.shape)
        within = (np.clip(numbers, -1.0, 1.0) + 1.0) / 2.0  # a team's numbers lie in [-1, 1], as in training
        return (space.low + within * (space.high - space.low)).astype(space.dtype)


def _sight_of_one(team: TeamSpec, sees: int) -> tuple[int, MultiAgentConfig]:
    """How many numbers the first agent of a team observes, and the settings of an ``Observer`` that shows them as it was trained."""
    number, sight = team.number, team.sight
    if number is None:  # of old files: at most the one agent's number, one-hot
        number = 1 if team.observation == sees + 1 else 0
    pad = PadConfig(observation=team.observation - number, agents=number)
    if sight is None:
        return team.observation - number, MultiAgentConfig(agent_id=number > 0, pad=pad)
    features = None if sight.features is None else list(sight.features)
    return sight.own[0], MultiAgentConfig(agent_id=number > 0, pad=pad, standardise=sight.standardise, features=features)


def _layout(space: spaces.Space[Any]) -> ActionLayout:
    """What one agent does. An ``Interface`` could be made of the space, so it is one of both."""
    if isinstance(space, spaces.Discrete):
        return ActionLayout(choices=(int(space.n),), dims=(0,))
    return ActionLayout(choices=(0,), dims=(int(np.prod(cast(spaces.Box, space).shape)),))


def _said(actions: ActionLayout) -> str:
    return f"{actions.choices[0]} choices and {actions.dims[0]} dimensions"


def _generator(rng: np.random.Generator) -> torch.Generator:
    return torch.Generator().manual_seed(int(rng.integers(2**31)))
