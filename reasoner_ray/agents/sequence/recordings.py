"""Recorded trajectories: returns to go, the best of them, delayed rewards; and data sets in Minari's format, read and written."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from reasoner_ray.agents.sequence.spaces import Interface
from reasoner_ray.errors import DataError, EnvironmentProblem

INSTALL = "pip install minari==0.5.4 h5py==3.16.0"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """One trajectory of T steps."""

    states: np.ndarray  # float32 [T, state]; what was seen before each action
    actions: np.ndarray  # float32 [T, action]; encoded by an ``Interface``
    rewards: np.ndarray  # float32 [T]
    last: np.ndarray  # float32 [state]; what was seen after the last action
    truncated: bool  # whether it was cut off by time

    def __len__(self) -> int:
        return len(self.rewards)

    @property
    def total(self) -> float:
        """The undiscounted return."""
        return float(self.rewards.sum(dtype=np.float64))


def returns_to_go(rewards: np.ndarray) -> np.ndarray:
    """R_t, the sum of the rewards from step t on (gamma = 1), float32 [T]."""
    return np.cumsum(rewards[::-1], dtype=np.float64)[::-1].astype(np.float32)


def delayed(recording: Recording) -> Recording:
    """The same with all of its reward at its last step."""
    rewards = np.zeros_like(recording.rewards)
    rewards[-1] = recording.total
    return replace(recording, rewards=rewards)


def best(recordings: Sequence[Recording], share: float) -> list[Recording]:
    """The trajectories of highest return that hold ``share`` of all steps, as many as fit, at least one; best first (%BC)."""
    room = share * sum(map(len, recordings))
    kept: list[Recording] = []
    for recording in sorted(recordings, key=lambda r: -r.total):
        room -= len(recording)
        if kept and room < 0:
            break
        kept.append(recording)
    return kept


def moments(recordings: Sequence[Recording]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of every number of a state over all steps, float32 [state] each."""
    states = np.concatenate([r.states for r in recordings]).astype(np.float64)
    return states.mean(0).astype(np.float32), (states.std(0) + 1e-6).astype(np.float32)


def read_minari(folder: Path) -> tuple[list[Recording], Interface]:
    """All trajectories of a Minari data set. Raises ``DataError`` for one that is missing, damaged, truncated or not finite."""
    minari = _minari()
    inside = folder / "data" if (folder / "data").is_dir() else folder
    if not (inside / "metadata.json").is_file():
        raise DataError(f"no Minari data set in {folder}; `reasoner collect JOB sequence.collect.out={folder}` writes one")
    try:
        data = minari.MinariDataset(inside)
        observation, action = data.observation_space, data.action_space
        # A number that is observed becomes one-hot, as in `state_of`.
        interface = Interface.of(observation, action, str(folder))
        found = [_recording(episode, observation, interface, folder) for episode in data.iterate_episodes()]
    except (OSError, KeyError, ValueError, TypeError, RuntimeError, AssertionError, json.JSONDecodeError) as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise DataError(f"{folder}: the Minari data set is damaged or truncated ({why}); collect or download it again") from error
    if not found:
        raise DataError(f"{folder}: the Minari data set has no episode")
    return found, interface


def check_new(folder: Path) -> None:
    """Raise ``DataError`` where no data set can be written into ``folder``: it exists, or its name has no version."""
    _minari()
    from minari.dataset.minari_dataset import DATASET_ID_RE

    match = DATASET_ID_RE.fullmatch(folder.name)
    if match is None or match.group("version") is None:
        raise DataError(f"{folder}: a Minari data set's folder is named with a version, for example {folder.name or 'random'}-v0")
    if folder.exists():
        raise DataError(f"{folder} exists; name another folder in sequence.collect.out, or remove it")


def write_minari(folder: Path, episodes: Sequence[Any], env: gymnasium.Env[Any, Any], about: dict[str, Any]) -> None:
    """Write ``minari`` ``EpisodeBuffer``s as a data set named like ``folder`` (NAME-v0), whole or not at all. Raises ``DataError``."""
    check_new(folder)
    minari = _minari()
    from minari.dataset.minari_storage import MinariStorage

    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    (aside / "data").mkdir(parents=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not serializable")  # of an environment whose arguments JSON cannot hold
        storage = MinariStorage.new(
            aside / "data", observation_space=env.observation_space, action_space=env.action_space, env_spec=env.spec
        )
    storage.update_metadata({"dataset_id": folder.name, "minari_version": minari.__version__, **about})
    storage.update_episodes(episodes)
    aside.rename(folder)


def _recording(episode: Any, space: gymnasium.Space[Any], interface: Interface, folder: Path) -> Recording:
    where = f"{folder}, episode {episode.id}"
    steps = len(episode.rewards)
    seen = np.asarray(episode.observations)
    if not steps or len(seen) != steps + 1 or len(episode.actions) != steps:
        raise DataError(
            f"{where}: {len(seen)} observations, {len(episode.actions)} actions and {steps} rewards; there must be one observation more "
            "than there are actions, and as many rewards"
        )
    if isinstance(space, gymnasium.spaces.Discrete):
        seen = _one_hot(seen.reshape(steps + 1), space, where)
    states = seen.reshape(steps + 1, -1).astype(np.float32)
    rewards = np.asarray(episode.rewards, np.float32)
    if not (np.isfinite(states).all() and np.isfinite(rewards).all()):
        raise DataError(f"{where}: a state or reward is not finite")
    return Recording(
        states=states[:-1],
        actions=interface.encode(episode.actions, where),
        rewards=rewards,
        last=states[-1],
        truncated=bool(episode.truncations[-1] and not episode.terminations[-1]),
    )


def _one_hot(seen: np.ndarray, space: gymnasium.spaces.Discrete[Any], where: str) -> np.ndarray:
    """Observed numbers [T + 1] as float32 [T + 1, n]. Raises ``DataError`` for one that the space does not have."""
    first, n = int(space.start), int(space.n)
    if len(bad := np.flatnonzero(~np.isin(seen, np.arange(first, first + n)))):
        step = int(bad[0])
        raise DataError(f"{where}, step {step}: the observation {seen[step]} is none of the {n} from {first} on")
    return np.eye(n, dtype=np.float32)[seen.astype(np.int64) - first]


def _minari() -> Any:
    try:
        import h5py  # noqa: F401 - Minari asks for it only when it reads
        import minari
    except ImportError as error:
        raise EnvironmentProblem(f"Minari data sets need packages that cannot be imported ({error}); run `{INSTALL}`") from error
    return minari
