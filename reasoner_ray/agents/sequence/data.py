"""What a job learns from, put together."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from reasoner_ray.agents.sequence.player import horizon_of
from reasoner_ray.agents.sequence.recordings import Recording, best, delayed, read_minari
from reasoner_ray.agents.sequence.spaces import Interface, make_world
from reasoner_ray.errors import DataError

if TYPE_CHECKING:
    from reasoner_ray.config import JobConfig


def load_recordings(config: JobConfig) -> tuple[list[Recording], Interface, int]:
    """A job's trajectories (delayed and filtered as it says), what its environment shows and takes, and an episode's most steps.

    Raises ``DataError`` for data of another environment, and what ``read_minari`` and ``make_world`` raise.
    """
    settings = config.sequence
    env = make_world(settings.world)
    interface, horizon = Interface.of(env.observation_space, env.action_space, settings.world.id), horizon_of(env)
    recordings: list[Recording] = []
    for folder in settings.data:
        found, there = read_minari(Path(folder))
        if there != interface:
            raise DataError(f"{folder} was recorded in another environment than {settings.world.id}: {there} there, {interface} here")
        recordings += found
    longest = max(map(len, recordings))
    if longest > horizon:
        raise DataError(f"sequence.world.max_steps: {horizon}, but a recorded trajectory has {longest} steps; raise it to that")
    if settings.delayed:
        recordings = [delayed(r) for r in recordings]
    return best(recordings, settings.keep_top) if settings.keep_top is not None else recordings, interface, horizon


def fingerprint(recordings: Sequence[Recording]) -> str:
    """Of everything in them: a run is not resumed on other data."""
    digest = hashlib.sha256()
    for recording in recordings:
        for part in (recording.states, recording.actions, recording.rewards):
            digest.update(part.tobytes())
    return digest.hexdigest()[:16]
