"""Windows of trajectories, the batches that a sequence model learns from; and the buffer of trajectories of Online DT."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import islice

import numpy as np
import torch

from reasoner_ray.agents.sequence.recordings import Recording, returns_to_go

NO_ACTION = -10.0
"""What stands for the action of a padded step where actions are numbers; where they are choices it is a row of zeros."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """B windows of K steps, padded on the left. States are standardised and returns scaled."""

    states: torch.Tensor  # float32 [B, K, state]
    actions: torch.Tensor  # float32 [B, K, action]
    returns: torch.Tensor  # float32 [B, K]; still to come at each step
    times: torch.Tensor  # int64 [B, K]; steps since the trajectory began
    mask: torch.Tensor  # bool [B, K]; False where padded

    def __len__(self) -> int:
        return len(self.mask)

    def rows(self, places: torch.Tensor | slice) -> Windows:
        """Some of the windows."""
        return Windows(**{f.name: getattr(self, f.name)[places] for f in fields(self)})

    def to(self, device: torch.device) -> Windows:
        """The same on ``device``."""
        return Windows(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Units:
    """What the network's numbers are measured in."""

    mean: np.ndarray  # float32 [state]
    std: np.ndarray  # float32 [state]
    return_scale: float
    no_action: float

    def window(self, recording: Recording, start: int, context: int) -> tuple[np.ndarray, ...]:
        """Steps ``start`` to ``start + context`` of a trajectory (fewer at its end), one array for each field of ``Windows``."""
        end = min(start + context, len(recording))
        pad = context - (end - start)
        states = (recording.states[start:end] - self.mean) / self.std
        returns = returns_to_go(recording.rewards)[start:end] / self.return_scale
        parts = (states, recording.actions[start:end], returns, np.arange(start, end), np.ones(end - start, bool))
        fill = (0.0, self.no_action, 0.0, 0, False)
        return tuple(
            np.concatenate([np.full((pad, *part.shape[1:]), value, part.dtype), part]) for part, value in zip(parts, fill, strict=True)
        )


def sample(recordings: Sequence[Recording], units: Units, number: int, context: int, rng: np.random.Generator) -> Windows:
    """Windows at random: a trajectory with a probability proportional to its length, then a uniform first step of it."""
    lengths = np.array([len(r) for r in recordings], np.float64)
    chosen = rng.choice(len(recordings), number, p=lengths / lengths.sum())
    starts = [int(rng.integers(len(recordings[i]))) for i in chosen]
    return stack([units.window(recordings[i], start, context) for i, start in zip(chosen, starts, strict=True)])


def stack(windows: Sequence[tuple[np.ndarray, ...]]) -> Windows:
    """What ``Units.window`` made, as one batch."""
    return Windows(
        **{f.name: torch.from_numpy(np.stack(part)) for f, part in zip(fields(Windows), zip(*windows, strict=True), strict=True)}
    )


class TrajectoryBuffer:
    """Whole trajectories, first in, first out. It begins with those of highest return (Online DT, section 4.2)."""

    def __init__(self, capacity: int, offline: Sequence[Recording] = ()) -> None:
        """The best ``capacity`` of ``offline``, the worst of them first in line to go."""
        ranked = sorted(offline, key=lambda r: r.total)
        self.capacity = capacity
        self.recordings = ranked[-capacity:]

    def add(self, recordings: Sequence[Recording]) -> None:
        """Append; the oldest give way. The buffer never holds more than ``capacity``, however many are added at once."""
        self.recordings = [*self.recordings, *recordings][-self.capacity :]

    def newest(self, number: int) -> list[Recording]:
        """The last ``number`` that came in, newest first."""
        return list(islice(reversed(self.recordings), number))
