"""The belief over a plume's source as autonomous goal detection reads it."""

from __future__ import annotations

import numpy as np
import torch

from reasoner_ray.agents.agdc.belief import ParticleBelief
from reasoner_ray.agents.agdc.cessation import BeliefSummary
from reasoner_ray.agents.agdc.settings import BeliefConfig
from reasoner_ray.envs.source_term.plume import PHI, Q, U, Z
from reasoner_ray.envs.source_term.settings import SourceTermConfig


class SourceBelief:
    """A ``Belief`` of SourceTerm's observations. What is searched for is the position in the plane."""

    n_features = 18

    def __init__(
        self,
        settings: BeliefConfig,
        environment: SourceTermConfig,
        n: int,
        *,
        tolerance: float = 1.0,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:
        """``tolerance``: how far (m) an estimate of the position may be off to count as right. Raises ``ConfigError``."""
        self.filter = ParticleBelief(settings, environment, n, seed, device)
        self._tolerance, self._max_steps, self._threshold = tolerance, environment.max_steps, environment.sensor.threshold
        self._extent = max(environment.scene.width, environment.scene.height)
        self._middle = torch.tensor([environment.scene.width, environment.scene.height], device=self.filter.device) / 2
        self._position = self._middle.repeat(n, 1)
        self._reading = torch.zeros(n, device=self.filter.device)
        self._detections = torch.zeros(n, device=self.filter.device)
        self._readings = torch.zeros(n, device=self.filter.device)

    def seed(self, seed: int) -> None:
        """Draw from ``seed`` on."""
        self.filter.seed(seed)

    def faults(self) -> dict[str, int]:
        """What the filter counts as out of order, ``belief.FAULTS``."""
        return self.filter.faults()

    def reset(self, mask: torch.Tensor, observation: torch.Tensor) -> None:
        """Begin from the prior and an episode's first observation [E, 7]."""
        mask, observation = mask.to(self.filter.device), observation.to(self.filter.device)
        self._detections[mask], self._readings[mask], self._position[mask] = 0.0, 0.0, self._middle
        self.filter.reset(mask, observation)
        self._note(mask, observation)

    def update(self, mask: torch.Tensor, observation: torch.Tensor) -> None:
        """Take in an observation [E, 7]."""
        mask, observation = mask.to(self.filter.device), observation.to(self.filter.device)
        self.filter.update(mask, observation)
        self._note(mask, observation)

    def _note(self, mask: torch.Tensor, observation: torch.Tensor) -> None:
        """Keep what features need, all of it finite: the last place that was known (first the middle), and 0 for a reading that is none."""
        place, reading = observation[mask, :2], torch.nan_to_num(observation[mask, 2], posinf=0.0, neginf=0.0).clamp_min(0.0)
        known = torch.isfinite(place).all(dim=-1, keepdim=True)
        self._position[mask] = torch.where(known, place, self._position[mask])
        self._reading[mask] = reading
        self._readings[mask] += 1
        self._detections[mask] += (reading > 0).float()

    def drawing(self) -> np.ndarray:
        """The first episode's particles [N, 8]."""
        particles: np.ndarray = self.filter.particles[0].cpu().numpy()
        return particles

    def summary(self) -> BeliefSummary:
        """Over the eight parameters; evidence: logarithms of the detections, the readings and the way to the estimate."""
        covariance, mean = self.filter.covariance(), self.filter.mean()
        variance = torch.diagonal(covariance, dim1=-2, dim2=-1).clamp_min(0.0)
        off = torch.linalg.vector_norm(self.filter.particles[..., :2] - mean[:, None, :2], dim=-1)
        mass = (self.filter.weights * (off <= self._tolerance)).sum(-1)
        away = torch.linalg.vector_norm(mean[:, :2] - self._position, dim=-1)
        evidence = torch.stack([self._detections, self._readings, away], dim=-1).log1p()
        return BeliefSummary(mean, variance.sqrt(), variance[:, :2].sum(-1).sqrt(), mass, evidence)

    def features(self) -> torch.Tensor:
        """float32 [E, 18]: where the agent is, where the source seems to be from there, how sure that is and along which axis, the wind,
        the strength, the height, the newest reading, the time that has gone."""
        covariance, mean = self.filter.covariance(), self.filter.mean()
        position, reading = self._position, self._reading
        total = (covariance[:, 0, 0] + covariance[:, 1, 1]).clamp_min(1e-12)
        away = (mean[:, :2] - position) / self._extent
        near = torch.linalg.vector_norm(away, dim=-1, keepdim=True)
        columns = [
            2 * position / self._extent - 1,
            2 * away,
            away / near.clamp_min(1e-6),
            total.sqrt().log()[:, None] / 3,
            ((covariance[:, 0, 0] - covariance[:, 1, 1]) / total)[:, None],
            (2 * covariance[:, 0, 1] / total)[:, None],
            torch.cos(mean[:, PHI, None]),
            torch.sin(mean[:, PHI, None]),
            mean[:, U, None] / 3,
            mean[:, Q, None] / 10,
            mean[:, Z, None] / 3,
            (torch.log1p(reading / self._threshold) / 8)[:, None],
            (reading > 0).float()[:, None],
            torch.log1p(self._detections)[:, None] / 3,
            self._readings[:, None] / self._max_steps,
        ]
        return torch.cat(columns, dim=-1)
