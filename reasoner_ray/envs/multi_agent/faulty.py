"""A team in which one agent has failed: what it does has no effect."""

from __future__ import annotations

from typing import Any

import numpy as np
from pettingzoo.utils import BaseParallelWrapper


class FaultyAgent(BaseParallelWrapper):
    """Every action of ``agent`` (of a ``Box``) becomes 0 before it reaches the environment."""

    def __init__(self, env: Any, agent: str) -> None:
        super().__init__(env)
        self._faulty = agent

    def step(self, actions: dict[str, Any]) -> Any:
        """See ``ParallelEnv.step``."""
        if self._faulty in actions:
            actions = {**actions, self._faulty: np.zeros_like(actions[self._faulty])}
        return super().step(actions)
