"""Players as Ray actors; a player that dies is replaced and plays the same episodes again."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from reasoner_ray.agents.pool import Collected, WorkerActor, WorkerPool

if TYPE_CHECKING:
    from reasoner_ray.agents.sequence.recordings import Recording
    from reasoner_ray.config import JobConfig


class PlayerActor(WorkerActor):
    """Body of an actor."""

    def _make(self) -> Any:
        from reasoner_ray.agents.sequence.player import Player

        return Player(self._config, self._index)

    def play(self, seeds: Sequence[int], target: float) -> tuple[list[Recording], dict[str, Any]]:
        """See ``Player.play``; the recordings stay in the object store."""
        played: list[Recording] = self.worker.play(seeds, target)
        return played, {"returns": [r.total for r in played], "lengths": [len(r) for r in played]}


class PlayerPool(WorkerPool):
    """All players of a job; see ``WorkerPool`` for what every call may raise."""

    body = PlayerActor

    def __init__(self, config: JobConfig) -> None:
        super().__init__(config, config.sequence.world.id)

    async def play(self, seeds: Sequence[int], target: float) -> list[Collected]:
        """One episode from each seed with drawn actions, shared by the players; the same ones whoever plays them."""
        n = min(len(self._actors), len(seeds))
        return list(await asyncio.gather(*(self._collect(i, "play", seeds[i::n], target) for i in range(n))))
