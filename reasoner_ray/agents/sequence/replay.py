"""The episodes of an Online-DT run, out of its newest checkpoint, as Minari keeps them: a data set of what an agent did as it learnt."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces

from reasoner_ray.agents.sequence.recordings import Recording
from reasoner_ray.agents.sequence.spaces import Interface
from reasoner_ray.errors import CheckpointError, ConfigError
from reasoner_ray.trainer.checkpoint import UNREADABLE, list_checkpoints, read_driver_state

if TYPE_CHECKING:
    from minari.data_collector import EpisodeBuffer

    from reasoner_ray.config import JobConfig


def replay(config: JobConfig, env: gymnasium.Env[Any, Any]) -> list[EpisodeBuffer]:
    """The newest ``sequence.collect.episodes`` of the run's buffer, oldest first; rewards as the run learnt them (``sequence.delayed``).

    Raises ``ConfigError`` for a run of another environment, ``CheckpointError`` for one that keeps no episodes.
    """
    settings, world = config.sequence.collect, config.sequence.world
    if settings.run is None:
        raise ConfigError("sequence.collect.run: name the folder of a run with sequence.online, for example runs/cartpole-online-dt")
    if settings.noise:
        raise ConfigError(f"sequence.collect.noise: {settings.noise:g}, but replay plays nothing; set it to 0")
    folder = Path(settings.run)
    recordings = buffer_of(folder)[-settings.episodes :]
    there = _config_of(folder).sequence.world
    if (there.id, there.args) != (world.id, world.args):
        raise ConfigError(f"sequence.collect.run: {folder} played {there.id} with {there.args}, this job {world.id} with {world.args}")
    interface = Interface.of(env.observation_space, env.action_space, world.id)
    return [_episode(recording, interface, env) for recording in recordings]


def buffer_of(run: Path) -> list[Recording]:
    """The trajectories that a run's newest checkpoint keeps, the last to come in last. Raises ``CheckpointError``."""
    checkpoints = list_checkpoints(run)
    if not checkpoints:
        raise CheckpointError(f"{run} has no checkpoint; give the folder of a run with sequence.online in sequence.collect.run")
    read_driver_state(checkpoints[-1])  # for its check of every file
    file = checkpoints[-1] / "learner" / "rank-00000.pt"  # every rank keeps the same buffer
    try:
        counters = torch.load(file, map_location="cpu", weights_only=False)["counters"]
    except (*UNREADABLE, RuntimeError) as error:
        raise CheckpointError(f"{file} cannot be read ({type(error).__name__}: {error}); delete {checkpoints[-1]}") from error
    if "buffer" not in counters:
        raise CheckpointError(f"{run} keeps no episodes, as only runs with sequence.online do; give one of those in sequence.collect.run")
    found: list[Recording] = counters["buffer"]
    if not all(hasattr(recording, "last") for recording in found):
        raise CheckpointError(f"{run} kept episodes without how they ended, as runs once did; train it anew to export them")
    return found


def _config_of(run: Path) -> JobConfig:
    from reasoner_ray.config import load_tree, parse_config

    return parse_config(load_tree(run / "config.yaml"))


def _episode(recording: Recording, interface: Interface, env: gymnasium.Env[Any, Any]) -> EpisodeBuffer:
    from minari.data_collector import EpisodeBuffer

    before = [False] * (len(recording) - 1)
    return EpisodeBuffer(
        observations=[_observation(state, env.observation_space) for state in (*recording.states, recording.last)],
        actions=[interface.decode(action, env.action_space) for action in recording.actions],
        rewards=[float(reward) for reward in recording.rewards],
        terminations=[*before, not recording.truncated],
        truncations=[*before, recording.truncated],
    )


def _observation(state: np.ndarray, space: spaces.Space[Any]) -> Any:
    """What ``state_of`` flattened."""
    if isinstance(space, spaces.Discrete):
        return np.int64(int(state.argmax()) + int(space.start))
    return state.astype(space.dtype).reshape(space.shape)
