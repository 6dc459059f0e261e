"""A learner in this process behind the interface that drivers know."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class LocalLearner:
    """What does not depend on the kind of job; ``learner`` is a learner of one rank."""

    learner: Any

    async def save(self, folder: Path) -> None:
        self.learner.save(folder)

    async def load(self, folder: Path) -> None:
        self.learner.load(folder)

    async def export(self, folder: Path) -> None:
        self.learner.export(folder)

    async def stop(self) -> None: ...
