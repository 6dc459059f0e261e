"""What the driver asks of its parts. The real ones are Ray actor pools; tests and benchmarks give others.

The driver holds references to trajectories, never the trajectories: what it reads are small summaries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from reasoner_ray.data.tasks import Item

Ref = Any
"""A Ray object reference (or whatever the parts of a test pass around)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupResult:
    """A finished group: a reference to its trajectories and what the driver needs to know of them."""

    trajectories: Ref
    summary: dict[str, Any]


class Plays(Protocol):
    """What work on items one by one (searches, collecting) asks of the rollout pool."""

    def submit(self, item: Item, group_id: str, n: int) -> Any:
        """Hand a group to an engine; returns a call that ``finish`` awaits."""
        ...

    async def finish(self, call: Any) -> GroupResult:
        """Wait for a group."""
        ...


class Judges(Protocol):
    """What the same asks of the scorer pool."""

    async def score(self, result: GroupResult, item: Item) -> GroupResult:
        """Add rewards."""
        ...

    async def fetch(self, result: GroupResult) -> Any:
        """A group's trajectories and its summary."""
        ...


class Rollouts(Protocol):
    """Generates groups of trajectories; survives the death of an engine."""

    @property
    def n_engines(self) -> int:
        """Engines that may be given work."""
        ...

    async def start(self) -> None:
        """Start every engine and wait until all answer."""
        ...

    def submit(self, item: Item, group_id: str, n: int) -> Any:
        """Hand a group to the least busy engine; returns a call that ``finish`` awaits."""
        ...

    async def finish(self, call: Any) -> GroupResult:
        """Wait for a group; where its engine dies, the group runs again on another one."""
        ...

    async def evaluate(self, items: Sequence[Item]) -> list[GroupResult]:
        """Greedy answers, one group of one trajectory per result entry, in the order of ``items``."""
        ...

    async def pause(self) -> None:
        """Stop generating, keep every request."""
        ...

    async def resume(self, seed: int | None = None) -> None:
        """Go on; ``seed`` reseeds the samplers first."""
        ...

    async def update_weights(self, published: Any, version: int) -> None:
        """Load published weights as ``version`` into every live engine. Engines must be paused."""
        ...

    async def abort(self) -> None:
        """Drop every request; their groups are not finished."""
        ...

    async def probe(self, items: Sequence[Item]) -> Ref:
        """Short sampled trajectories of the current weights, for the parity check."""
        ...

    async def scale(self, n: int) -> None:
        """Have ``n`` engines from now on. Raises ``EnvironmentProblem`` where there is no room for them; then those there go on."""
        ...

    async def stats(self) -> dict[str, float]:
        """Counters since the last call: tokens, busy seconds, restarts."""
        ...

    async def stop(self) -> None:
        """End every engine."""
        ...


class Scorers(Protocol):
    """Scores finished groups."""

    async def start(self) -> None:
        """Start the scorer actors."""
        ...

    async def fetch(self, result: GroupResult) -> Any:
        """A finished group with its trajectories, for a checkpoint."""
        ...

    async def store(self, fetched: Any) -> GroupResult:
        """The inverse of ``fetch``: back into the object store."""
        ...

    async def score(self, result: GroupResult, item: Item) -> GroupResult:
        """The group with its outcome rewards; the summary says rewards, statuses and error types."""
        ...

    async def stop(self) -> None:
        """End the scorer actors."""
        ...


class Learners(Protocol):
    """Trains on groups and publishes weights."""

    async def start(self) -> None:
        """Start every rank and load the model."""
        ...

    async def train_step(self, groups: Sequence[Ref]) -> dict[str, float]:
        """One training step on whole groups."""
        ...

    async def publish_weights(self) -> Any:
        """The current weights in a form that ``Rollouts.update_weights`` takes."""
        ...

    async def mismatch(self, probe: Ref) -> dict[str, float]:
        """Rollout against learner log-probs on probe trajectories: mean_abs, max_abs, k3, tokens."""
        ...

    async def save(self, folder: Path) -> None:
        """Write the learner's state into ``folder``."""
        ...

    async def load(self, folder: Path) -> None:
        """Read the learner's state from ``folder``."""
        ...

    async def export(self, folder: Path) -> None:
        """Write a plain Hugging Face folder."""
        ...

    async def restart(self) -> None:
        """Replace every rank by a new one that holds the initial weights."""
        ...

    async def stop(self) -> None:
        """End every rank."""
        ...
