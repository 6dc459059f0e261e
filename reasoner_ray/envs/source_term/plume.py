"""The plume and the sensor as pure functions of tensors.

A source is a vector of eight numbers, ``PARAMETERS``: x, y, z (m), strength q (mass/s), wind u (m/s), direction phi (radians, where the
wind comes from), diffusivity d (m²/s), lifetime tau (s). Mean concentration: Vergassola, Villermaux and Shraiman (Nature 2007), as
Hutchinson et al. (J. Field Robotics 2018) write it for three dimensions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from reasoner_ray.envs.source_term.settings import SensorConfig

PARAMETERS = ("x", "y", "z", "q", "u", "phi", "d", "tau")
X, Y, Z, Q, U, PHI, D, TAU = range(8)
NEAREST = 1e-5
"""Distance (m) below which the concentration grows no further: on top of the source it is finite."""
SMALLEST_SD = 1e-30
"""Of a reading: where concentration and background both are 0, another reading than 0 is impossible, not undefined."""
_LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)


def concentration(source: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Mean concentration at ``position`` [..., 3] (m) of ``source`` [..., 8]; the leading dimensions broadcast.

    q / (4 pi d r) exp(-((p_x - x) cos phi + (p_y - y) sin phi) u / (2 d) - r / lambda), lambda = sqrt(d tau / (1 + u² tau / (4 d))).
    The exponent is never above 0, because lambda is at most 2 d / u.
    """
    x, y, z, q, u, phi, d, tau = source.unbind(-1)
    across, along, up = position[..., 0] - x, position[..., 1] - y, position[..., 2] - z
    distance = torch.sqrt(across**2 + along**2 + up**2).clamp_min(NEAREST)
    reach = torch.sqrt(d * tau / (1 + u**2 * tau / (4 * d)))
    exponent = -(across * torch.cos(phi) + along * torch.sin(phi)) * u / (2 * d) - distance / reach
    return q / (4 * math.pi * d * distance) * torch.exp(exponent)


def read_sensor(mean: torch.Tensor, normal: torch.Tensor, uniform: torch.Tensor, sensor: SensorConfig) -> torch.Tensor:
    """A reading for each concentration ``mean`` [...], from standard ``normal`` [...] and ``uniform`` [...] draws.

    mean + (noise mean + background) normal; 0 where that is below the threshold, or where the sensor missed (uniform >= detection).
    """
    reading = mean + (sensor.noise * mean + sensor.background) * normal
    seen = (reading >= sensor.threshold) & (uniform < sensor.detection)
    return torch.where(seen, reading, torch.zeros_like(reading))


def log_likelihood(mean: torch.Tensor, reading: torch.Tensor, sensor: SensorConfig) -> torch.Tensor:
    """Log-density of ``reading`` where the concentration is ``mean`` (they broadcast), of the very sensor that ``read_sensor`` is.

    Above the threshold: log(detection) + log N(reading; mean, noise mean + background). At 0: log of detection * P(below the threshold)
    + 1 - detection (Hutchinson et al. 2019, eq. 12, without its background term). A reading that is not finite says nothing: 0.
    """
    return SensorTerms.of(mean, sensor).log_likelihood(reading)


@dataclass(frozen=True, slots=True)
class SensorTerms:
    """What a likelihood needs of concentrations ``mean`` [...], worked out once for many readings."""

    mean: torch.Tensor
    precision: torch.Tensor  # 1 / standard deviation
    log_scale: torch.Tensor  # log-density of a reading that is the mean itself
    log_unseen: torch.Tensor  # log-probability of a reading of 0

    @staticmethod
    def of(mean: torch.Tensor, sensor: SensorConfig) -> SensorTerms:
        """Of ``sensor``."""
        sigma = (sensor.noise * mean + sensor.background).clamp_min(SMALLEST_SD)
        below = torch.special.ndtr((sensor.threshold - mean) / sigma)
        log_scale = math.log(sensor.detection) - _LOG_SQRT_2PI - torch.log(sigma)
        return SensorTerms(mean, 1 / sigma, log_scale, torch.log(sensor.detection * below + (1 - sensor.detection)))

    def log_likelihood(self, reading: torch.Tensor) -> torch.Tensor:
        """Log-density of ``reading``, which broadcasts with the means; 0 where it is not finite."""
        found = self.of_reading(reading)
        return torch.where(torch.isfinite(reading), found, torch.zeros_like(found))

    def of_reading(self, reading: torch.Tensor) -> torch.Tensor:
        """The same for readings known to be finite."""
        off = (reading - self.mean).mul_(self.precision)
        return torch.where(reading > 0, torch.addcmul(self.log_scale, off, off, value=-0.5), self.log_unseen)

    def unsqueeze(self, dim: int) -> SensorTerms:
        """With one more dimension, for many readings each."""
        parts = (self.mean, self.precision, self.log_scale, self.log_unseen)
        return SensorTerms(*(part.unsqueeze(dim) for part in parts))
