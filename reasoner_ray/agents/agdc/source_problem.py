"""The search for a plume's source as a problem of kind agdc."""

from __future__ import annotations

import math

import numpy as np
import torch

from reasoner_ray.agents.agdc.cessation import BeliefSummary
from reasoner_ray.agents.agdc.planners import PLANNERS
from reasoner_ray.agents.agdc.settings import AgdcConfig, BeliefConfig
from reasoner_ray.agents.agdc.source_belief import SourceBelief
from reasoner_ray.envs.source_term.core import SourceTermBatch
from reasoner_ray.envs.source_term.environment import SourceTermVector
from reasoner_ray.envs.source_term.settings import SourceTermConfig
from reasoner_ray.errors import ConfigError


def scale_observation(observation: torch.Tensor, config: SourceTermConfig) -> torch.Tensor:
    """Observations [E, 7] (``core.OBSERVATION``) as numbers of order 1, [E, 8]."""
    x, y, reading, wind, direction, diffusivity, lifetime = observation.unbind(-1)
    columns = [
        2 * x / config.scene.width - 1,
        2 * y / config.scene.height - 1,
        torch.log1p(reading / config.sensor.threshold) / 8,
        wind / 3,
        torch.cos(direction),
        torch.sin(direction),
        diffusivity / 3,
        lifetime / 10,
    ]
    return torch.stack(columns, dim=-1)


def belief_device(belief: BeliefConfig) -> str:
    """Where beliefs live. Raises ``ConfigError`` for a GPU that PyTorch does not see."""
    if belief.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("agdc.belief.device: cuda, but PyTorch sees no GPU in this process; set agdc.belief.device=cpu, or run on a GPU")
    return belief.device


class SourceTermProblem:
    """An estimate of the source's position is right within ``tolerance`` m of it."""

    planners = PLANNERS

    def __init__(self, agdc: AgdcConfig) -> None:
        """Raises ``ConfigError`` where beliefs are to live on a GPU and there is none."""
        self._config, self._belief, self._tolerance = agdc.environment, agdc.belief, agdc.tolerance
        self._device = belief_device(agdc.belief) if agdc.detect else "cpu"
        self.max_steps = agdc.environment.max_steps

    def vector(self, n: int) -> SourceTermVector:
        """The Gymnasium environment."""
        return SourceTermVector(n, self._config)

    def search(self, n: int) -> SourceTermBatch:
        """Its tensors, beside the belief's: planners read both."""
        return SourceTermBatch(self._config, n, self._device)

    def belief(self, n: int) -> SourceBelief:
        """Particle filters."""
        return SourceBelief(self._belief, self._config, n, tolerance=self._tolerance, device=self._device)

    def plain(self, observation: torch.Tensor) -> torch.Tensor:
        """float32 [E, 8]."""
        return scale_observation(observation, self._config)

    def action(self, chosen: torch.Tensor) -> torch.Tensor:
        """Indices of moves, or headings from (-1, 1) as angles."""
        if self._config.moves == "discrete":
            return chosen.long().reshape(-1)
        return chosen.reshape(-1).clamp(-1.0, 1.0) * math.pi

    def error(self, search: SourceTermBatch, summary: BeliefSummary) -> torch.Tensor:
        """m, in the plane."""
        return torch.linalg.vector_norm(summary.mean[:, :2] - search.source[:, :2], dim=-1)

    def picture(self, search: SourceTermBatch, belief: SourceBelief, way: torch.Tensor, title: str) -> np.ndarray:
        """The field, the way and the particles."""
        from reasoner_ray.envs.source_term.render import draw_scene

        return draw_scene(self._config.scene, search.source[0].cpu().numpy(), way.cpu().numpy(), belief.drawing(), title)
